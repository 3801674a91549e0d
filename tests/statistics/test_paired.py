import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from alignblind_mi.statistics.paired import (
    FEWEST,
    clustered_test,
    corrected,
    difference_draws,
    exact_difference,
    item_slopes,
    mcnemar_p,
    paired,
    paired_differences,
    paired_means,
    summarise_slopes,
)
from alignblind_mi.statistics.rates import StatisticsError, clustered_interval, exact_interval, t_interval

LETTER = {"s": "stereotyped", "r": "reversed", "x": "invalid"}


def side(treatment: str, letters: str, n_templates: int = 2, **columns: object) -> pd.DataFrame:
    """Answers of one treatment, as letters; item i is word pair i // n_templates in template i % n_templates."""
    n = len(letters)
    return pd.DataFrame({
        "model": "m", "treatment": treatment, "kind": "implicit", "template": [f"t{i % n_templates}" for i in range(n)],
        "word_pair": [f"w{i // n_templates:03d}" for i in range(n)], "outcome": [LETTER[letter] for letter in letters], **columns})


def both(before: str, after: str, **columns: object) -> pd.DataFrame:
    return pd.concat([side("untreated", before, **columns), side("aware", after, **columns)], ignore_index=True)


def answers(change: np.ndarray, before: np.ndarray) -> pd.DataFrame:
    """Rows from [word pair, template] arrays: stereotyped before (0 or 1), and after = before + change."""
    letters = ["".join("sr"[1 - int(value)] for value in values.ravel()) for values in (before, before + change)]
    return both(*letters, n_templates=change.shape[1])


# --- by hand --------------------------------------------------------------------------------------------------------------------------


def test_paired_difference_by_hand() -> None:
    row = paired_differences(both("sssssrrx", "srrrxrsr")).iloc[0]
    assert row[["n_items", "n", "n_discordant", "n_less", "n_more"]].tolist() == [8, 6, 4, 3, 1]
    assert row[["rate_baseline", "rate", "difference"]].tolist() == pytest.approx([4 / 6, 2 / 6, -2 / 6])
    assert row[["invalid_baseline", "invalid"]].tolist() == [1 / 8, 1 / 8]
    assert (row["bound_low"], row["bound_high"]) == pytest.approx((2 / 8 - 6 / 8, 3 / 8 - 5 / 8))    # one invalid answer on either side
    assert (row["p"], row["p_mcnemar"], row["interval"]) == (pytest.approx(0.625), pytest.approx(0.625), "exact")    # 2 (1 + 4) / 2^4
    assert row["low"] < -2 / 6 < row["high"]
    assert row["clustered_over"] == "word_pair+template"


def test_pairs_are_matched_by_item_and_not_by_place() -> None:
    rows = both("ssrrsrsr", "srsrrrss")
    shuffled = rows.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(paired_differences(rows), paired_differences(shuffled.sort_values("treatment", ascending=False)))
    fewer = paired_differences(rows.drop(index=[0, 9])).iloc[0]    # item 0 of one treatment, item 1 of the other
    assert fewer[["n_items", "n_unpaired"]].tolist() == [6, 2]


def test_rejected_explicit_answers_are_valid_and_not_stereotyped() -> None:
    rows = both("ssssrrrr", "ssrrrrrr", kind="explicit").replace("reversed", "rejected")
    assert paired_differences(rows).iloc[0][["n", "rate_baseline", "rate", "difference"]].tolist() == [8, 0.5, 0.25, -0.25]


def test_nothing_valid_gives_no_number_but_bounds() -> None:
    row = paired_differences(both("xxxx", "ssrr")).iloc[0]
    assert row[["difference", "rate", "p", "p_mcnemar", "log_odds"] if "log_odds" in row else ["difference", "rate", "p"]].isna().all()
    assert row[["n", "low", "high"]].tolist() == [0, -1, 1]
    assert (row["bound_low"], row["bound_high"]) == (0.5 - 1, 0.5)


def test_what_cannot_be_paired_is_said() -> None:
    rows = both("ssrr", "srsr")
    with pytest.raises(StatisticsError, match=r"no row has treatment 'lora'; the rows have: untreated, aware"):
        paired(rows, "lora", values=["outcome"])
    with pytest.raises(StatisticsError, match=r"4 rows of 'untreated' repeat an item, such as .*'word_pair': 'w000'.*`item`"):
        paired_differences(pd.concat([rows, rows]))
    with pytest.raises(StatisticsError, match=r"share no item"):
        paired_differences(pd.concat([rows[:4].assign(cue="default"), rows[4:].assign(cue="other")]))
    with pytest.raises(StatisticsError, match=r"no other treatment"):
        paired_differences(rows[:4])
    with pytest.raises(StatisticsError, match=r"no column 'outcome'"):
        paired_differences(rows.drop(columns="outcome"))
    with pytest.raises(StatisticsError, match=r"unknown outcome\(s\) \['maybe'\]"):
        paired_differences(rows.replace("invalid", "maybe").replace("reversed", "maybe"))


