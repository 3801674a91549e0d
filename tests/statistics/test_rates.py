import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from alignblind_mi.statistics.rates import (
    StatisticsError,
    agreement,
    bounds,
    clustered_interval,
    exact_interval,
    mean_interval,
    position_effect,
    relative_change,
    require,
    summarise,
    t_interval,
)


def rows(outcomes: list[str], **columns: object) -> pd.DataFrame:
    n = len(outcomes)
    base = {
        "model": "m",
        "treatment": "t",
        "kind": "implicit",
        "template": [f"t{i % 2}" for i in range(n)],
        "word_pair": [f"w{i // 2}" for i in range(n)],
    }
    return pd.DataFrame({"outcome": outcomes, **base, **columns})


def test_exact_interval_is_the_textbook_one() -> None:
    assert exact_interval(8, 10) == pytest.approx((0.4439, 0.9748), abs=1e-4)  # a standard table of binomial limits
    assert exact_interval(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert exact_interval(0, 0) == (0.0, 1.0)
    assert exact_interval(3, 10, level=0.5).low > exact_interval(3, 10).low


@given(st.integers(0, 60), st.integers(0, 60))
def test_exact_interval_contains_the_share_and_mirrors(successes: int, failures: int) -> None:
    n = successes + failures
    low, high = exact_interval(successes, n)
    assert 0 <= low <= (successes / n if n else 0.5) <= high <= 1
    assert exact_interval(failures, n) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("successes", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95.0)])
def test_impossible_counts_are_refused(successes: int, n: int, level: float) -> None:
    with pytest.raises(StatisticsError, match=rf"{successes} of {n} at level {level}"):
        exact_interval(successes, n, level)


def test_bounds_put_the_invalid_answers_on_either_side() -> None:
    assert bounds(112, 296, 560) == pytest.approx((0.2, 408 / 560))  # early LoRA of the paper: 20-73 %
    assert all(np.isnan(bounds(0, 0, 0)))


