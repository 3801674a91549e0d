"""Benefit against damage: which treatments are worth their side effects, and how much does each family
achieve for the same damage?

It reads one point per treatment: family, dose, benefit (with low and high), damage (0 and more). Untreated, at (0, 0), is on every
family's curve. It does NOT know what benefit and damage are, nor which treatment is which.

A family's curve joins its points in the order of their damage by straight lines (monotone between neighbours, no overshoot), and is never
drawn on beyond the largest damage measured. Damage is taken as measured, without error.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from alignblind_mi.intervals.clustered import LEVEL, StatisticsError
from alignblind_mi.statistics.rates import groups, require

COLUMNS = ("treatment", "family", "benefit", "low", "high", "damage")


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """The points with a column `pareto`: no other point, nor leaving the model untreated (0, 0), has as much benefit for as little damage.

    Points that tie in both are all on the frontier. Points without a benefit are not on it.

    Errors: StatisticsError for a missing column, or damage that is negative or missing.
    """
    _check(points, ("benefit", "damage"))
    benefit, damage = (np.append(points[name].to_numpy(float), 0.0) for name in ("benefit", "damage"))
    as_good = (benefit[None] >= benefit[:, None]) & (damage[None] <= damage[:, None])
    better = (benefit[None] > benefit[:, None]) | (damage[None] < damage[:, None])
    return points.assign(pareto=(~(as_good & better).any(1) & np.isfinite(benefit))[:-1])


def equal_damage(points: pd.DataFrame, at: Sequence[float] = (), *, against: str = "", level: float = LEVEL,
                 draws: Mapping[str, np.ndarray] | pd.DataFrame | None = None) -> pd.DataFrame:
    """What does each family achieve for the same damage? One row per damage and family: both, benefit, low, high, interval, reason.

    at: damages to compare at (default: all those measured, and 0 aside). against: a family; adds difference, difference_low,
    difference_high, the benefit less that family's. draws: treatment -> [draw] bootstrap benefits that share their resampling, such as
    minus `paired.difference_draws`. `interval` says which was done: "draws" interpolates every draw and takes quantiles, so that
    differences know what families have in common; "ends" interpolates low and high, and takes the worst case for differences: wider.
    Beyond what a family was measured at, all is NaN and `reason` says so. Of points with the same damage the most beneficial counts.

    Errors: StatisticsError for missing columns, values or draws, negative damage, an unknown family, or nothing to compare at.
    """
    _check(points, COLUMNS)
    families = list(points["family"].unique())
    if against and against not in families:
        raise StatisticsError(f"unknown family {against!r}; the points have: {', '.join(map(str, families))}.")
    missing = [name for name in points["treatment"] if draws is not None and name not in draws]
    if missing:
        raise StatisticsError(f"no draws for {missing[0]!r}: pass the draws of every treatment, or none.")
    where = sorted({float(x) for x in at} or {float(x) for x in points["damage"]} - {0.0})
    if not where or where[0] < 0:
        raise StatisticsError(f"no damage to compare at: expected numbers of at least 0 in `at`, or points with damage, not {list(at)}.")
    curves = {str(key["family"]): _Curve(group, draws) for key, group in groups(points, ["family"])}
    return pd.DataFrame.from_records([_record(x, name, curves, against, level) for x in where for name in curves])


class _Curve:
    """One family's benefit by damage: damages [point], benefits [point, value]; the values are estimate, low, high or estimate, draws."""

    def __init__(self, points: pd.DataFrame, draws: Mapping[str, np.ndarray] | pd.DataFrame | None) -> None:
        best = points.sort_values(["damage", "benefit"]).drop_duplicates("damage", keep="last")
        benefit, damage = best["benefit"].to_numpy(float), best["damage"].to_numpy(float)
        if draws is None:
            values = best[["benefit", "low", "high"]].to_numpy(float)
        else:
            values = np.column_stack([benefit, np.stack([np.asarray(draws[name], float) for name in best["treatment"]])])
        kept = (damage > 0) | (benefit > 0)    # else leaving the model untreated is as good
        start = np.zeros((0 if (damage[kept] == 0).any() else 1, values.shape[1]))
        self.drawn, self.damage, self.values = draws is not None, np.append(start[:, 0], damage[kept]), np.vstack([start, values[kept]])

    def at(self, damage: float) -> np.ndarray | None:
        """[value] at a damage; None beyond the largest one measured."""
        if damage > self.damage[-1]:
            return None
        right = int(np.clip(np.searchsorted(self.damage, damage), 1, max(len(self.damage) - 1, 1)))
        if len(self.damage) == 1:
            return self.values[0]
        share = (damage - self.damage[right - 1]) / (self.damage[right] - self.damage[right - 1])
        return (1 - share) * self.values[right - 1] + share * self.values[right]


def _record(damage: float, name: str, curves: Mapping[str, _Curve], against: str, level: float) -> dict[str, object]:
    curve, nan = curves[name], float("nan")
    found, other = curve.at(damage), curves[against].at(damage) if against else None
    benefit, low, high = _ends(found, curve.drawn, level) if found is not None else (nan, nan, nan)
    record: dict[str, object] = {"damage": damage, "family": name, "benefit": benefit, "low": low, "high": high,
                                 "interval": "draws" if curve.drawn else "ends",
                                 "reason": "" if found is not None else _beyond(name, damage, curves)}
    if not against:
        return record
    if found is None or other is None:
        return {**record, "difference": nan, "difference_low": nan, "difference_high": nan,
                "reason": record["reason"] or _beyond(against, damage, curves)}
    if curve.drawn or name == against:
        difference = _ends(found - other, curve.drawn, level)
    else:
        difference = (found[0] - other[0], found[1] - other[2], found[2] - other[1])
    return record | dict(zip(("difference", "difference_low", "difference_high"), map(float, difference), strict=True))


def _ends(values: np.ndarray, drawn: bool, level: float) -> tuple[float, float, float]:
    if not drawn:
        return float(values[0]), float(values[1]), float(values[2])
    known = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


def _beyond(name: str, damage: float, curves: Mapping[str, _Curve]) -> str:
    return f"{name} was measured up to a damage of {curves[name].damage[-1]:g}, not {damage:g}"


def _check(points: pd.DataFrame, columns: Sequence[str]) -> None:
    require(points, columns, numbers=[name for name in columns if name not in ("treatment", "family")])
    if points.empty:
        raise StatisticsError("there are no points: expected one row per treatment.")
    wrong = points.loc[~(points["damage"] >= 0), "damage"]
    if len(wrong):
        raise StatisticsError(f"damage is {float(wrong.iloc[0])}: expected numbers of at least 0, with 0 for the untreated model.")
