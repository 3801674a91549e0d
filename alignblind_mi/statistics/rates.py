"""Rates with their uncertainty: intervals over word pairs and templates, bounds for invalid answers, position effects, agreement.

It reads judged rows (one row per answer, with an `outcome`) and returns tidy tables; the intervals are those of `intervals.py`. It does NOT
know how an answer was judged, nor any group, word or model.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from alignblind_mi.borders.settings import Chance, Names, takes
from alignblind_mi.borders.texts import shown
from alignblind_mi.intervals.clustered import LEVEL, Interval, StatisticsError, as_numbers, mean_interval, mean_test, rate_interval
from alignblind_mi.results import OUTCOMES
from alignblind_mi.stimuli.prompts import KINDS

CLUSTERS = ("word_pair", "template")
_TEMPLATE = "template"


class Bounds(NamedTuple):
    """What the rate would be if every invalid answer had gone one way: against the stereotype (`worst`) or with it (`best`)."""

    worst: float
    best: float


def bounds(successes: int, invalid: int, n: int) -> Bounds:
    """Bounds of a rate over all n answers, `invalid` of them unusable; (NaN, NaN) for n = 0."""
    return Bounds(successes / n, (successes + invalid) / n) if n else Bounds(float("nan"), float("nan"))


def agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa of two labellings of the same items; NaN when chance alone explains full agreement (one label only)."""
    if len(first) != len(second) or not len(first):
        raise StatisticsError(f"agreement of {len(first)} with {len(second)} labels: expected as many, and at least one.")
    table = pd.crosstab(np.asarray(first, dtype=object), np.asarray(second, dtype=object), normalize=True)
    labels = table.index.union(table.columns)
    table = table.reindex(index=labels, columns=labels, fill_value=0.0)
    shares = table.to_numpy(float)
    observed, chance = float(np.trace(shares)), float(shares.sum(axis=0) @ shares.sum(axis=1))
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


@takes(StatisticsError)
def relative_change(treated: pd.DataFrame, untreated: pd.DataFrame, column: str, cluster: Names, *,
                    level: Chance = LEVEL) -> dict[str, float]:
    """By which share the mean of a column is lower than before: estimate, low, high of treated / untreated - 1, and n (clusters).

    cluster: one or two columns, such as context and template; both means are over what the two sets of rows share in all of them. The
    interval is that of a ratio of two means (linearised; Cochran 1977, section 6.4), by `mean_test` over these clusters; it ends at -1.
    NaN where the untreated mean is 0.

    Errors: StatisticsError for a missing column, one that holds no numbers, or two sets of rows without a cluster in common.
    """
    keys = list(cluster)
    for rows in (treated, untreated):
        require(rows, [column, *keys], numbers=[column])
    sums = [rows.groupby(keys)[column].agg(["sum", "size"]) for rows in (treated, untreated)]
    shared = sums[0].index.intersection(sums[1].index)
    if not len(shared):
        raise StatisticsError(f"the two sets of rows share no value of {', '.join(map(repr, keys))}: they cannot be compared.")
    (hit, n), (base_hit, base_n) = ((part.loc[shared, "sum"].to_numpy(float), part.loc[shared, "size"].to_numpy(float)) for part in sums)
    mean, base = hit.sum() / n.sum(), base_hit.sum() / base_n.sum()
    if base == 0:
        return {"estimate": float("nan"), "low": float("nan"), "high": float("nan"), "n": len(shared)}
    # Of each cluster, how much it moves the ratio: as values whose mean is the estimate.
    moved = ((hit - mean * n) / n.mean() - mean / base * (base_hit - base * base_n) / base_n.mean()) / base
    labels = [shared.get_level_values(key).to_numpy() for key in keys]
    found = mean_test(moved + mean / base - 1, labels, level=level)
    return {"estimate": found.estimate, "low": max(found.low, -1.0), "high": found.high, "n": len(shared)}


# --- tables ---------------------------------------------------------------------------------------------------------------------------


