"""Readings on the scale of their anchors: 0 where the sentence settles the group sense, 1 where it settles the other one.

So models, instruments and settings can be laid side by side whose raw readings have other units. The ends are measured, and the interval
carries their uncertainty. This module does NOT know how anything is read.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from alignblind_mi.borders.settings import Names, takes
from alignblind_mi.intervals.clustered import LEVEL, Interval, independent_half_width, mean_interval
from alignblind_mi.measures.awareness import READ_OVER
from alignblind_mi.models.spec import ModelError
from alignblind_mi.statistics.rates import groups, require


class Mean(NamedTuple):
    """A mean and half the width of its 95 % interval."""

    value: float
    half: float


@takes(ModelError)
def scale_table(rows: pd.DataFrame, by: Names = ("model", "treatment")) -> pd.DataFrame:
    """Where the ambiguous prompts lie between the two senses, from the rows of `measure_instruments`: a row a group, instrument, setting.

    Columns: `by`, instrument, setting, n (ambiguous contexts), n_anchors (sentences), reading (mean of the ambiguous prompts), mean_group,
    mean_other (of the sentences that settle a sense) in the instrument's own unit, scale = (reading - mean_group) / (mean_other -
    mean_group), low, high (95 %: see `scale_interval`; no bound where the anchors are not surely apart). 0: read as the group, 1: as the
    other sense. Means are over layers. Rows without ambiguous prompts give no row.

    Errors: StatisticsError for a missing column.
    """
    needed = ("instrument", "setting", "split", "sense", "sentence", *READ_OVER, "layer", "score", "blind")
    if "context" not in rows:    # a version that read no ambiguous prompts
        return pd.DataFrame()
    require(rows, [*by, *needed])
    read = rows[rows["split"].isin(["test", "ambiguous"])]
    records = [{**key, **_placed(group)} for key, group in groups(read, (*by, "instrument", "setting"))
               if (group["split"] == "ambiguous").any()]
    return pd.DataFrame.from_records(records)


def _placed(rows: pd.DataFrame) -> dict[str, Any]:
    column = "score" if rows["instrument"].iloc[0] == "probe" else "blind"    # a probe's projection ends nowhere
    rows = rows.dropna(subset=[column])
    asked, anchors = rows[rows["split"] == "ambiguous"], rows[rows["split"] == "test"]
    read = _mean(asked, column, READ_OVER)
    group, other = (_mean(anchors[anchors["sense"] == sense], column, ("sentence",)) for sense in ("group", "other"))
    apart = other.value - group.value
    low, high = scale_interval(read, group, other)
    return {"n": len(asked[list(READ_OVER)].drop_duplicates()), "n_anchors": anchors["sentence"].nunique(), "reading": read.value,
            "mean_group": group.value, "mean_other": other.value, "scale": (read.value - group.value) / apart if apart else math.nan,
            "low": low, "high": high}


def _mean(rows: pd.DataFrame, column: str, unit: Sequence[str]) -> Mean:
    """Over layers first. Readings that are labels (SelfIE) are never surer than independent ones: see `awareness.blind_interval`."""
    if rows.empty:
        return Mean(math.nan, math.nan)
    units = rows.groupby(list(unit), as_index=False)[column].mean()
    values = units[column].to_numpy(float)
    low, high = mean_interval(values, [units[name].to_numpy() for name in unit])
    labels = bool((rows[column] % 1 == 0).all())
    return Mean(float(values.mean()), max((high - low) / 2, independent_half_width(values, LEVEL) if labels else 0.0))


def scale_interval(read: Mean, group: Mean, other: Mean) -> Interval:
    """The places t on the scale for which read = (1 - t) group + t other is not refuted, all three means being uncertain.

    Fieller's (1954) interval of a ratio, with half-widths in the place of standard errors (so each mean keeps its own Student's quantile):
    |read - (1 - t) group - t other| <= root(h_read^2 + (1 - t)^2 h_group^2 + t^2 h_other^2). (-inf, inf) where the two anchors are not
    surely apart; NaN where a mean has no interval.
    """
    if any(map(math.isnan, (*read, *group, *other))):
        return Interval(math.nan, math.nan)
    gap, apart = read.value - group.value, other.value - group.value
    # (gap - t apart)^2 <= r + (1 - t)^2 g + t^2 o, as a quadratic in t.
    r, g, o = read.half**2, group.half**2, other.half**2
    a, b, c = apart**2 - g - o, gap * apart - g, gap**2 - r - g
    if a <= 0:
        return Interval(-math.inf, math.inf)
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Interval((b - root) / a, (b + root) / a)


def scale_difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, Interval]:
    """Two places on the scale, `other` less `one` (rows of `scale_table`), and the interval: of Zou and Donner (2008, Statistics in
    Medicine 27, 1693-1702), from both own intervals, taken as independent."""
    change = other["scale"] - one["scale"]
    down, up = ((one["high"] - one["scale"], other["scale"] - other["low"]), (one["scale"] - one["low"], other["high"] - other["scale"]))
    return float(change), Interval(float(change - np.hypot(*down)), float(change + np.hypot(*up)))
