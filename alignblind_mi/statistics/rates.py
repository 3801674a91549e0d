"""Rates with their uncertainty: exact and clustered intervals, bounds for invalid answers, position effects, agreement.

It reads judged rows (one row per answer, with an `outcome`) and returns tidy tables. It does NOT know how an answer was judged, nor
any group, word or model.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from alignblind_mi.borders.settings import Chance, Draws, Names, Seed, shown, takes
from alignblind_mi.errors import AlignblindError
from alignblind_mi.results import OUTCOMES
from alignblind_mi.stimuli.prompts import KINDS

LEVEL = 0.95
DRAWS = 2000
CLUSTERS = ("word_pair", "template")


class StatisticsError(AlignblindError):
    """Rows that lack a column, or groups that no rate can be computed for."""


class Interval(NamedTuple):
    """Lower and upper end, in the unit of the estimate; NaN where the data cannot tell."""

    low: float
    high: float


class Bounds(NamedTuple):
    """What the rate would be if every invalid answer had gone one way: against the stereotype (`worst`) or with it (`best`)."""

    worst: float
    best: float


def exact_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """The interval of a share after Clopper and Pearson (1934); (0, 1) for n = 0, when anything is possible.

    It takes the answers as independent. Answers to the same words or template are not: see `clustered_interval`.

    Errors: StatisticsError unless 0 <= successes <= n and 0 < level < 1.
    """
    from scipy.special import betaincinv

    successes, n = int(successes), int(n)
    if not 0 <= successes <= n or not 0 < level < 1:
        raise StatisticsError(f"no interval for {successes} of {n} at level {level}: expected 0 <= successes <= n and 0 < level < 1.")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(low, high)


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


# --- clustered bootstrap --------------------------------------------------------------------------------------------------------------


@takes(StatisticsError)
def mean_interval(values: np.ndarray, clusters: Sequence[np.ndarray], *, level: Chance = LEVEL, draws: Draws = DRAWS,
                  seed: Seed = 0) -> Interval:
    """Percentile interval of a mean, with every cluster variable resampled independently (the pigeonhole bootstrap of Owen 2007).

    values: [n]; clusters: one [n] array of labels per variable, such as word pair and template. The weight of a value is the product of
    how often its clusters were drawn, so that two-way (crossed) dependence is covered, a little generously. The same seed gives the
    same interval. A variable with one level cannot vary and adds nothing; (NaN, NaN) if no variable has two levels. Few levels make any
    such interval rough, and where all values agree it has no width.
    """
    return clustered_interval(values, clusters, level=level, draws=draws, seed=seed)


@takes(StatisticsError)
def t_interval(values: np.ndarray, clusters: np.ndarray, *, level: Chance = LEVEL) -> Interval:
    """Student's interval of a mean, with the cluster as the unit: for continuous readings of few contexts.

    values: [n]; clusters: [n] labels. A cluster counts by its number of values; the interval is that of a ratio of two sums over clusters
    (linearised; Cochran 1977, section 3.12), with as many degrees of freedom as clusters less one. NaN values are left out; (NaN, NaN) for
    fewer than two clusters.
    """
    from scipy.special import stdtrit

    values = as_numbers(values, "the values")
    known = ~np.isnan(values)
    values, codes = values[known], pd.factorize(coded(clusters, len(values))[known])[0]
    k = int(codes.max()) + 1 if len(codes) else 0
    if k < 2:
        return Interval(float("nan"), float("nan"))
    mean = float(values.mean())
    spread = np.bincount(codes, values - mean) * k / len(values)
    half = float(stdtrit(k - 1, (1 + level) / 2) * spread.std(ddof=1) / np.sqrt(k))
    return Interval(mean - half, mean + half)


@takes(StatisticsError)
def relative_change(treated: pd.DataFrame, untreated: pd.DataFrame, column: str, cluster: str, *, level: Chance = LEVEL,
                    draws: Draws = DRAWS, seed: Seed = 0) -> dict[str, float]:
    """By which share the mean of a column is lower than before: estimate, low, high of treated / untreated - 1.

    The same clusters are drawn for both (a paired bootstrap over their common clusters). NaN where the untreated mean is 0.

    Errors: StatisticsError for a missing column, one that holds no numbers, or two sets of rows without a cluster in common.
    """
    for rows in (treated, untreated):
        require(rows, [column, cluster], numbers=[column])
    sums = [rows.groupby(cluster)[column].agg(["sum", "size"]) for rows in (treated, untreated)]
    shared = sums[0].index.intersection(sums[1].index)
    if not len(shared):
        raise StatisticsError(f"the two sets of rows share no value of {cluster!r}: they cannot be compared.")
    (hit, n), (base_hit, base_n) = ((part.loc[shared, "sum"].to_numpy(float), part.loc[shared, "size"].to_numpy(float)) for part in sums)
    k = len(shared)
    weights = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=draws).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (weights @ hit) / (weights @ n) / ((weights @ base_hit) / (weights @ base_n)) - 1
        estimate = hit.sum() / n.sum() / (base_hit.sum() / base_n.sum()) - 1
    usable = drawn[np.isfinite(drawn)]
    low, high = np.quantile(usable, [(1 - level) / 2, (1 + level) / 2]) if len(usable) and np.isfinite(estimate) else (np.nan, np.nan)
    return {"estimate": float(estimate) if np.isfinite(estimate) else float("nan"), "low": float(low), "high": float(high), "n": k}


@takes(StatisticsError)
def clustered_interval(values: np.ndarray, clusters: Sequence[np.ndarray], *, valid: np.ndarray | None = None, level: Chance = LEVEL,
                       draws: Draws = DRAWS, seed: Seed = 0) -> Interval:
    """`mean_interval` of a share: values are successes ([n], 0 or 1), counted among the `valid` ones ([n], default all)."""
    values = as_numbers(values, "the values")
    weight = np.ones(len(values)) if valid is None else as_numbers(valid, "what is valid")
    if len(weight) != len(values):
        raise StatisticsError(f"{len(values)} values have {len(weight)} entries in `valid`: expected one for each value.")
    codes = [coded(labels, len(values))[weight > 0] for labels in clusters]
    kept = values[weight > 0]
    codes = [pd.factorize(code)[0] for code in codes]
    codes = [code for code in codes if len(code) and code.max() > 0]
    if not codes:
        return Interval(float("nan"), float("nan"))
    estimates = clustered_draws(kept, codes, valid=weight[weight > 0], draws=draws, seed=seed)
    tail = (1 - level) / 2
    low, high = np.nanquantile(estimates, [tail, 1 - tail]) if np.isfinite(estimates).any() else (float("nan"), float("nan"))
    return Interval(float(low), float(high))


@takes(StatisticsError)
def clustered_draws(values: np.ndarray, codes: Sequence[np.ndarray], *, valid: np.ndarray | None = None,
                    levels: Sequence[int] | None = None, draws: Draws = DRAWS, seed: Seed = 0) -> np.ndarray:
    """[draws] means of values ([n], weighted by `valid`) under resampled clusters: the pigeonhole bootstrap behind `mean_interval`.

    codes: one [n] array of integers 0 ... k - 1 per cluster variable; levels: the k of each (default: the largest code + 1). With the same
    seed and the same levels the same clusters are drawn, whatever the values. NaN for a draw that hits no valid value.
    """
    weight = np.ones(len(values)) if valid is None else np.asarray(valid, dtype=float)
    levels = list(levels) if levels is not None else [int(code.max()) + 1 for code in codes]
    random = np.random.default_rng(seed)
    counts = [random.multinomial(k, np.full(k, 1 / k), size=draws).astype(float) for k in levels]
    cell, size = np.ravel_multi_index(list(codes), levels), int(np.prod(levels))
    hits, weights = (_weighted(np.bincount(cell, part, minlength=size).reshape(levels), counts) for part in (values * weight, weight))
    return np.divide(hits, weights, out=np.full(draws, np.nan), where=weights > 0)


def _weighted(cells: np.ndarray, counts: Sequence[np.ndarray]) -> np.ndarray:
    """[draws] sums over all cells [a, b, ...], each times the product of its clusters' counts ([draws, a], [draws, b], ...)."""
    axes = range(1, cells.ndim + 1)
    operands = [operand for axis, count in zip(axes, counts, strict=True) for operand in (count, [0, axis])]
    return np.einsum(cells, list(axes), *operands, [0], optimize=True)


