"""Worlds in which the truth is known: answers of word pairs crossed with templates, and the procedures that intervals are held against.

The fast tests (tests/intervals) and the figure of the documentation (error_rates.py) simulate in the same worlds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import brentq
from scipy.special import expit, logit, stdtr, stdtrit
from scipy.stats import binomtest

from alignblind_mi.intervals.clustered import change_test, exact_interval, rate_interval

NODES, WEIGHTS = hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass(frozen=True)
class World:
    """Word pairs x templates x orders; the mean rate over all words and templates there could be; standard deviations in logits.

    effect, effect_sd: how much a treatment moves an item's logit, on average and between templates; None: as much as leaves the mean rate
    where it is. valid, valid_sd: the share of valid answers, and how it differs between templates (logits).
    """

    pairs: int = 30
    templates: int = 3
    orders: int = 4
    rate: float = 0.5
    word_sd: float = 0.0
    template_sd: float = 0.0
    effect: float | None = 0.0
    effect_sd: float = 0.0
    valid: float = 1.0
    valid_sd: float = 0.0

    @property
    def labels(self) -> list[np.ndarray]:
        """[n] word pairs and [n] templates."""
        return [index.ravel() for index in np.indices((self.pairs, self.templates, self.orders))[:2]]

    def answers(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """([n] hits, [n] valid)."""
        return self._drawn(random, expit(self._logits(random))), self._valid(random)

    def changes(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """([n] changes: -1, 0 or 1, [n] valid under both). Most items are answered alike by the same luck, so that few are discordant."""
        before = self._logits(random)
        after = before + self.shift + random.normal(0, self.effect_sd, (1, self.templates, 1))
        luck = random.random((2, self.pairs, self.templates, self.orders))
        again = np.where(random.random(luck[0].shape) < 0.7, luck[0], luck[1])
        return ((again < expit(after)).astype(float) - (luck[0] < expit(before))).ravel(), self._valid(random)

    @property
    def middle(self) -> float:
        """The mean logit, at which the mean rate is `rate`."""
        return _solved(lambda at: float(WEIGHTS @ expit(at + self._sd * NODES)) - self.rate)

    @property
    def shift(self) -> float:
        """The mean effect in logits."""
        return _balanced(self.middle, self._sd, self.effect_sd) if self.effect is None else self.effect

    @property
    def difference(self) -> float:
        """The true change of the mean rate."""
        return _change(self.middle, self._sd, self.shift, self.effect_sd)

    @property
    def _sd(self) -> float:
        return float(np.hypot(self.word_sd, self.template_sd))

    def _logits(self, random: np.random.Generator) -> np.ndarray:
        words = random.normal(0, self.word_sd, (self.pairs, 1, 1))
        return self.middle + words + random.normal(0, self.template_sd, (1, self.templates, 1)) + np.zeros((1, 1, self.orders))

    def _drawn(self, random: np.random.Generator, chance: np.ndarray) -> np.ndarray:
        return (random.random(chance.shape) < chance).astype(float).ravel()

    def _valid(self, random: np.random.Generator) -> np.ndarray:
        if self.valid == 1:
            return np.ones(self.pairs * self.templates * self.orders)
        chance = expit(logit(self.valid) + random.normal(0, self.valid_sd, (1, self.templates, 1)))
        return self._drawn(random, np.broadcast_to(chance, (self.pairs, self.templates, self.orders)))


def _solved(gap: Callable[[float], float]) -> float:
    return float(brentq(gap, -20, 20))


@cache
def _balanced(middle: float, sd: float, effect_sd: float) -> float:
    return _solved(lambda shift: _change(middle, sd, shift, effect_sd)) if effect_sd else 0.0


def _change(middle: float, sd: float, shift: float, effect_sd: float) -> float:
    before = middle + sd * NODES[:, None]
    return float(WEIGHTS @ (expit(before + shift + effect_sd * NODES) - expit(before)) @ WEIGHTS)


# ---- procedures: (values, valid, labels) -> low, high, p ---------------------------------------------------------------

Procedure = Callable[[np.ndarray, np.ndarray, list[np.ndarray]], tuple[float, float, float]]


def our_rate(hits: np.ndarray, valid: np.ndarray, labels: list[np.ndarray]) -> tuple[float, float, float]:
    found = rate_interval(hits, labels, valid=valid)
    return found.low, found.high, np.nan


def our_change(change: np.ndarray, valid: np.ndarray, labels: list[np.ndarray]) -> tuple[float, float, float]:
    found = change_test(change, labels, valid=valid)
    return found.low, found.high, found.p


def exact(hits: np.ndarray, valid: np.ndarray, labels: list[np.ndarray]) -> tuple[float, float, float]:
    """Clopper and Pearson's interval, as if answers were independent."""
    return *exact_interval(int(hits[valid > 0].sum()), int(valid.sum())), np.nan


