"""How many items does a difference need, and which difference can be seen with the items one has?

The plan is for the tests of `paired.py`: the same items under two treatments, answers 0 or 1, word pairs crossed with templates. It does
NOT know any word, template or model.

An item is discordant where the two answers differ. Per-item changes (-1, 0, 1) have variance s2 = discordant - difference^2; `icc` is the
share of it that items of one word pair have in common, `template_icc` that of one template, the rest is the items' own. 0 of both is the
textbook's plan for McNemar's test (Miettinen 1968; Connor 1987), which `connor_items` gives. That needs fewer items than `items_needed`,
which plans for `intervals.change_test`: to speak of other templates too costs more than twice the items with four templates, even where
templates do not differ, because that has to be found out as well.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pandas as pd

from alignblind_mi.borders.settings import Bound, Chance, Names, Share, check_fields, checked, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.intervals.clustered import StatisticsError
from alignblind_mi.statistics.paired import BASELINE, ITEM, paired
from alignblind_mi.statistics.rates import CLUSTERS, require

MOST_PAIRS = 100_000
_GRID = 48      # points of each distribution that `power` integrates over
_Rate = Annotated[float, Bound(0.0, 1.0, sentence="{name} is {value}: expected a rate from 0 to 1.")]
_Pairs = Annotated[int, Bound(0, 2 * MOST_PAIRS, sentence=f"{{name}} {{value}}: expected a count from 0 to {2 * MOST_PAIRS}.")]
_Power = Annotated[float, Bound(0.0, 1.0, open_low=True, open_high=True,
                                sentence="a power of {value} cannot be planned for: expected a number between 0 and 1.")]
_Asked = Annotated[int, Bound(1, 1000, sentence="{name} {value}: expected a count from 1 to 1000.")]


@dataclass(frozen=True)
class Plan:
    """Two rates to tell apart, and on what: word pairs x templates x orders items, each asked under both treatments.

    discordant: share of items whose answers differ; None takes the two answers to an item as independent, which is the least favourable
    unless they are negatively related. icc, template_icc: see the module. alpha: of the two-sided test. fixed_templates: the statement
    is to be about these templates only, that is, `paired_differences` with cluster=("word_pair",).

    Errors: StatisticsError for rates, shares or counts that cannot be.
    """

    __repr__ = one_line

    untreated: _Rate
    treated: _Rate
    discordant: Share | None = None
    icc: Share = 0.0
    template_icc: Share = 0.0
    word_pairs: _Pairs = 0
    templates: _Asked = 4
    orders: _Asked = 1
    alpha: Chance = 0.05
    fixed_templates: bool = False

    def __post_init__(self) -> None:
        check_fields(self, StatisticsError)
        least, most = abs(self.difference), min(self.untreated + self.treated, 2 - self.untreated - self.treated)
        if not least - 1e-9 <= self.share <= most + 1e-9:
            raise StatisticsError(f"a discordant share of {self.share:g} is impossible with rates of {self.untreated:g} and "
                                  f"{self.treated:g}: expected {least:g} to {most:g}.")
        if self.icc + self.template_icc > 1:
            raise StatisticsError(f"icc {self.icc:g} and template_icc {self.template_icc:g}: expected shares of at least 0 that add up to "
                                  f"1 at most.")

    @property
    def difference(self) -> float:
        """treated - untreated."""
        return self.treated - self.untreated

    @property
    def share(self) -> float:
        """The discordant share, given or from independence."""
        if self.discordant is not None:
            return self.discordant
        return self.untreated * (1 - self.treated) + self.treated * (1 - self.untreated)

    @property
    def items(self) -> int:
        """Items in all."""
        return self.word_pairs * self.templates * self.orders


def connor_items(plan: Plan, power: float = 0.8) -> float:
    """Items that McNemar's test needs if they are independent: Connor (1987), equation 3; infinite without a difference."""
    from scipy.special import ndtri

    _check_power(power)
    if plan.difference == 0:
        return float("inf")
    spread = ndtri(1 - plan.alpha / 2) * np.sqrt(plan.share) + ndtri(power) * np.sqrt(plan.share - plan.difference**2)
    return float(spread**2 / plan.difference**2)


