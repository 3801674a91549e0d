import numpy as np
import pandas as pd
import pytest
from scipy import stats

from alignblind_mi.intervals.clustered import StatisticsError, change_test, rate_interval
from alignblind_mi.statistics.paired import (
    corrected,
    difference_draws,
    item_slopes,
    paired,
    paired_differences,
    paired_means,
    summarise_slopes,
)

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
    change, valid = np.array([0, -1, -1, -1, 0, 0, 1, 0]), np.array([1.0, 1, 1, 1, 0, 1, 1, 0])
    found = change_test(change, [np.repeat(np.arange(4), 2), np.tile(np.arange(2), 4)], valid=valid)
    assert (row["difference"], row["low"], row["high"], row["p"]) == pytest.approx(found)
    assert row["low"] < -2 / 6 < row["high"]
    assert row["p"] > 0.05
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
    assert row[["difference", "rate", "p"]].isna().all()
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


# --- draws ----------------------------------------------------------------------------------------------------------------------------


def test_draws_are_as_wide_as_the_interval_of_the_difference() -> None:
    random = np.random.default_rng(3)
    before = (random.random((20, 6)) < 0.9).astype(float)
    rows = answers(np.where(random.random((20, 6)) < 0.3, -before, 0), before)
    row, draws = paired_differences(rows).iloc[0], difference_draws(rows, seed=5)["aware"]
    low, high = draws.quantile([0.025, 0.975])
    assert high - low == pytest.approx(row["high"] - row["low"])
    assert draws.mean() == pytest.approx(row["difference"], abs=0.1 * (row["high"] - row["low"]))
    assert (difference_draws(rows, seed=5)["aware"] == draws).all()
    still = difference_draws(both("s" * 24, "s" * 24, n_templates=4), draws=500)["aware"]    # no item changed
    assert 0.1 < still.quantile(0.975) - still.quantile(0.025) < 2


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
    assert (row["wrong_low"], row["wrong_high"]) == rate_interval(np.array([0.0, 1, 0]), [np.array([0, 0, 1]), np.array([0, 1, 0])])[:2]
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


# --- error rates, by simulation (those of the test itself: tests/test_intervals.py) ----------------------------------------------------


def test_holm_controls_the_family_wise_rate_and_bh_the_false_discoveries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)    # statsmodels' correction collects garbage at each of 800 calls: minutes
    random = np.random.default_rng(16)
    n, family = 400, 12
    effects = np.array([0.7 if i < 4 else 0.0 for i in range(family)])
    p = stats.ttest_1samp(effects[:, None] + random.normal(size=(n, family, 24)), 0, axis=2).pvalue
    any_false, false_share, uncorrected = [], [], []
    for values in p:
        found = corrected(pd.DataFrame({"p": values}))
        claims = found["p_bh"].to_numpy() <= 0.05
        any_false.append((found["p_holm"].to_numpy()[4:] <= 0.05).any())
        uncorrected.append((values[4:] <= 0.05).any())
        false_share.append(claims[4:].sum() / max(claims.sum(), 1))
    assert np.mean(any_false) <= 0.05 + 3 * (0.05 * 0.95 / n) ** 0.5
    assert np.mean(false_share) <= 0.05 + 3 * (0.05 * 0.95 / n) ** 0.5
    assert np.mean(uncorrected) > np.mean(any_false)