def test_samples_and_models_are_told_apart_by_columns_of_ones_own_choice() -> None:
    rows = pd.concat([both("ssrr", "srsr", decoding_seed=seed) for seed in (0, 1)])
    assert paired_differences(rows, item=("template", "word_pair", "decoding_seed")).iloc[0]["n"] == 8
    models = both("ssrr", "srsr").replace({"m": "x"}).assign(model=lambda table: table["treatment"], treatment="untreated")
    found = paired_differences(models, between="model", baseline="untreated", by=("kind",)).iloc[0]
    assert (found["model"], found["n"]) == ("aware", 4)


# --- against references ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_statsmodels(less: int, more: int) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    assert mcnemar_p(less, more) == pytest.approx(mcnemar([[3, less], [more, 4]], exact=True).pvalue if less + more else 1)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_exact_difference_contains_the_estimate_and_mirrors(less: int, more: int, same: int) -> None:
    n = less + more + same
    low, high = exact_difference(less, more, n)
    assert -1 <= low <= ((more - less) / n if n else 0) <= high <= 1
    assert exact_difference(more, less, n) == pytest.approx((-high, -low))
    if n and not same:
        ends = exact_interval(more, n, np.sqrt(0.95).item())
        assert low <= 2 * ends.low - 1 or low == pytest.approx(min(2 * ends.low - 1, exact_interval(n, n, np.sqrt(0.95).item()).low))


def test_exact_difference_holds_its_level_for_any_truth() -> None:
    for n, less, more in [(20, 0.3, 0.02), (20, 0.05, 0.05), (40, 0.5, 0.0), (40, 0.1, 0.3)]:
        cells = [(a, b) for a in range(n + 1) for b in range(n + 1 - a)]
        chance = stats.multinomial.pmf([(a, b, n - a - b) for a, b in cells], n, [less, more, 1 - less - more])
        likely = [(cell, p) for cell, p in zip(cells, chance, strict=True) if p > 1e-7]
        ends = [exact_difference(*cell, n) for cell, _ in likely]
        covered = sum(p for (low, high), (_, p) in zip(ends, likely, strict=True) if low - 1e-9 <= more - less <= high + 1e-9)
        assert covered >= 0.95 - 1e-4


def test_exact_difference_refuses_impossible_counts() -> None:
    with pytest.raises(StatisticsError, match=r"3 and 2 discordant of 4 items"):
        exact_difference(3, 2, 4)


def test_clustered_test_is_students_where_each_item_is_a_cluster_and_t_interval_over_one_variable() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 60)
    found, reference = clustered_test(values, [np.arange(60)]), stats.ttest_1samp(values, 0)
    assert (found.p, found.df) == pytest.approx((reference.pvalue, 59))
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval()))
    labels = np.repeat([f"t{i}" for i in range(6)], 10)
    one = clustered_test(values, [labels])
    assert (one.low, one.high) == pytest.approx(tuple(t_interval(values, labels)))


def test_clustered_test_has_the_variance_of_statsmodels() -> None:
    import statsmodels.api as sm

    random = np.random.default_rng(1)
    pair, template = (index.ravel() for index in np.indices((20, 8)))
    values = random.normal(0, 1, 20)[pair] + random.normal(0, 1, 8)[template] + random.normal(0, 1, 160)
    model = sm.OLS(values, np.ones(160)).fit()
    by = [model.get_robustcov_results("cluster", groups=groups, use_correction=False).cov_params().item()
          for groups in (pair, template, np.arange(160))]
    expected = by[0] * 20 / 19 + by[1] * 8 / 7 - by[2] * 160 / 159
    assert clustered_test(values, [pair, template]).se ** 2 == pytest.approx(expected)


def test_clustered_test_of_odd_input() -> None:
    labels = np.arange(4)
    assert np.isnan(clustered_test(np.ones(4), [np.zeros(4)])).all()
    assert np.isnan(clustered_test(np.full(4, np.nan), [labels])).all()
    assert clustered_test(np.zeros(4), [labels])[:4] == (0, 0, 0, 1)
    assert np.isnan(clustered_test(np.ones(4), [labels]).p)
    assert clustered_test(np.array([1, 2, 3, np.nan]), [labels]).df == 2
    with pytest.raises(StatisticsError, match="one or two cluster variables, not 3"):
        clustered_test(np.ones(4), [labels] * 3)


