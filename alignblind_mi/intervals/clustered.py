"""How sure is a mean or a rate of answers that share word pairs and templates? One procedure for all that is shown, and its p-value.

Numbers and labels of clusters come in, ends of an interval go out. It does NOT know rows, outcomes, words or models.

The procedure (docs/statistics.md has its error rates). For a cluster variable c let a_g be the share of the values that lie in its
cluster g, and s_g the sum of their residuals. Then

    V(c)  = (k - 1) / k * sum_g (s_g / (1 - a_g))^2 / n^2      (the jackknife over clusters; MacKinnon and White 1985, CR3)
    df(c) = 1 / sum_g a_g^2 - 1                                (k - 1 for equal clusters; Kish's effective number, less one)

and the half-width at a level is the root of the larger of t(df1)^2 V(1) + t(df2)^2 max(V(2) - V(cells), 0) and the same with the variables
exchanged. Subtracting the cells is Cameron, Gelbach and Miller's (2011) way to count what both share once; a quantile of Student's t for
each part, instead of one for their sum, is Banerjee's (1960), which holds its level whatever the parts' true sizes. One quantile with
Satterthwaite's degrees of freedom does not with few templates: it takes a variance that came out small by chance at its word.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignblind_mi.borders.settings import Chance, takes
from alignblind_mi.borders.texts import shown
from alignblind_mi.errors import AlignblindError

LEVEL = 0.95
LINK = 3.0          # degrees of freedom of the scale that rates are taken on: heavier tails than the logit's
MOST_CLUSTERS = 2
_LEAST_DF = 0.2     # below it (nearly all values in one cluster) nothing can be told of other clusters
_SMALLEST_P = 1e-12
_STEPS = 50         # halvings of the interval that a p-value is searched in


class StatisticsError(AlignblindError):
    """Rows that lack a column, or groups that no rate can be computed for."""


class Interval(NamedTuple):
    """Lower and upper end, in the unit of the estimate; NaN where the data cannot tell."""

    low: float
    high: float


class RateInterval(NamedTuple):
    """The ends of a rate's interval, and `interval`: "clustered", "exact" (independent answers) or "none" (nothing can be told)."""

    low: float
    high: float
    interval: str


class MeanTest(NamedTuple):
    """An estimate, its interval and its two-sided p-value against 0: p is below 1 - level just where the interval leaves out 0."""

    estimate: float
    low: float
    high: float
    p: float


