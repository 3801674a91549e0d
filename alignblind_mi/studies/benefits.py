"""Benefit and damage of every treatment of a comparison: points, the frontier, doses, and what the same damage buys.

Tables to tables. It does NOT know parts or folders, nor what is claimed.
"""

from typing import Any

import numpy as np
import pandas as pd

from alignblind_mi.statistics.frontier import equal_damage, pareto
from alignblind_mi.statistics.paired import difference_draws
from alignblind_mi.studies.audit import rows_by

BASE = "base"    # what the untreated base model is called among the treatments
DAMAGES = ("kl_neutral", "kl_mentions", "wrong", "invalid")
ACCURACIES = {"other_questions": "colour_accuracy", "copying": "copy_accuracy", "judging": "judging_accuracy",
              "group_questions": "group_accuracy"}
POINT_COLUMNS = ("damage_measure", "treatment", "family", "curve", "dose", "benefit", "low", "high", "damage", "pareto")
FORGETTING = "unlearning"


def benefit_of(rate: Any, untreated: Any) -> Any:
    """How much nearer to even (0.5) rates are than the untreated ones: a reversed bias is no benefit.

    Both are rates of the same items, those that are valid under the treatment and untreated (`rate` and `rate_baseline` of
    `paired_differences`): else answers that became invalid would count as a benefit or a loss.
    """
    return np.abs(np.asarray(untreated) - 0.5) - np.abs(np.clip(rate, 0.0, 1.0) - 0.5)


def points_table(table: pd.DataFrame, differences: pd.DataFrame, draws: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row per treatment and damage measure: benefit with its interval, damage, and whether it is on the Pareto frontier.

    draws: bootstrap benefits by treatment.
    """
    rows = rows_by(table)
    treated = {name: row for name, row in rows.items() if name not in (BASE, "untreated")}
    if not treated:
        return pd.DataFrame(columns=list(POINT_COLUMNS))
    untreated, paired = rows["untreated"], rows_by(differences[differences["kind"] == "implicit"])
    parts = []
    for measure in DAMAGES:
        records = []
        for name, row in treated.items():
            low, high = np.nanquantile(draws[name], [0.025, 0.975])
            benefit = benefit_of(paired[name]["rate"], paired[name]["rate_baseline"])
            records.append({"damage_measure": measure, "treatment": name, "family": row["family"], "curve": row["curve"],
                            "dose": row["dose"], "benefit": float(benefit),
                            "low": float(low), "high": float(high), "damage": _damage(measure, row, untreated)})
        parts.append(pareto(pd.DataFrame.from_records(records)))
    return pd.concat(parts, ignore_index=True)


def _damage(measure: str, row: dict[str, Any], untreated: dict[str, Any]) -> float:
    """kl: nats a token; wrong: right answers lost of the measure that loses most; invalid: answers that became so, implicit or explicit."""
    if measure == "invalid":
        return more_invalid(row, untreated)
    if measure == "wrong":
        return max(0.0, *(float(untreated[name] - row[name]) for name in ACCURACIES.values()))
    return float(row[measure])


def more_invalid(row: dict[str, Any], untreated: dict[str, Any]) -> float:
    """By how much the share of invalid answers rose, of implicit or explicit ones, whichever rose more; 0 at least."""
    return max(0.0, *(float(row[name] - untreated[name]) for name in ("invalid_share", "explicit_invalid_share")))


def benefit_draws(implicit: pd.DataFrame, paired: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Benefits by treatment that share their resampling of word pairs and templates; none where nothing was tried.

    implicit: the aligned model's implicit answers; paired: their differences from untreated. A treatment's draws start from the untreated
    rate of the items that it shares (`rate_baseline`).
    """
    if implicit["treatment"].nunique() < 2:
        return {}
    draws = difference_draws(implicit)
    start = {str(name): float(paired[str(name)]["rate_baseline"]) for name in draws.columns}
    return {name: benefit_of(rate + draws[name].to_numpy(float), rate) for name, rate in start.items()}


def equal_damage_table(points: pd.DataFrame, draws: dict[str, np.ndarray]) -> pd.DataFrame:
    """Benefit of every dose curve at the same damage, each against unlearning where it was measured; no extrapolation.

    draws: bootstrap benefits by treatment.
    """
    dosed = points[points["curve"] != ""]
    if dosed.empty:
        return pd.DataFrame(columns=["damage_measure", "damage", "family", "benefit", "low", "high", "reason"])
    parts = []
    for measure, some in dosed.groupby("damage_measure", sort=False):
        curves = some.assign(family=some["curve"])
        if not (curves["damage"] > 0).any():
            continue
        against = FORGETTING if FORGETTING in set(curves["family"]) else ""
        parts.append(equal_damage(curves, against=against, draws={name: draws[name] for name in curves["treatment"]}).assign(
            damage_measure=measure))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["damage_measure", "damage", "family", "benefit"])


def doses_table(table: pd.DataFrame) -> pd.DataFrame:
    """The points of every dose curve, dose 0 (untreated) included."""
    untreated = table[table["treatment"] == "untreated"]
    curves = [name for name in dict.fromkeys(table["curve"]) if name]
    columns = ["curve", "dose", "treatment", "n", "implicit", "low", "high", "invalid_share", "kl_neutral", "kl_mentions",
               *ACCURACIES.values()]
    parts = [pd.concat([untreated.assign(curve=name, dose=0.0), table[table["curve"] == name]]).sort_values("dose") for name in curves]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