def bootstrap(hits: np.ndarray, valid: np.ndarray, labels: list[np.ndarray], draws: int = 300) -> tuple[float, float, float]:
    """Word pairs and templates resampled, each by itself (the pigeonhole bootstrap)."""
    random, levels = np.random.default_rng(0), [int(label.max()) + 1 for label in labels]
    counts = [random.multinomial(k, np.full(k, 1 / k), size=draws).astype(float) for k in levels]
    cell = np.ravel_multi_index(labels, levels)
    sums = [np.einsum("dp,pt,dt->d", counts[0], np.bincount(cell, part, minlength=np.prod(levels)).reshape(levels), counts[1])
            for part in (hits * valid, valid)]
    drawn = (sums[0] / np.where(sums[1] > 0, sums[1], np.nan))[sums[1] > 0]
    return *(np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (0.0, 1.0)), np.nan


def two_way(values: np.ndarray, valid: np.ndarray, labels: list[np.ndarray]) -> tuple[float, float, float]:
    """The two-way variance with one quantile of Student's t, its degrees of freedom after Satterthwaite."""
    kept, codes = values[valid > 0], [np.unique(label[valid > 0], return_inverse=True)[1] for label in labels]
    codes = [code for code in codes if len(code) and code.max()]
    if not codes:
        return -1.0, 1.0, 1.0
    n, mean = len(kept), float(kept.mean())
    cells = np.unique(np.column_stack(codes), axis=0, return_inverse=True)[1].ravel()
    parts = [_variance(kept - mean, code) for code in (*codes, cells)]
    variance = max(*parts, sum(parts[:-1]) - parts[-1]) if len(codes) > 1 else parts[0]
    if variance <= 0:
        return mean, mean, np.nan
    df = min(variance**2 / sum(part**2 / code.max() for part, code in zip(parts, codes, strict=False)), n - 1)
    half = float(stdtrit(df, 0.975)) * variance**0.5
    return mean - half, mean + half, float(2 * stdtr(df, -abs(mean) / variance**0.5))


def _variance(residuals: np.ndarray, code: np.ndarray) -> float:
    sums = np.bincount(code, residuals)
    return float(sums @ sums / len(residuals) ** 2 * len(sums) / max(len(sums) - 1, 1))


def former_change(change: np.ndarray, valid: np.ndarray, labels: list[np.ndarray]) -> tuple[float, float, float]:
    """`two_way`, but McNemar's exact p where fewer than ten items differ from the commonest change."""
    less, more, n = (int((valid * part).sum()) for part in (change < 0, change > 0, np.ones(len(change))))
    low, high, p = two_way(change, valid, labels)
    if min(less + more, n - less, n - more) < 10 or high == low:
        p = binomtest(more, less + more, 0.5).pvalue if less + more else 1.0
    return low, high, p


RATES: dict[str, Procedure] = {"exact": exact, "clustered bootstrap": bootstrap, "two-way t": two_way, "ours": our_rate}
CHANGES: dict[str, Procedure] = {"former": former_change, "ours": our_change}


def rate_coverage(world: World, procedure: Procedure, n: int, seed: int = 0) -> tuple[float, float]:
    """(How often the interval holds the true rate, its mean width)."""
    random, ends = np.random.default_rng(seed), []
    for _ in range(n):
        hits, valid = world.answers(random)
        ends.append(procedure(hits, valid, world.labels)[:2])
    low, high = np.array(ends).T
    return float(((low <= world.rate) & (world.rate <= high)).mean()), float((high - low).mean())


def change_rates(world: World, procedure: Procedure, n: int, seed: int = 0) -> tuple[float, float, float]:
    """(How often the interval holds the true difference, how often p < .05, how often that and the interval disagree about 0)."""
    random, truth, found = np.random.default_rng(seed), world.difference, []
    for _ in range(n):
        change, valid = world.changes(random)
        low, high, p = procedure(change, valid, world.labels)
        found.append((low <= truth + 1e-9 and truth - 1e-9 <= high, p < 0.05, (p < 0.05) != (low > 0 or high < 0)))
    held, claimed, at_odds = np.mean(found, axis=0)
    return float(held), float(claimed), float(at_odds)