@takes(StatisticsError)
def summarise(rows: pd.DataFrame, by: Names = ("model", "treatment", "kind"), *, cluster: Names = CLUSTERS,
              level: Chance = LEVEL) -> pd.DataFrame:
    """One row per group of judged rows, in the order of their first appearance: how often the stereotype was chosen, and how sure that is.

    Columns: `by`, n, stereotyped, reversed, rejected, invalid, invalid_share, rate, low, high (`intervals.rate_interval` over the `cluster`
    columns), interval ("clustered"; "exact" of independent answers, which cluster=() says they are; "none" where nothing can be told),
    clustered_over (those of `cluster` with two levels or more among the valid), template_min, template_max (the lowest and the highest
    rate of a template; NaN without a valid answer or a column `template`), worst, best (over all n, see `Bounds`). rate is stereotyped /
    (stereotyped + reversed) for implicit and stereotyped / (n - invalid) for explicit answers; NaN without a valid answer.

    Errors: StatisticsError for a missing column, an unknown outcome or kind, or a group that mixes implicit and explicit answers.
    """
    require(rows, [*by, *cluster, "kind", "outcome"])
    _refuse_unknown(rows, "kind", KINDS)
    records = [{**key, **_summary(group, cluster, level)} for key, group in groups(rows, by)]
    return pd.DataFrame.from_records(records, columns=None if records else [*by, "n"])


def require(rows: pd.DataFrame, columns: Sequence[str], *, numbers: Sequence[str] = ()) -> None:
    """Whether rows can be computed with: every column is there once, with what it may hold. StatisticsError naming what is not.

    An `outcome` is one of the known ones. `numbers`: those of the columns that hold numbers alone (NaN among them: not known).
    """
    twice = rows.columns[rows.columns.duplicated()]
    if len(twice):
        raise StatisticsError(f"the rows have the column {str(twice[0])!r} twice: which of them is meant? Leave one.")
    missing = [name for name in dict.fromkeys(columns) if name not in rows.columns]
    if missing:
        raise StatisticsError(f"the rows have no column {', '.join(map(repr, missing))}; they have: {', '.join(map(str, rows.columns))}.")
    if "outcome" in columns:
        _refuse_unknown(rows, "outcome", OUTCOMES)
    for name in numbers:
        if not pd.api.types.is_numeric_dtype(rows[name]):
            as_numbers(rows[name].to_numpy(), f"the column {name!r}")


def _refuse_unknown(rows: pd.DataFrame, column: str, known: Sequence[str]) -> None:
    unknown = [value for value in rows[column].unique() if value not in known]
    if unknown:
        raise StatisticsError(f"unknown {column}(s) [{', '.join(map(shown, unknown[:5]))}]; known: {', '.join(known)}.")


@takes(StatisticsError)
def groups(rows: pd.DataFrame, by: Names) -> list[tuple[dict[str, object], pd.DataFrame]]:
    """(column -> value, rows) of every group; one group of all rows without `by`."""
    if not by:
        return [({}, rows)] if len(rows) else []
    grouped = rows.groupby(list(by), sort=False, dropna=False, observed=True)
    return [(dict(zip(by, key, strict=True)), group) for key, group in grouped]


def _summary(group: pd.DataFrame, cluster: Sequence[str], level: float) -> dict[str, object]:
    kinds = group["kind"].unique()
    if len(kinds) > 1:
        raise StatisticsError(f"a group mixes the kinds {', '.join(map(str, kinds))}, whose rates differ in meaning: add 'kind' to `by`.")
    n, counts = len(group), {str(label): int((group["outcome"] == label).sum()) for label in OUTCOMES}
    valid = n - counts["invalid"]
    usable = (group["outcome"] != "invalid").to_numpy()
    hits = (group["outcome"] == "stereotyped").to_numpy(float)
    found = rate_interval(hits, [group[name].to_numpy() for name in cluster], valid=usable.astype(float), level=level)
    worst, best = bounds(counts["stereotyped"], counts["invalid"], n)
    return {
        "n": n, **counts, "invalid_share": counts["invalid"] / n, "rate": counts["stereotyped"] / valid if valid else float("nan"),
        **found._asdict(), "clustered_over": "+".join(name for name in cluster if group.loc[usable, name].nunique() > 1),
        **_by_template(group, hits, usable), "worst": worst, "best": best,
    }