def crossed(random: np.random.Generator, n_pairs: int = 24, n_templates: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """0/1 answers whose chance depends on word pair and template; mean chance 0.5."""
    pair, template = (index.ravel() for index in np.meshgrid(np.arange(n_pairs), np.arange(n_templates), indexing="ij"))
    logit = random.normal(0, 1, n_pairs)[pair] + random.normal(0, 1, n_templates)[template]
    return (random.random(logit.size) < 1 / (1 + np.exp(-logit))).astype(float), pair, template


def test_intervals_cover_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    independent = [exact_interval(int(random.binomial(200, 0.3)), 200) for _ in range(1000)]
    assert 0.945 <= np.mean([low <= 0.3 <= high for low, high in independent]) <= 1.0
    clustered, exact = [], []
    for seed in range(300):
        values, pair, template = crossed(random)
        clustered.append(mean_interval(values, [pair, template], draws=400, seed=seed))
        exact.append(exact_interval(int(values.sum()), len(values)))
    covered = [np.mean([low <= 0.5 <= high for low, high in found]) for found in (clustered, exact)]
    assert 0.90 <= covered[0] <= 0.99
    assert covered[1] < 0.75  # what ignoring the clusters costs


def test_clustered_interval_is_seeded_and_does_not_depend_on_the_order_of_rows() -> None:
    values, pair, template = crossed(np.random.default_rng(2))
    first = mean_interval(values, [pair, template], seed=3)
    assert first == mean_interval(values, [pair, template], seed=3)
    assert first != mean_interval(values, [pair, template], seed=4)
    assert first.low < values.mean() < first.high
    assert mean_interval(values + 5, [pair, template], seed=3) == pytest.approx(np.array(first) + 5)


def test_clusters_without_variation_add_nothing() -> None:
    values, pair, template = crossed(np.random.default_rng(2))
    alone = np.zeros(len(values))
    assert mean_interval(values, [pair, alone]) == mean_interval(values, [pair])
    assert np.isnan(mean_interval(values, [alone])).all()
    assert np.isnan(mean_interval(values[:0], [pair[:0]])).all()
    within = mean_interval(values, [np.arange(len(values))])  # every row its own cluster: the plain bootstrap
    both = mean_interval(values, [pair, template])
    assert both.high - both.low > 1.5 * (within.high - within.low)


def test_share_is_taken_among_the_valid() -> None:
    values, pair, template = crossed(np.random.default_rng(5))
    valid = np.random.default_rng(6).random(len(values)) < 0.7
    found = clustered_interval(values, [pair, template], valid=valid, seed=1)
    assert found == clustered_interval(np.where(valid, values, 1 - values), [pair, template], valid=valid, seed=1)
    assert found.low < values[valid].mean() < found.high


def test_summarise_counts_each_outcome_once() -> None:
    table = summarise(rows(["stereotyped"] * 6 + ["reversed"] * 2 + ["invalid"] * 4))
    assert len(table) == 1
    row = table.iloc[0]
    assert row[["n", "stereotyped", "reversed", "rejected", "invalid"]].tolist() == [12, 6, 2, 0, 4]
    assert (row["rate"], row["invalid_share"], row["worst"], row["best"]) == pytest.approx((0.75, 1 / 3, 0.5, 10 / 12))
    assert (row["low"], row["high"]) == pytest.approx(exact_interval(6, 8))
    assert row["cluster_low"] < 0.75 < row["cluster_high"]
    assert row["clustered_over"] == "word_pair+template"


def test_explicit_rate_is_over_all_but_invalid_and_bounds_mean_endorsing() -> None:
    row = summarise(rows(["stereotyped"] * 2 + ["reversed"] + ["rejected"] * 5 + ["invalid"] * 2, kind="explicit")).iloc[0]
    assert (row["rate"], row["worst"], row["best"]) == pytest.approx((2 / 8, 2 / 10, 4 / 10))


def test_groups_without_valid_answers_have_no_rate() -> None:
    row = summarise(rows(["invalid"] * 4)).iloc[0]
    assert np.isnan(row[["rate", "cluster_low", "cluster_high"]].astype(float)).all()
    assert row[["low", "high", "worst", "best"]].tolist() == [0, 1, 0, 1]
    assert row["clustered_over"] == ""


def test_summarise_keeps_order_and_says_what_is_wrong() -> None:
    mixed = pd.concat([rows(["stereotyped"] * 2, model="z"), rows(["rejected"] * 2, model="a", kind="explicit")])
    assert summarise(mixed)["model"].tolist() == ["z", "a"]
    assert summarise(mixed.iloc[:0]).empty
    with pytest.raises(StatisticsError, match=r"mixes the kinds implicit, explicit.*add 'kind'"):
        summarise(mixed, by=())
    with pytest.raises(StatisticsError, match=r"no column 'colour'; they have: .*template"):
        summarise(mixed, by=("colour", "kind"))
    with pytest.raises(StatisticsError, match=r"unknown outcome.*maybe"):
        summarise(rows(["maybe"]))


def answers(chance_stereotyped: float, chance_first: float, orders: list[tuple[str, str]], n: int = 4000) -> pd.DataFrame:
    """Answers of a model that follows meaning with one chance and else position with the other."""
    random = np.random.default_rng(0)
    option, word = zip(*(orders[i % len(orders)] for i in range(n)), strict=True)
    agrees = (np.array(option) == "marked_first") == (np.array(word) == "negative_first")
    by_position = np.where(random.random(n) < chance_first, agrees, ~agrees)
    stereotyped = np.where(random.random(n) < 0.5, random.random(n) < chance_stereotyped, by_position)
    return rows(list(np.where(stereotyped, "stereotyped", "reversed")), option_order=option, word_order=word, template="t")


BALANCED = [(option, word) for option in ("marked_first", "unmarked_first") for word in ("positive_first", "negative_first")]


def test_position_and_association_separate_in_a_balanced_design() -> None:
    biased = position_effect(answers(1.0, 0.5, BALANCED)).iloc[0]
    assert biased["rate"] == pytest.approx(0.75, abs=0.03)
    assert biased["position_low"] < 0.5 < biased["position_high"]
    positional = position_effect(answers(0.5, 1.0, BALANCED)).iloc[0]
    assert positional["position"] == pytest.approx(0.75, abs=0.03)
    assert positional["low"] < 0.5 < positional["high"]
    assert not biased["confounded"]


def test_the_published_orders_are_confounded() -> None:
    for option, word in BALANCED:
        found = position_effect(answers(0.5, 1.0, [(option, word)])).iloc[0]
        assert found["confounded"]
        assert found["position"] in (found["rate"], pytest.approx(1 - found["rate"]))


def test_position_effect_is_per_template_and_of_implicit_rows_only() -> None:
    table = pd.concat([answers(1, 0.5, BALANCED, 40), answers(1, 0.5, BALANCED, 40).assign(template="u", model="n")])
    explicit = table.assign(kind="explicit")
    found = position_effect(pd.concat([table, explicit]), by=("model",))
    assert found[["model", "template", "n"]].values.tolist() == [["m", "t", 40], ["n", "u", 40]]


def test_agreement_is_cohens_kappa() -> None:
    first, second = ["a"] * 25 + ["b"] * 25, ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15  # the example of Wikipedia: 0.4
    assert agreement(first, second) == pytest.approx(0.4)
    assert agreement(first, first) == 1
    assert agreement(["a", "b"], ["b", "c"]) < 0
    assert np.isnan(agreement(["a", "a"], ["a", "a"]))
    with pytest.raises(StatisticsError, match="2 with 1"):
        agreement(["a", "b"], ["a"])


@pytest.mark.parametrize(("values", "labels", "said"), [
    (["1", "2"], ["a", "b"], "numbers alone"), ([1.0, "b"], ["a", "b"], "numbers alone"), ([1.0, 2.0], ["a", "b", "c"], "2 values have 3"),
    ([1.0, 2.0, 3.0], ["a", "b"], "3 values have 2"), ([1.0, 2.0], ["a", None], "1 of 2 cluster labels are missing")])
def test_values_and_clusters_that_do_not_fit_are_said(values, labels, said) -> None:
    data, clusters = np.array(values, dtype=object), np.array(labels, dtype=object)
    for find, each in ((mean_interval, [clusters]), (t_interval, clusters), (clustered_interval, [clusters])):
        with pytest.raises(StatisticsError, match=said):
            find(data, each)


def test_what_is_valid_is_said_of_every_value() -> None:
    with pytest.raises(StatisticsError, match="2 values have 3 entries"):
        clustered_interval(np.ones(2), [np.array(["a", "b"])], valid=np.ones(3))


def test_columns_that_cannot_be_computed_with_are_said() -> None:
    table = pd.DataFrame({"p_group": [0.1, 0.2], "context": ["a", "b"], "outcome": ["stereotyped", "maybe"]})
    twice = pd.concat([table, table[["context"]]], axis=1)
    for wrong, columns, numbers, said in (
        (twice, ["p_group"], [], "'context' twice"), (table, ["outcome"], [], r"\['maybe'\]"), (table, ["kind"], [], "no column 'kind'"),
        (table, ["context"], ["context"], "'context' must hold numbers")):
        with pytest.raises(StatisticsError, match=said):
            require(wrong, columns, numbers=numbers)
    require(table, ["p_group", "context"], numbers=["p_group"])
    with pytest.raises(StatisticsError, match="'context' must hold numbers"):
        relative_change(table, table, "context", "p_group")


def test_an_outcome_that_is_not_known_is_said_without_numpys_types():
    rows = pd.DataFrame({"kind": ["implicit"], "outcome": [np.nan], "word_pair": ["a"], "template": ["t"]})
    with pytest.raises(StatisticsError, match=r"^unknown outcome\(s\) \[nan\]; known: "):
        summarise(rows, by=())
