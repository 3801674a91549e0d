import numpy as np
import pandas as pd
import pytest

from alignblind_mi.intervals.clustered import StatisticsError, exact_interval, rate_interval
from alignblind_mi.statistics.rates import agreement, bounds, label_shares, position_effect, relative_change, require, summarise


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


def test_bounds_put_the_invalid_answers_on_either_side() -> None:
    assert bounds(112, 296, 560) == pytest.approx((0.2, 408 / 560))  # early LoRA of the paper: 20-73 %
    assert all(np.isnan(bounds(0, 0, 0)))


def test_summarise_counts_each_outcome_once() -> None:
    table = summarise(rows(["stereotyped"] * 6 + ["reversed"] * 2 + ["invalid"] * 4))
    assert len(table) == 1
    row = table.iloc[0]
    assert row[["n", "stereotyped", "reversed", "rejected", "invalid"]].tolist() == [12, 6, 2, 0, 4]
    assert (row["rate"], row["invalid_share"], row["worst"], row["best"]) == pytest.approx((0.75, 1 / 3, 0.5, 10 / 12))
    labels = np.repeat(np.arange(6), 2), np.tile(np.arange(2), 6)
    hits, valid = np.array([1.0] * 6 + [0.0] * 6), np.array([1.0] * 8 + [0.0] * 4)
    assert (row["low"], row["high"], row["interval"]) == rate_interval(hits, labels, valid=valid)
    assert row["clustered_over"] == "word_pair+template"
    assert (row["template_min"], row["template_max"]) == (0.75, 0.75)


def test_explicit_rate_is_over_all_but_invalid_and_bounds_mean_endorsing() -> None:
    row = summarise(rows(["stereotyped"] * 2 + ["reversed"] + ["rejected"] * 5 + ["invalid"] * 2, kind="explicit")).iloc[0]
    assert (row["rate"], row["worst"], row["best"]) == pytest.approx((2 / 8, 2 / 10, 4 / 10))


def test_groups_without_valid_answers_have_no_rate() -> None:
    row = summarise(rows(["invalid"] * 4)).iloc[0]
    assert np.isnan(row[["rate", "template_min", "template_max"]].astype(float)).all()
    assert row[["low", "high", "interval", "worst", "best"]].tolist() == [0, 1, "none", 0, 1]
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


def test_rates_of_templates_stand_beside_the_rate() -> None:
    row = summarise(rows(["stereotyped", "reversed"] * 5 + ["stereotyped", "invalid"])).iloc[0]
    assert (row["rate"], row["template_min"], row["template_max"]) == (pytest.approx(6 / 11), 0, 1)
    assert row["high"] - row["low"] > 0.9    # two templates that could not differ more
    alone = summarise(rows(["stereotyped", "reversed"] * 5), cluster=()).iloc[0]
    assert (alone["low"], alone["high"], alone["interval"]) == (*exact_interval(5, 10), "exact")
    assert np.isnan(summarise(rows(["stereotyped"] * 4).drop(columns="template"), cluster=("word_pair",)).iloc[0]["template_min"])


def test_shares_of_labels_are_clustered_as_they_are_read() -> None:
    found = label_shares(["a", "b", "a", "a"], ["a", "c"], [np.array([0, 0, 1, 1])])
    assert (found["a"], found["a_share"], found["c"]) == (3, 0.75, 0)
    assert (found["a_low"], found["a_high"]) == rate_interval(np.array([1.0, 0, 1, 1]), [np.array([0, 0, 1, 1])])[:2]


def test_a_relative_change_is_of_what_both_have_and_clustered_over_templates_too() -> None:
    random, n = np.random.default_rng(0), 60
    table = pd.DataFrame({"context": [f"c{i % 20}" for i in range(n)], "template": [f"t{i % 20 // 5}" for i in range(n)]})
    before = table.assign(p_group=random.uniform(0.4, 0.8, n))
    after = before.assign(p_group=0.5 * before["p_group"])
    half = relative_change(after, before, "p_group", ("context", "template"))
    assert half == pytest.approx({"estimate": -0.5, "low": -0.5, "high": -0.5, "n": 20})
    by_template = before.assign(p_group=before["p_group"] * before["template"].map({"t0": 0.1, "t1": 0.4, "t2": 0.6, "t3": 0.9}))
    wide = relative_change(by_template, before, "p_group", ("context", "template"))
    narrow = relative_change(by_template, before, "p_group", "context")
    assert -1 <= wide["low"] < narrow["low"] < wide["estimate"] == pytest.approx(narrow["estimate"])
    expected = by_template["p_group"].mean() / before["p_group"].mean() - 1
    assert wide["estimate"] == pytest.approx(expected)
    fewer = relative_change(by_template[by_template["context"] != "c3"], before, "p_group", "context")
    assert fewer["n"] == 19
    assert np.isnan(relative_change(after, before.assign(p_group=0.0), "p_group", "context")["estimate"])


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