# --- tables ---------------------------------------------------------------------------------------------------------------------------


@takes(StatisticsError)
def summarise(rows: pd.DataFrame, by: Names = ("model", "treatment", "kind"), *, cluster: Names = CLUSTERS,
              level: Chance = LEVEL, draws: Draws = DRAWS, seed: Seed = 0) -> pd.DataFrame:
    """One row per group of judged rows, in the order of their first appearance: how often the stereotype was chosen, and how sure that is.

    Columns: `by`, n, stereotyped, reversed, rejected, invalid, invalid_share, rate, low, high (exact interval over the valid answers),
    cluster_low, cluster_high (clustered bootstrap over the `cluster` columns), clustered_over (those of them with two levels or more),
    worst, best (over all n, see `Bounds`). rate is stereotyped / (stereotyped + reversed) for implicit and stereotyped / (n - invalid) for
    explicit answers; NaN without a valid answer.

    Errors: StatisticsError for a missing column, an unknown outcome or kind, or a group that mixes implicit and explicit answers.
    """
    require(rows, [*by, *cluster, "kind", "outcome"])
    _refuse_unknown(rows, "kind", KINDS)
    records = [{**key, **_summary(group, cluster, level, draws, seed)} for key, group in groups(rows, by)]
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


def as_numbers(values: Any, what: str) -> np.ndarray:
    """Values as floats. StatisticsError, beginning with `what` they are, for texts and all else that is no number."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        return values.astype(float, copy=False)
    try:
        if any(isinstance(value, str | bytes) for value in values):    # numpy would read "1" as a number
            raise ValueError("a text is there")
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise StatisticsError(f"{what} must hold numbers alone, got {shown(list(values[:3]))}.") from error


def coded(labels: Any, n: int) -> np.ndarray:
    """[n] integers 0 ... k - 1, one for each label of a cluster variable. StatisticsError unless every value has its label."""
    if len(labels) != n:
        raise StatisticsError(f"{n} values have {len(labels)} cluster labels: expected one label for each value.")
    codes = pd.factorize(np.asarray(labels))[0]
    if (codes < 0).any():
        raise StatisticsError(f"{int((codes < 0).sum())} of {n} cluster labels are missing (NaN or None): which values belong together is "
                              "not known; name them, or leave that cluster variable out.")
    return codes


@takes(StatisticsError)
def groups(rows: pd.DataFrame, by: Names) -> list[tuple[dict[str, object], pd.DataFrame]]:
    """(column -> value, rows) of every group; one group of all rows without `by`."""
    if not by:
        return [({}, rows)] if len(rows) else []
    grouped = rows.groupby(list(by), sort=False, dropna=False, observed=True)
    return [(dict(zip(by, key, strict=True)), group) for key, group in grouped]


def _summary(group: pd.DataFrame, cluster: Sequence[str], level: float, draws: int, seed: int) -> dict[str, object]:
    kinds = group["kind"].unique()
    if len(kinds) > 1:
        raise StatisticsError(f"a group mixes the kinds {', '.join(map(str, kinds))}, whose rates differ in meaning: add 'kind' to `by`.")
    n, counts = len(group), {str(label): int((group["outcome"] == label).sum()) for label in OUTCOMES}
    valid = n - counts["invalid"]
    hits = (group["outcome"] == "stereotyped").to_numpy(float)
    usable = (group["outcome"] != "invalid").to_numpy()
    exact = exact_interval(counts["stereotyped"], valid, level)
    clustered = clustered_interval(hits, [group[name].to_numpy() for name in cluster], valid=usable, level=level, draws=draws, seed=seed)
    worst, best = bounds(counts["stereotyped"], counts["invalid"], n)
    return {
        "n": n, **counts, "invalid_share": counts["invalid"] / n, "rate": counts["stereotyped"] / valid if valid else float("nan"),
        "low": exact.low, "high": exact.high, "cluster_low": clustered.low, "cluster_high": clustered.high,
        "clustered_over": "+".join(name for name in cluster if group.loc[usable, name].nunique() > 1), "worst": worst, "best": best,
    }


@takes(StatisticsError)
def position_effect(rows: pd.DataFrame, by: Names = ("model",), *, level: Chance = LEVEL) -> pd.DataFrame:
    """Association beside position, per template: does the model match meanings, or put the first option with the first word?

    One row per group and template (implicit rows only). Columns: `by`, template, n, valid, rate, low, high (stereotyped among the valid),
    position, position_low, position_high (first word with the first option; 0.5 is no effect; both intervals exact), confounded. With one
    order of options and words per template, as in the published design, each stereotyped answer is also a first-with-first one, or each
    reversed one is: the two numbers are then one and the same, and `confounded` says so.

    Errors: StatisticsError for a missing column.
    """
    require(rows, [*by, "template", "kind", "outcome", "option_order", "word_order"])
    asked = rows[(rows["kind"] == "implicit") & (rows["option_order"] != "") & (rows["word_order"] != "")]
    keys = [*by, *(["template"] if "template" not in by else [])]
    return pd.DataFrame.from_records([{**key, **_position(group, level)} for key, group in groups(asked, keys)])


def _position(group: pd.DataFrame, level: float) -> dict[str, object]:
    # The stereotype ties the marked identifier to the negative word: first option with first word, where the two orders agree.
    first_is_stereotyped = (group["option_order"] == "marked_first") == (group["word_order"] == "negative_first")
    stereotyped = group["outcome"] == "stereotyped"
    valid = group["outcome"].isin(["stereotyped", "reversed"])
    n_valid, n_stereotyped = int(valid.sum()), int(stereotyped.sum())
    n_first = int((valid & (stereotyped == first_is_stereotyped)).sum())
    association, position = exact_interval(n_stereotyped, n_valid, level), exact_interval(n_first, n_valid, level)
    return {
        "n": len(group), "valid": n_valid, "rate": n_stereotyped / n_valid if n_valid else float("nan"),
        "low": association.low, "high": association.high, "position": n_first / n_valid if n_valid else float("nan"),
        "position_low": position.low, "position_high": position.high, "confounded": bool(first_is_stereotyped.nunique() < 2),
    }


def label_shares(labels: Sequence[str], names: Sequence[str]) -> dict[str, int | float]:
    """How many labels are of each name: a count under the name, `<name>_share`, and its exact interval (`<name>_low`, `<name>_high`)."""
    shares: dict[str, int | float] = {}
    for name in names:
        count = labels.count(name)
        low, high = exact_interval(count, len(labels))
        shares |= {name: count, f"{name}_share": count / len(labels), f"{name}_low": low, f"{name}_high": high}
    return shares