def _by_template(group: pd.DataFrame, hits: np.ndarray, usable: np.ndarray) -> dict[str, float]:
    """The lowest and the highest rate of a template."""
    if _TEMPLATE not in group or not usable.any():
        return {"template_min": float("nan"), "template_max": float("nan")}
    rates = pd.Series(hits[usable]).groupby(group[_TEMPLATE].to_numpy()[usable]).mean()
    return {"template_min": float(rates.min()), "template_max": float(rates.max())}


def first_with_first(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Of implicit rows, whether the stereotyped answer puts the first word with the first option.

    The stereotype ties the marked identifier to the negative word: first option with first word, where the two orders agree.
    """
    return (rows["option_order"] == "marked_first") == (rows["word_order"] == "negative_first")


def column_interval(rows: pd.DataFrame, column: str, cluster: Sequence[str] = CLUSTERS) -> Interval:
    """The 95 % interval of the mean of a column, over cluster columns (`intervals.mean_interval`)."""
    return mean_interval(rows[column].to_numpy(float), [rows[name].to_numpy() for name in cluster])


@takes(StatisticsError)
def position_effect(rows: pd.DataFrame, by: Names = ("model",), *, level: Chance = LEVEL) -> pd.DataFrame:
    """Association beside position, per template: does the model match meanings, or put the first option with the first word?

    One row per group and template (implicit rows only). Columns: `by`, template, n, valid, rate, low, high (stereotyped among the valid),
    position, position_low, position_high (first word with the first option; 0.5 is no effect), confounded. Both intervals are those of
    `intervals.rate_interval` over word pairs: they speak of this template. With one order of options and words per template, as in the
    published design, each stereotyped answer is also a first-with-first one, or each reversed one is: the two numbers are then one and
    the same, and `confounded` says so.

    Errors: StatisticsError for a missing column.
    """
    require(rows, [*by, "template", "word_pair", "kind", "outcome", "option_order", "word_order"])
    asked = rows[(rows["kind"] == "implicit") & (rows["option_order"] != "") & (rows["word_order"] != "")]
    return position_rates(asked, [*by, *(["template"] if "template" not in by else [])], level=level)


@takes(StatisticsError)
def position_rates(asked: pd.DataFrame, by: Names, *, cluster: Names = ("word_pair",), level: Chance = LEVEL) -> pd.DataFrame:
    """`position_effect` by any columns, such as over all templates, with the columns that its answers are clustered over."""
    return pd.DataFrame.from_records([{**key, **_position(group, cluster, level)} for key, group in groups(asked, by)])


def _position(group: pd.DataFrame, cluster: Sequence[str], level: float) -> dict[str, object]:
    first_is_stereotyped = first_with_first(group)
    stereotyped = group["outcome"] == "stereotyped"
    valid = group["outcome"].isin(["stereotyped", "reversed"])
    first, n_valid = valid & (stereotyped == first_is_stereotyped), int(valid.sum())
    labels, usable = [group[name].to_numpy() for name in cluster], valid.to_numpy(float)
    association, position = (rate_interval(hit.to_numpy(float), labels, valid=usable, level=level) for hit in (stereotyped, first))
    return {
        "n": len(group), "valid": n_valid, "rate": int(stereotyped.sum()) / n_valid if n_valid else float("nan"),
        "low": association.low, "high": association.high, "position": int(first.sum()) / n_valid if n_valid else float("nan"),
        "position_low": position.low, "position_high": position.high, "confounded": bool(first_is_stereotyped.nunique() < 2),
    }


def label_shares(labels: Sequence[str], names: Sequence[str], clusters: Sequence[np.ndarray]) -> dict[str, int | float]:
    """How many labels are of each name: a count under the name, `<name>_share`, and its interval (`<name>_low`, `<name>_high`).

    clusters: the cluster variables of the labels, as in `intervals.rate_interval`.
    """
    shares: dict[str, int | float] = {}
    for name in names:
        count = labels.count(name)
        found = rate_interval(np.array([label == name for label in labels], dtype=float), clusters)
        shares |= {name: count, f"{name}_share": count / len(labels), f"{name}_low": found.low, f"{name}_high": found.high}
    return shares