def test_the_bootstrap_is_the_one_of_statistics() -> None:
    random = np.random.default_rng(3)
    before = (random.random((20, 6)) < 0.9).astype(float)
    rows = answers(np.where(random.random((20, 6)) < 0.3, -before, 0), before)
    row, items = paired_differences(rows, seed=5).iloc[0], paired(rows, "aware", values=["outcome"])
    change = (items["outcome_treated"] == "stereotyped").to_numpy(float) - (items["outcome_baseline"] == "stereotyped").to_numpy(float)
    expected = clustered_interval(change, [items["word_pair"].to_numpy(), items["template"].to_numpy()], seed=5)
    assert (row["cluster_low"], row["cluster_high"]) == expected
    draws = difference_draws(rows, seed=5)
    assert tuple(draws["aware"].quantile([0.025, 0.975])) == pytest.approx(expected)


def test_draws_are_shared_between_treatments() -> None:
    rows = both("s" * 24, "srrrsrssrsrrsrssrssrssrr", n_templates=4)
    twice = pd.concat([rows, rows[rows["treatment"] == "aware"].assign(treatment="again")])
    draws = difference_draws(twice, draws=50)
    assert list(draws) == ["aware", "again"]
    assert (draws["aware"] == draws["again"]).all()
    assert draws["aware"].std() > 0.02
    fewer = difference_draws(twice[~((twice["treatment"] == "again") & (twice["word_pair"] == "w003"))], draws=50)
    assert np.corrcoef(fewer["aware"], fewer["again"])[0, 1] > 0.8


# --- side effects, slopes, corrections ------------------------------------------------------------------------------------------------


def test_paired_means_are_students_paired_test_of_each_measure() -> None:
    random = np.random.default_rng(0)
    before, after = random.normal(0, 1, 30), random.normal(0.2, 1, 30)
    rows = pd.concat([pd.DataFrame({"treatment": name, "measure": measure, "item": range(30), "value": scale * values})
                      for name, values in (("untreated", before), ("lora", after)) for measure, scale in (("kl", 1), ("copy", 2))])
    found = paired_means(rows)
    reference = stats.ttest_rel(after, before)
    assert found["measure"].tolist() == ["kl", "copy"]
    assert found["p"].tolist() == pytest.approx([reference.pvalue] * 2)
    assert found["difference"].tolist() == pytest.approx([(after - before).mean(), 2 * (after - before).mean()])
    with pytest.raises(StatisticsError, match="no column 'value'"):
        paired_means(rows.drop(columns="value"))


def test_slopes_by_hand() -> None:
    rows = pd.concat([side("untreated", "ssss", log_odds=[1.0, 2.0, 3.0, np.nan]), side("aware", "ssss", log_odds=[0.0, 2.5, 1.0, 0.0])])
    slopes = item_slopes(rows)
    assert slopes["change"].tolist() == [-1, 0.5, -2]
    row = summarise_slopes(slopes).iloc[0]
    assert (row["mean"], row["sd"], row["q50"]) == pytest.approx((-2.5 / 3, np.std([-1, 0.5, -2], ddof=1), -1))
    assert (row["n_wrong"], row["wrong"]) == (1, pytest.approx(1 / 3))
    assert (row["wrong_low"], row["wrong_high"]) == exact_interval(1, 3)
    changed = paired_differences(rows).iloc[0]
    assert (changed["log_odds"], changed["n_log_odds"]) == (pytest.approx(-2.5 / 3), 3)
    assert (changed["log_odds_low"], changed["log_odds_high"]) == pytest.approx((row["low"], row["high"]))


def test_corrections_by_hand() -> None:
    table = pd.DataFrame({"p": [0.01, np.nan, 0.04, 0.03], "measure": ["a", "a", "a", "b"]}, index=[7, 5, 3, 1])
    found = corrected(table)
    assert found["p_holm"].tolist() == pytest.approx([0.03, np.nan, 0.06, 0.06], nan_ok=True)
    assert found["p_bh"].tolist() == pytest.approx([0.03, np.nan, 0.04, 0.04], nan_ok=True)
    assert found["p_family"].tolist() == [3] * 4
    assert found.index.tolist() == [7, 5, 3, 1]
    by_measure = corrected(table, family=("measure",))
    assert by_measure["p_holm"].tolist() == pytest.approx([0.02, np.nan, 0.04, 0.03], nan_ok=True)
    assert by_measure["p_family"].tolist() == [2, 2, 2, 1]
    assert "p_holm" not in table
    with pytest.raises(StatisticsError, match=r"holds 1\.2, which is no p-value"):
        corrected(pd.DataFrame({"p": [1.2]}))


# --- error rates, by simulation -------------------------------------------------------------------------------------------------------

SIZES = {"many templates": (30, 12), "few templates": (60, 4)}