def power_of(plan: Plan) -> float:
    """The chance that `paired_differences` finds the plan's difference (p <= alpha, right direction) with the plan's items.

    That of `intervals.change_test`, with its estimated variances as independent scaled chi-squares and the mean as normal. Planning needs
    two word pairs at least.

    Errors: StatisticsError for fewer.
    """
    from scipy.special import ndtr, ndtri, stdtrit

    if plan.word_pairs < 2:
        raise StatisticsError(f"a plan with {plan.word_pairs} word pairs has no power to compute: expected 2 at least.")
    n, total, tail = plan.items, max(plan.share - plan.difference**2, 0.0), 1 - plan.alpha / 2
    words, templates, own = (part * total for part in (plan.icc, plan.template_icc, 1 - plan.icc - plan.template_icc))
    parts, dfs, true = [words / plan.word_pairs + own / n], [plan.word_pairs - 1], words / plan.word_pairs + own / n
    if plan.templates > 1 and not plan.fixed_templates:
        parts, dfs, true = [*parts, templates / plan.templates + own / n], [*dfs, plan.templates - 1], true + templates / plan.templates
    estimated = np.meshgrid(*(part * _chi_square_over_df(df) for part, df in zip(parts, dfs, strict=True)), indexing="ij")
    squares = [float(stdtrit(df, tail)) ** 2 for df in dfs]
    critical = squares[0] * estimated[0]
    if len(parts) > 1:
        cells = (words + templates) / (plan.word_pairs * plan.templates) + own / n
        beyond = [np.maximum(part - cells, 0) for part in estimated]
        critical = np.maximum(critical + squares[1] * beyond[1], squares[1] * estimated[1] + squares[0] * beyond[0])
    z2 = float(ndtri(tail)) ** 2
    half = np.sqrt(np.maximum(critical, z2 * ((plan.share * n + z2) / n - plan.difference**2) / n))
    missing = (abs(plan.difference) - half) / np.sqrt(true) if true > 0 else np.where(half < abs(plan.difference), np.inf, -np.inf)
    return float(ndtr(missing).mean())


def _chi_square_over_df(df: int) -> np.ndarray:
    """[point] equally likely values of a chi-square over its degrees of freedom."""
    from scipy.special import gammaincinv

    return np.asarray(gammaincinv(df / 2, (np.arange(_GRID) + 0.5) / _GRID) * 2 / df)


