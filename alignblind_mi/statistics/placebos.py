"""Treatments beside the noise that does as much: rates over several draws of the noise, as a band, on the items that all of them answered.

One draw of noise says little of chance. Does NOT know how noise was made.
"""

import pandas as pd

from alignblind_mi.borders.settings import takes
from alignblind_mi.intervals.clustered import StatisticsError
from alignblind_mi.statistics.paired import ITEM

COLUMNS = ("treatment", "draws", "n", "untreated", "rate", "noise", "noise_low", "noise_high", "noise_sd", "displacement",
           "noise_displacement", "noise_displacement_low", "noise_displacement_high", "kl_prompts", "noise_kl", "noise_kl_low",
           "noise_kl_high")


@takes(StatisticsError)
def placebo_bands(rows: pd.DataFrame, *, untreated: str = "untreated") -> pd.DataFrame:
    """One row for each treatment that noise was drawn for: its implicit rate beside those of the draws, on the same items.

    rows: answers with the columns of `with_effects`; noise is what has a `placebo_of`. `n` items were asked under every draw and the
    treatment; draws: how many. untreated, rate, noise: stereotyped shares of valid answers to these items, of `noise` the mean over draws,
    with the least and largest (noise_low, noise_high) and the standard deviation between draws (noise_sd; no interval: draws are few).
    displacement (units of the stream) and kl_prompts (nats) of the treatment, then mean, least and largest of the draws. Empty for rows
    without noise.
    """
    if "placebo_of" not in rows:
        return pd.DataFrame(columns=list(COLUMNS))
    implicit = rows[rows["kind"] == "implicit"]
    known = [name for name in ITEM if name in implicit]
    implicit = implicit.assign(item=implicit[known].astype(str).agg("|".join, axis=1))
    names = implicit["placebo_of"].fillna("")
    records = [_band(implicit, str(name), untreated) for name in dict.fromkeys(names) if name]
    return pd.DataFrame.from_records(records, columns=list(COLUMNS))


def _band(rows: pd.DataFrame, name: str, untreated: str) -> dict[str, object]:
    drawn = {str(draw): some for draw, some in rows[rows["placebo_of"] == name].groupby("treatment", sort=False)}
    own = rows[rows["treatment"] == name]
    shared = set.intersection(*(set(some["item"]) for some in [*drawn.values(), *([own] if len(own) else [])]))
    rates = pd.Series([_rate(some, shared) for some in drawn.values()], dtype=float)
    record = {"treatment": name, "draws": len(drawn), "n": len(shared), "untreated": _rate(rows[rows["treatment"] == untreated], shared),
              "rate": _rate(own, shared), "noise": rates.mean(), "noise_low": rates.min(), "noise_high": rates.max(),
              "noise_sd": rates.std()}
    for column, short in (("displacement", "displacement"), ("kl_prompts", "kl")):
        each = pd.Series([some[column].iloc[0] for some in drawn.values()], dtype=float)
        record |= {column: own[column].iloc[0] if len(own) else float("nan"), f"noise_{short}": each.mean(),
                   f"noise_{short}_low": each.min(), f"noise_{short}_high": each.max()}
    return record


def _rate(rows: pd.DataFrame, items: set[str]) -> float:
    """The stereotyped share of valid answers to some items."""
    outcomes = rows.loc[rows["item"].isin(items), "outcome"]
    valid = outcomes[outcomes.isin(["stereotyped", "reversed"])]
    return float((valid == "stereotyped").mean()) if len(valid) else float("nan")