def simulate(random: np.random.Generator, n: int, shape: tuple[int, int], *, rate: float, effect: float, words: float, templates: float,
             word_effect: float, template_effect: float) -> tuple[np.ndarray, np.ndarray]:
    """[n, word pair, template] answers before and after: logistic, with crossed random intercepts and effects (standard deviations)."""
    a, b = shape
    start = rate + words * random.normal(size=(n, a, 1)) + templates * random.normal(size=(n, 1, b))
    slope = effect + word_effect * random.normal(size=(n, a, 1)) + template_effect * random.normal(size=(n, 1, b))
    chance = [1 / (1 + np.exp(-logit)) for logit in (start, start + slope)]
    before, after = (random.random((n, a, b)) < p for p in chance)
    return before.astype(float), after.astype(float)


def p_values(change: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([n] clustered p-value, [n] McNemar's, [n, 2] clustered interval) of [n, word pair, template] changes."""
    labels = [index.ravel() for index in np.indices(change.shape[1:])]
    found = [clustered_test(one.ravel(), labels) for one in change]
    exact = [mcnemar_p(int((one < 0).sum()), int((one > 0).sum())) for one in change]
    return np.array([one.p for one in found]), np.array(exact), np.array([(one.low, one.high) for one in found])


def limit(n: int, nominal: float = 0.05) -> float:
    """The nominal rate and three Monte-Carlo standard errors."""
    return nominal + 3 * float(np.sqrt(nominal * (1 - nominal) / n))


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_no_effect_on_any_item_is_seldom_taken_for_one(shape: tuple[int, int]) -> None:
    before, after = simulate(np.random.default_rng(10), 800, shape, rate=2.0, effect=0, words=1, templates=1, word_effect=0,
                             template_effect=0)
    p, exact, _ = p_values(after - before)
    assert (p <= 0.05).mean() <= limit(800)
    assert (exact <= 0.05).mean() <= limit(800)


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_an_effect_that_only_differs_between_templates_fools_mcnemar_and_not_the_clustered_test(shape: tuple[int, int]) -> None:
    before, after = simulate(np.random.default_rng(11), 800, shape, rate=0.0, effect=0, words=1, templates=1, word_effect=0.5,
                             template_effect=1)
    p, exact, _ = p_values(after - before)
    assert (p <= 0.05).mean() <= limit(800)
    assert (exact <= 0.05).mean() > 0.15    # what taking the items as independent costs


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("spread", "seed"), [(0.0, 12), (0.5, 13), (1.0, 14)])
def test_intervals_cover_as_often_as_they_say(shape: tuple[int, int], spread: float, seed: int) -> None:
    setting = {"rate": 2.0, "effect": -1.5, "words": 1.0, "templates": 1.0, "word_effect": spread, "template_effect": spread}
    random = np.random.default_rng(seed)
    reference = simulate(random, 400_000, (1, 1), **setting)
    truth = float((reference[1] - reference[0]).mean())
    before, after = simulate(random, 800, shape, **setting)
    _, _, ends = p_values(after - before)
    covered = float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean())
    assert 0.92 <= covered <= 0.985


def test_where_counts_are_small_the_table_falls_back_on_the_exact_test_and_keeps_its_rate() -> None:
    before, after = simulate(np.random.default_rng(15), 200, (20, 4), rate=3.2, effect=0, words=0.5, templates=0.5, word_effect=0,
                             template_effect=0)
    found = pd.concat([paired_differences(answers(a - b, b), draws=2) for a, b in zip(after, before, strict=True)])
    assert (found["p"] <= 0.05).mean() <= limit(200)
    assert set(found["interval"]) == {"exact", "clustered"}
    assert (found.loc[found["interval"] == "exact", "n_discordant"] < FEWEST).all()
    assert ((found["low"] <= 0) & (found["high"] >= 0)).mean() >= 0.92


def test_holm_controls_the_family_wise_rate_and_bh_the_false_discoveries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)    # statsmodels' correction collects garbage at each of 800 calls: minutes
    random = np.random.default_rng(16)
    n, family = 400, 12
    effects = [-1.5 if i < 4 else 0.0 for i in range(family)]
    pairs = [simulate(random, n, (20, 6), rate=1, effect=effect, words=1, templates=0.5, word_effect=0, template_effect=0)
             for effect in effects]
    labels = [index.ravel() for index in np.indices((20, 6))]
    p = np.array([[clustered_test((after - before)[i].ravel(), labels).p for before, after in pairs] for i in range(n)])
    any_false, false_share, uncorrected = [], [], []
    for values in p:
        found = corrected(pd.DataFrame({"p": values}))
        claims = found["p_bh"].to_numpy() <= 0.05
        any_false.append((found["p_holm"].to_numpy()[4:] <= 0.05).any())
        uncorrected.append((values[4:] <= 0.05).any())
        false_share.append(claims[4:].sum() / max(claims.sum(), 1))
    assert np.mean(any_false) <= limit(n)
    assert np.mean(false_share) <= limit(n)
    assert np.mean(uncorrected) > np.mean(any_false)