def exact_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """The interval of a share after Clopper and Pearson (1934); (0, 1) for n = 0, when anything is possible.

    It takes the answers as independent. Answers to the same words or template are not: see `rate_interval`.

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


@takes(StatisticsError)
def rate_interval(hits: np.ndarray, clusters: Sequence[np.ndarray], *, valid: np.ndarray | None = None,
                  level: Chance = LEVEL) -> RateInterval:
    """The interval of a rate, sum(hits) / sum(valid), of answers that share clusters, such as word pairs and templates.

    hits: [n], 1 for a success; clusters: none, one or two arrays of [n] labels; valid: [n], which answers count (default all).
    The half-width of the module is taken on a scale on which rates near 0 and 1 are spread out: quantiles of Student's t with `LINK`
    degrees of freedom. So the ends lie within 0 and 1. They are never nearer than those of independent answers (of the logit, with half
    an answer more on either side: Gart 1966), so that twelve answers that all agree do not make an interval without width.

    A variable with one label adds nothing: the statement is about that template alone. Where several were asked and one alone has valid
    answers, nothing can be told of the others: (0, 1), "none", as where no answer is valid or nothing clusters. Without cluster
    variables, or with one valid answer in each cluster, answers are independent, and the interval is `exact_interval`.

    Errors: StatisticsError for more than two cluster variables, or labels or `valid` of another length.
    """
    from scipy.special import expit, logit, ndtri

    hits = as_numbers(hits, "the values")
    codes, kept = _varying(clusters, len(hits)), _valid(valid, len(hits))
    n, successes = int(kept.sum()), int((hits[kept] > 0).sum())
    if n == 0 or (len(clusters) and not codes):
        return RateInterval(0.0, 1.0, "none")
    codes = [code[kept] for code in codes]
    if all(len(np.unique(code)) == n > 1 for code in codes):
        return RateInterval(*exact_interval(successes, n, level), "exact")
    half, middle = Spread.of(hits[kept], codes).half_width(level), (successes + 0.5) / (n + 1)
    if not np.isfinite(half):
        return RateInterval(0.0, 1.0, "none")
    clustered = _on_link(middle, half)
    apart = float(ndtri((1 + level) / 2)) / float(np.sqrt((n + 1) * middle * (1 - middle)))
    independent = [float(expit(logit(middle) + side * apart)) for side in (-1, 1)]
    return RateInterval(min(clustered[0], independent[0], successes / n), max(clustered[1], independent[1], successes / n), "clustered")


def _on_link(middle: float, half: float) -> tuple[float, float]:
    """Both ends of an interval of a rate, whose half-width on the scale of rates is carried to the scale of the link (delta method)."""
    from scipy.special import gamma, stdtr, stdtrit

    at = float(stdtrit(LINK, middle))
    density = gamma((LINK + 1) / 2) / (np.sqrt(LINK * np.pi) * gamma(LINK / 2)) * (1 + at**2 / LINK) ** (-(LINK + 1) / 2)
    return float(stdtr(LINK, at - half / density)), float(stdtr(LINK, at + half / density))


@takes(StatisticsError)
def mean_interval(values: np.ndarray, clusters: Sequence[np.ndarray], *, level: Chance = LEVEL) -> Interval:
    """The interval of a mean of values that share clusters: `mean_test` without its p-value."""
    estimate, spread = _mean(values, clusters)
    half = spread.half_width(level)
    return Interval(estimate - half, estimate + half) if np.isfinite(half) else Interval(float("nan"), float("nan"))


@takes(StatisticsError)
def mean_test(values: np.ndarray, clusters: Sequence[np.ndarray], *, level: Chance = LEVEL) -> MeanTest:
    """A mean with its interval and the p-value against 0, of values that share one or two crossed cluster variables.

    values: [n], NaN is left out; clusters: one or two arrays of [n] labels, such as word pair and template. With one variable whose
    clusters are equal this is Student's t over the clusters' means. A variable with one label adds nothing; all but the estimate is NaN
    where none has two, or where nearly all values lie in one cluster. Values that all agree give no width and, unless they are 0, no p.

    Errors: StatisticsError for no or more than two cluster variables, and labels of another length.
    """
    estimate, spread = _mean(values, clusters)
    half = spread.half_width(level)
    if not np.isfinite(half):
        return MeanTest(estimate, *[float("nan")] * 3)
    if half**2 <= np.finfo(float).eps * estimate**2:
        return MeanTest(estimate, estimate, estimate, 1.0 if estimate == 0 else float("nan"))
    return MeanTest(estimate, estimate - half, estimate + half, p_value(spread.half_width, estimate))


def _mean(values: np.ndarray, clusters: Sequence[np.ndarray]) -> tuple[float, "Spread"]:
    values = as_numbers(values, "the values")
    if not len(clusters):
        raise StatisticsError("a mean without cluster variables has no interval here: name at least one, such as one label a value.")
    codes, known = _varying(clusters, len(values)), ~np.isnan(values)
    if not known.any():
        return float("nan"), UNKNOWN
    return float(values[known].mean()), Spread.of(values[known], [code[known] for code in codes]) if codes else UNKNOWN


@takes(StatisticsError)
def change_test(change: np.ndarray, clusters: Sequence[np.ndarray], *, valid: np.ndarray | None = None, level: Chance = LEVEL) -> MeanTest:
    """A paired difference of rates: the mean of changes that are -1, 0 or 1, with its interval and p-value.

    change: [n]; valid: [n], which items are valid on both sides (default all); clusters as in `rate_interval`. The half-width is the
    module's, never less than that of independent items (`independent_half_width`). (-1, 1) and p = 1 where nothing can be told; p and
    estimate are NaN without an item.

    Errors: StatisticsError as in `rate_interval`.
    """
    change = as_numbers(change, "the changes")
    kept, codes = _valid(valid, len(change)), _varying(clusters, len(change))
    change, codes = change[kept], [code[kept] for code in codes]
    if not len(change):
        return MeanTest(float("nan"), -1.0, 1.0, float("nan"))
    estimate = float(change.mean())
    spread = Spread.of(change, codes) if codes or not len(clusters) else UNKNOWN

    def half_width(at: float) -> float:
        return max(spread.half_width(at), independent_half_width(change, at))

    half = half_width(level)
    return MeanTest(estimate, max(estimate - half, -1.0), min(estimate + half, 1.0), p_value(half_width, estimate))


def independent_half_width(values: np.ndarray, level: float) -> float:
    """Half the width of the interval of a mean of labels -1, 0 and 1 of independent items, or of an item's mean over several.

    values: [n]. The items that are not 0 count as z^2 more: so that "none of 50 changed" is no proof that none of 5000 would, and twelve
    readings that all agree do not make an interval without width.
    """
    from scipy.special import ndtri

    n, z, mean = len(values), float(ndtri((1 + level) / 2)), float(values.mean())
    return z * float(np.sqrt(max(float((values**2).sum() + z**2) / n - mean**2, 0.0) / n))


class Spread(NamedTuple):
    """What a half-width is made of: (variance, degrees of freedom) of each cluster variable, and the variance of their cells."""

    parts: tuple[tuple[float, float], ...]
    cells: float

    @classmethod
    def of(cls, values: np.ndarray, codes: Sequence[np.ndarray]) -> "Spread":
        """values: [n]; codes: one or two [n] arrays of integers; none: every value is its own cluster."""
        residuals = values - values.mean() if len(values) else values
        parts = [_variance(residuals, code) for code in codes] or [_variance(residuals, np.arange(len(values)))]
        if len(codes) < MOST_CLUSTERS:
            return cls(tuple(parts), 0.0)
        cells = np.unique(codes[0].astype(np.int64) * (int(codes[1].max()) + 1) + codes[1], return_inverse=True)[1]
        return cls(tuple(parts), _variance(residuals, cells)[0])

    def half_width(self, level: float) -> float:
        """Half of the interval's width at a level; infinite where nothing can be told of other clusters."""
        from scipy.special import stdtrit

        if any(df < _LEAST_DF for _, df in self.parts):
            return float("inf")
        squares = [float(stdtrit(df, (1 + level) / 2)) ** 2 for _, df in self.parts]
        variances = [variance for variance, _ in self.parts]
        if len(self.parts) == 1:
            return float(np.sqrt(squares[0] * variances[0]))
        beyond = [max(variance - self.cells, 0.0) for variance in variances]
        both = [squares[i] * variances[i] + squares[1 - i] * beyond[1 - i] for i in range(2)]
        return float(np.sqrt(max(both)))