def items_needed(plan: Plan, power: float = 0.8) -> Plan:
    """The plan with the fewest word pairs that have the power, at its templates and orders.

    Errors: StatisticsError without a difference, and where no number of word pairs has the power: templates that differ need to be more.
    """
    _check_power(power)
    if plan.difference == 0:
        raise StatisticsError(f"both rates are {plan.untreated:g}: no number of items tells them apart.")
    low, high = 1, 2
    while power_of(replace(plan, word_pairs=high)) < power:
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            raise StatisticsError(f"no number of word pairs (up to {MOST_PAIRS}) reaches a power of {power:g} with {plan.templates} "
                                  f"templates and a template_icc of {plan.template_icc:g}: plan more templates.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(replace(plan, word_pairs=middle)) >= power else (middle, high)
    return replace(plan, word_pairs=high)


def smallest_difference(plan: Plan, power: float = 0.8) -> float:
    """The smallest fall of the rate, below `plan.untreated`, that the plan's items show with the power; NaN where they show none at all.

    The plan's `treated` is not used; its discordant share, if given, is held (and bounds the difference).
    """
    _check_power(power)
    least, most = 0.0, plan.untreated
    if plan.discordant is not None:    # where this share is possible at all: see `Plan`
        least = max(0.0, plan.discordant - 2 * (1 - plan.untreated))
        most = min(plan.discordant, plan.untreated, 2 * plan.untreated - plan.discordant)
    if most <= least:
        return float("nan")

    def reached(fall: float) -> bool:
        return power_of(replace(plan, treated=plan.untreated - fall)) >= power

    if not reached(most):
        return float("nan")
    low, high = least, most
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@takes(StatisticsError)
def plan_from_pilot(rows: pd.DataFrame, treated: str, *, baseline: str = BASELINE, between: str = "treatment", item: Names = ITEM,
                    alpha: Chance = 0.05) -> Plan:
    """The plan that a pilot's rows (one model, one kind) show: rates, discordant share, both correlations and the design as it was.

    Correlations are moments: products of the items' changes within a word pair but across templates, and within a template but across word
    pairs, both corrected for the mean being estimated; below 0 they count as 0. A variance between few clusters comes out too small more
    often than not, and a plan from it promises too much: each is therefore divided by the median of chi-square over its degrees of freedom,
    so that half of all pilots promise more than the truth and half less. Pilots of few templates tell little about template_icc.

    Errors: StatisticsError as in `paired`, and where fewer than two word pairs are valid under both treatments.
    """
    require(rows, [*CLUSTERS, "outcome"])
    both = paired(rows, treated, baseline=baseline, between=between, item=tuple(dict.fromkeys([*item, *CLUSTERS])), values=["outcome"])
    both = both[(both["outcome_baseline"] != "invalid") & (both["outcome_treated"] != "invalid")]
    before, after = ((both[f"outcome_{side}"] == "stereotyped").to_numpy(float) for side in ("baseline", "treated"))
    pair, template = (pd.factorize(both[name])[0] for name in CLUSTERS)
    n_pairs, n_templates = (int(code.max()) + 1 if len(code) else 0 for code in (pair, template))
    if n_pairs < 2:
        raise StatisticsError(f"the pilot has {n_pairs} word pairs that are valid under both treatments: expected 2 at least.")
    icc, template_icc = _correlations(after - before, pair, template, n_pairs, n_templates)
    return Plan(float(before.mean()), float(after.mean()), float((before != after).mean()), icc, template_icc, n_pairs, n_templates,
                max(1, round(len(both) / (n_pairs * n_templates))), alpha)


def _correlations(change: np.ndarray, pair: np.ndarray, template: np.ndarray, n_pairs: int, n_templates: int) -> tuple[float, float]:
    residual = change - change.mean()
    cell = pd.factorize(pair * n_templates + template)[0] if n_templates > 1 else np.arange(len(change))
    moments = [_across(residual, code, cell) for code in (pair, template)]
    total = float((residual**2).mean())
    # Each moment is a component less the variance v of the mean, and v is made of the components: three linear equations.
    share = np.array([1 / n_pairs, 1 / n_templates, 1 / len(change)])
    system = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1]]) - share
    words, templates, own = np.linalg.solve(system, [*moments, total]) if n_templates > 1 else (moments[0], 0.0, total - moments[0])
    own = max(own, 0.0)
    words, templates = (_at_the_median(part, own * k / len(change), k) for part, k in ((words, n_pairs), (templates, n_templates)))
    sum_of = words + templates + own
    return (float(words / sum_of), float(templates / sum_of)) if sum_of > 0 else (0.0, 0.0)


def _at_the_median(between: float, noise: float, clusters: int) -> float:
    """A variance between clusters whose estimate lies as often above as below it; noise: what the items' own variance adds to a cluster."""
    from scipy.special import gammaincinv

    if clusters < 2:
        return max(between, 0.0)
    median = float(gammaincinv((clusters - 1) / 2, 0.5)) * 2 / (clusters - 1)
    return max((between + noise) / median - noise, 0.0)


def _across(residual: np.ndarray, code: np.ndarray, cell: np.ndarray) -> float:
    """The mean product of two residuals that share a cluster and not a cell; 0 where there are none."""
    sums, cells = np.bincount(code, residual), np.bincount(cell, residual)
    sizes, cell_sizes = np.bincount(code).astype(float), np.bincount(cell).astype(float)
    count = float(sizes @ sizes - cell_sizes @ cell_sizes)
    return float(sums @ sums - cells @ cells) / count if count else 0.0


def _check_power(power: float) -> None:
    checked(power, _Power, "power", StatisticsError)
