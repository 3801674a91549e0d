import numpy as np
import pandas as pd
import pytest

from alignblind_mi.statistics.frontier import equal_damage, pareto
from alignblind_mi.statistics.rates import StatisticsError


def points(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    """Points of (treatment, family, benefit, damage), with low and high 0.1 around the benefit."""
    table = pd.DataFrame(rows, columns=["treatment", "family", "benefit", "damage"])
    return table.assign(low=table["benefit"] - 0.1, high=table["benefit"] + 0.1)


POINTS = points(("s1", "steering", 0.2, 0.1), ("s2", "steering", 0.4, 0.3), ("l1", "lora", 0.3, 0.4), ("l0", "lora", 0.1, 0.05))


def row(table: pd.DataFrame, damage: float, family: str) -> pd.Series:
    return table[(table["damage"] == damage) & (table["family"] == family)].iloc[0]


def test_the_frontier_by_hand() -> None:
    assert pareto(POINTS)["pareto"].tolist() == [True, True, False, True]
    assert pareto(points(("a", "f", -0.1, 0.0), ("b", "f", 0.0, 0.1), ("c", "f", float("nan"), 0.1)))["pareto"].tolist() == [False] * 3
    assert pareto(points(("a", "f", 0.2, 0.1), ("b", "g", 0.2, 0.1), ("c", "g", 0.2, 0.2)))["pareto"].tolist() == [True, True, False]


def test_equal_damage_by_hand() -> None:
    found = equal_damage(POINTS, [0.2, 0.05, 0.4], against="lora")
    half = row(found, 0.2, "steering")
    assert half[["benefit", "low", "high"]].tolist() == pytest.approx([0.3, 0.2, 0.4])
    lora = 0.1 + 0.2 * (0.2 - 0.05) / 0.35
    assert half[["difference", "difference_low", "difference_high"]].tolist() == pytest.approx([0.3 - lora, 0.1 - lora, 0.5 - lora])
    assert half["interval"] == "ends"
    start = row(found, 0.05, "steering")    # half way from the untreated point, where there is no uncertainty
    assert start[["benefit", "low", "high"]].tolist() == pytest.approx([0.1, 0.05, 0.15])
    assert row(found, 0.2, "lora")[["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]


def test_nothing_is_said_beyond_what_was_measured() -> None:
    found = equal_damage(POINTS, against="steering")
    assert sorted(set(found["damage"])) == [0.05, 0.1, 0.3, 0.4]
    beyond = row(found, 0.4, "steering")
    assert beyond[["benefit", "low", "high", "difference", "difference_low", "difference_high"]].isna().all()
    assert beyond["reason"] == "steering was measured up to a damage of 0.3, not 0.4"
    lora = row(found, 0.4, "lora")
    assert lora["benefit"] == pytest.approx(0.3)
    assert np.isnan(lora["difference"])
    assert "steering was measured up to" in lora["reason"]
    assert (found.loc[found["damage"] < 0.4, "reason"] == "").all()


def test_draws_know_what_families_share() -> None:
    common = np.random.default_rng(0).normal(0, 0.1, 4000)
    draws = {name: benefit + common * (2 if name.startswith("s") else 1)
             for name, benefit in zip(POINTS["treatment"], POINTS["benefit"], strict=True)}
    found = row(equal_damage(POINTS, [0.3], against="lora", draws=draws), 0.3, "steering")
    assert found["interval"] == "draws"
    assert (found["low"], found["high"]) == pytest.approx((0.4 - 0.392, 0.4 + 0.392), abs=0.02)
    width = found["difference_high"] - found["difference_low"]    # 2 - 1 of the common part, and not 2 + 1
    assert width == pytest.approx(2 * 0.196, abs=0.03)
    table = equal_damage(POINTS, [0.3], against="lora", draws=pd.DataFrame(draws))
    assert row(table, 0.3, "steering").equals(found)


def test_points_without_damage_and_ties() -> None:
    free = equal_damage(points(("a", "f", 0.2, 0.0), ("b", "f", 0.4, 0.2), ("c", "f", 0.3, 0.2), ("d", "g", -0.1, 0.0)), [0.0, 0.1, 0.2])
    assert [row(free, x, "f")["benefit"] for x in (0.0, 0.1, 0.2)] == pytest.approx([0.2, 0.3, 0.4])
    assert row(free, 0.0, "g")["benefit"] == 0    # leaving the model untreated is better than that
    assert np.isnan(row(free, 0.1, "g")["benefit"])


@pytest.mark.parametrize(("change", "options", "said"), [
    ({"damage": -0.1}, {}, r"damage is -0\.1: expected numbers of at least 0"),
    ({"damage": float("nan")}, {}, "damage is nan"),
    ({}, {"against": "prompt"}, "unknown family 'prompt'; the points have: steering, lora"),
    ({}, {"draws": {"s1": np.zeros(3)}}, "no draws for 's2'"),
    ({"damage": 0.0}, {}, "no damage to compare at"),
    ({}, {"at": [-1.0]}, "no damage to compare at"),
])
def test_what_cannot_be_compared_is_said(change: dict, options: dict, said: str) -> None:
    with pytest.raises(StatisticsError, match=said):
        equal_damage(POINTS.assign(**change), **options)
    with pytest.raises(StatisticsError, match="no column 'benefit'"):
        pareto(POINTS.drop(columns="benefit"))
    with pytest.raises(StatisticsError, match="there are no points"):
        pareto(POINTS[:0])