UNKNOWN = Spread(((0.0, 0.0),), 0.0)    # of clusters that cannot be compared


def _variance(residuals: np.ndarray, code: np.ndarray) -> tuple[float, float]:
    """(V, df) of the module, by the clusters that have values."""
    sizes = np.bincount(code).astype(float)
    there = sizes > 0
    share, sums = sizes[there] / len(code), np.bincount(code, residuals)[there]
    k = len(share)
    if k < 2:
        return 0.0, 0.0
    scaled = sums / (1 - share)
    return float(scaled @ scaled) / len(code) ** 2 * (k - 1) / k, float(1 / (share @ share) - 1)


def p_value(half_width: Callable[[float], float], estimate: float) -> float:
    """1 - the level at which an interval around the estimate, as wide as `half_width(level)` says, just reaches 0."""
    if estimate == 0:
        return 1.0
    low, high = -np.log(_SMALLEST_P), 0.0    # of -log p: the interval at `low` is the widest
    if half_width(1 - _SMALLEST_P) < abs(estimate):
        return _SMALLEST_P
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if half_width(1 - float(np.exp(-middle))) > abs(estimate) else (low, middle)
    return float(np.exp(-high))


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
    import pandas as pd

    if len(labels) != n:
        raise StatisticsError(f"{n} values have {len(labels)} cluster labels: expected one label for each value.")
    codes = pd.factorize(np.asarray(labels))[0]
    if (codes < 0).any():
        raise StatisticsError(f"{int((codes < 0).sum())} of {n} cluster labels are missing (NaN or None): which values belong together is "
                              "not known; name them, or leave that cluster variable out.")
    return codes


def _valid(valid: Any, n: int) -> np.ndarray:
    """[n] which values count."""
    weight = np.ones(n) if valid is None else as_numbers(valid, "what is valid")
    if len(weight) != n:
        raise StatisticsError(f"{n} values have {len(weight)} entries in `valid`: expected one for each value.")
    return np.asarray(weight > 0)


def _varying(clusters: Sequence[Any], n: int) -> list[np.ndarray]:
    """The codes of the cluster variables that have more than one label."""
    if len(clusters) > MOST_CLUSTERS:
        raise StatisticsError(f"an interval takes one or two cluster variables, not {len(clusters)}.")
    return [code for code in (coded(labels, n) for labels in clusters) if len(code) and code.max() > 0]
