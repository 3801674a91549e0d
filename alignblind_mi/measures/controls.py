"""Readings held against their controls. Does NOT know how a reading is made, nor what is concluded from it."""

from collections.abc import Sequence

import pandas as pd

from alignblind_mi.measures.awareness import READING, blind_interval, n_readings, readings_of
from alignblind_mi.measures.sources import NEGATIVE_CONTROLS

READ_AT = [*READING, "template", "layer"]    # what a reading and its controls have in common


def beyond(own: pd.DataFrame, control: pd.DataFrame, column: str = "blind") -> pd.DataFrame:
    """Readings with what their control leaves of a column, `less`: those that were read at the same place and layer as it."""
    both = own.merge(control[[*READ_AT, column]], on=READ_AT, suffixes=("", "_control"))
    return both.assign(less=both[column] - both[f"{column}_control"]).dropna(subset=["less"])


def less_controls(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Readings less those of their controls, where there are any: one row per group, of the control that leaves the least.

    A reading is held against the random vector, or the token before it, that was read at the same place and layer
    (`sources.NEGATIVE_CONTROLS`): where these read alike, the instrument says nothing of the identifiers. Columns: `by`, against (the
    control), n (readings), less, less_low, less_high (95 %, `blind_interval`).
    """
    records = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        own = readings_of(group)
        found: list[tuple[float, dict[str, object]]] = []
        for control in NEGATIVE_CONTROLS:
            less = beyond(own, readings_of(group, control))
            if len(less):
                low, high = blind_interval(less, "less")
                mean = float(less["less"].mean())
                found.append((abs(mean), {"against": control, "n": n_readings(less), "less": mean, "less_low": low, "less_high": high}))
        if found:
            records.append({**dict(zip(by, key, strict=True)), **min(found, key=lambda one: one[0])[1]})
    return pd.DataFrame.from_records(records, columns=[*by, "against", "n", "less", "less_low", "less_high"])
