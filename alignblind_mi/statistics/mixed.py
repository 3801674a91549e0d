"""A mixed logistic model of the answers: association, position and treatment, with random intercepts of word pairs and templates.

It reads judged rows of implicit prompts. It does NOT know how an answer was judged or what a treatment is, and it takes a treatment's
effect to be the same, in log-odds, for all word pairs and templates: where it is not, intervals of changes are too narrow, and
`paired.paired_differences` is the one to report.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from alignblind_mi.intervals.clustered import LEVEL, StatisticsError
from alignblind_mi.statistics.rates import CLUSTERS, first_with_first, require

Method = Literal["statsmodels", "bambi"]
METHODS: tuple[Method, ...] = ("statsmodels", "bambi")
EFFECT_SD = 5.0     # prior of fixed effects: normal, in log-odds; wide beside log-odds of 3.5 (97 %)
SPREAD_SD = 1.0     # prior of the logarithm of the random intercepts' standard deviations: normal


class _Design(NamedTuple):
    """What a fit is given: outcomes [answer], fixed effects [answer, effect] with their names, and group codes [answer] by variable."""

    outcome: Float[np.ndarray, " answer"]
    fixed: Float[np.ndarray, "answer effect"]
    names: list[str]
    groups: dict[str, Int[np.ndarray, " answer"]]


class _Fit(NamedTuple):
    """Fixed effects [effect] and their covariance; log of the random intercepts' standard deviations [variable], and its errors.

    df: degrees of freedom of associations, which vary with the few groups; changes and position do not.
    """

    effects: Float[np.ndarray, " effect"]
    covariance: Float[np.ndarray, "effect effect"]
    log_spread: Float[np.ndarray, " variable"]
    log_spread_sd: Float[np.ndarray, " variable"]
    df: float
    method: str


def mixed_logistic(rows: pd.DataFrame, *, baseline: str = "untreated", between: str = "treatment", position: bool = True,
                   groups: Sequence[str] = CLUSTERS, level: float = LEVEL, method: Method | str = "statsmodels") -> pd.DataFrame:
    """log-odds(stereotyped) = association under the treatment + position + word pair + template, over the valid implicit answers.

    One row per term: `association[T]` under every treatment T, with position at balance; `change[T]` from `baseline`; `position`, by how
    much more likely the stereotyped answer is where it is also the one that puts the first word with the first option; `spread[G]`, the
    standard deviation of the random intercepts of G (no interval with statsmodels, whose own held 80 % in simulations). Columns:
    term, estimate (log-odds), low, high, sd, n (answers), groups (how many of each), method.

    "statsmodels": `BinomialBayesMixedGLM` by variational Bayes gives estimates and spreads. Its own errors of fixed effects take these as
    independent of the random intercepts and are too small (associations: threefold), so the covariance is Laplace's instead: the inverse of
    the joint curvature in fixed and random effects (Breslow and Clayton 1993), at the mean squared spreads. Associations, which speak of
    other words and templates too, have Student's intervals with Satterthwaite's degrees of freedom from the numbers of groups.
    "bambi" draws from the posterior (pip install 'alignblind-mi[bayes]'). Priors: `EFFECT_SD`; `SPREAD_SD` (statsmodels) or Bambi's own.

    Errors: StatisticsError where one outcome is all there is, overall or within what a term tells apart (the log-odds are then infinite),
    for one order of options and words only (pass position=False), and as the names say.
    """
    if method not in METHODS:
        raise StatisticsError(f"unknown method {method!r}; known: {', '.join(METHODS)}.")
    require(rows, [between, *groups, "kind", "outcome", *(["option_order", "word_order"] if position else [])])
    valid = rows[(rows["kind"] == "implicit") & rows["outcome"].isin(["stereotyped", "reversed"])]
    names = [str(name) for name in valid[between].unique()]
    if baseline not in names:
        raise StatisticsError(f"no valid implicit answer has {between} {baseline!r}; there is {', '.join(names) or 'none'}.")
    treated = [name for name in names if name != baseline]
    design = _design(valid, baseline, treated, between, position, groups)
    _refuse_separation(design)
    fit = _statsmodels(design) if method == "statsmodels" else _bambi(design)
    return _table(design, fit, baseline, treated, level)


def _design(valid: pd.DataFrame, baseline: str, treated: list[str], between: str, position: bool, groups: Sequence[str]) -> _Design:
    columns = [np.ones(len(valid)), *((valid[between] == name).to_numpy(float) for name in treated)]
    names = [f"association[{baseline}]", *(f"change[{name}]" for name in treated)]
    if position:
        agrees = first_with_first(valid)
        if agrees.nunique() < 2:
            raise StatisticsError("association and position are one and the same here: the stereotyped answer is always, or never, the one "
                                  "that puts the first word with the first option. Ask the balanced design, or pass position=False.")
        columns.append(agrees.to_numpy(float) - 0.5)
        names.append("position")
    codes = {name: pd.factorize(valid[name])[0] for name in groups}
    single = [name for name, code in codes.items() if code.max() == 0]
    if single:
        raise StatisticsError(f"{single[0]!r} has one level only, which has no spread: leave it out of `groups`.")
    return _Design((valid["outcome"] == "stereotyped").to_numpy(float), np.column_stack(columns), names, codes)


def _refuse_separation(design: _Design) -> None:
    """StatisticsError if some fixed effect has no finite estimate (Albert and Anderson 1984), found by a linear programme (Konis 2007)."""
    from scipy.optimize import linprog

    if len(np.unique(design.outcome)) < 2:
        only = "stereotyped" if design.outcome[0] else "reversed"
        raise StatisticsError(f"all {len(design.outcome)} valid answers are {only}: log-odds are infinite and no model can be fitted. "
                              f"Report the rate with its interval.")
    signed = np.unique(design.fixed * np.where(design.outcome == 1, 1, -1)[:, None], axis=0)
    found: Any = linprog(-signed.sum(0), A_ub=-signed, b_ub=np.zeros(len(signed)), bounds=(-1, 1))
    if found.fun < -1e-9:
        terms = [name for name, value in zip(design.names, found.x, strict=True) if abs(value) > 1e-9]
        raise StatisticsError(f"the answers are separated: {', '.join(terms)} would be infinite, because some combination of treatment and "
                              f"order has one outcome only. Leave that treatment out, or report `paired_differences`.")


def _statsmodels(design: _Design) -> _Fit:
    from scipy.sparse import csr_matrix, hstack
    from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM

    n = len(design.outcome)
    indicators = [csr_matrix((np.ones(n), (np.arange(n), code))) for code in design.groups.values()]
    owner = np.repeat(np.arange(len(indicators)), [part.shape[1] for part in indicators])
    random = hstack(indicators).tocsr()
    found: Any = BinomialBayesMixedGLM(design.outcome, design.fixed, random, owner, vcp_p=SPREAD_SD, fe_p=EFFECT_SD).fit_vb()
    everything = np.hstack([design.fixed, random.toarray()])
    chance = 1 / (1 + np.exp(-everything @ np.concatenate([found.fe_mean, found.vc_mean])))
    variance = np.exp(2 * (found.vcp_mean + found.vcp_sd**2))    # the mean of the squared spread, which is log-normal
    prior = np.concatenate([np.full(len(design.names), EFFECT_SD**2), variance[owner]])
    curvature = (everything.T * (chance * (1 - chance))) @ everything + np.diag(1 / prior)
    k, levels = len(design.names), np.bincount(owner)
    covariance = np.linalg.inv(curvature)[:k, :k]
    df = float(covariance[0, 0] ** 2 / np.sum((variance / levels) ** 2 / (levels - 1)))
    return _Fit(found.fe_mean, covariance, found.vcp_mean, np.full(len(levels), np.nan), df, "variational Bayes, Laplace errors")


def _bambi(design: _Design) -> _Fit:
    try:
        import bambi
    except ImportError:
        raise StatisticsError("method 'bambi' needs Bambi, which is not installed: pip install 'alignblind-mi[bayes]'.") from None
    effects, variables = [f"x{i}" for i in range(1, len(design.names))], [f"g{i}" for i in range(len(design.groups))]
    data = pd.DataFrame({"hit": design.outcome.astype(int), **dict(zip(effects, design.fixed.T[1:], strict=True)),
                         **dict(zip(variables, design.groups.values(), strict=True))})
    formula = " + ".join(["hit ~ 1", *effects, *(f"(1|{name})" for name in variables)])
    priors = {name: bambi.Prior("Normal", mu=0, sigma=EFFECT_SD) for name in ("Intercept", *effects)}
    model = bambi.Model(formula, data, family="bernoulli", priors=priors, center_predictors=False)
    posterior = model.fit(random_seed=0, target_accept=0.95, progressbar=False)["posterior"]
    drawn = np.column_stack([posterior[name].to_numpy().ravel() for name in ("Intercept", *effects)])
    spread = np.log(np.column_stack([posterior[f"1|{name}_sigma"].to_numpy().ravel() for name in variables]))
    return _Fit(drawn.mean(0), np.atleast_2d(np.cov(drawn.T)), spread.mean(0), spread.std(0), float("inf"), "posterior draws (Bambi)")


def _table(design: _Design, fit: _Fit, baseline: str, treated: list[str], level: float) -> pd.DataFrame:
    from scipy.special import ndtri, stdtrit

    z = float(ndtri((1 + level) / 2))
    t = float(stdtrit(fit.df, (1 + level) / 2)) if np.isfinite(fit.df) else z
    combined = {f"association[{baseline}]": {0: 1.0}}
    combined |= {f"association[{name}]": {0: 1.0, i: 1.0} for i, name in enumerate(treated, 1)}
    combined |= {name: {i: 1.0} for i, name in enumerate(design.names) if i}
    records = []
    for term, parts in combined.items():
        weights = np.array([parts.get(i, 0.0) for i in range(len(design.names))])
        estimate, sd = float(weights @ fit.effects), float(np.sqrt(weights @ fit.covariance @ weights))
        half = (t if 0 in parts else z) * sd
        records.append({"term": term, "estimate": estimate, "low": estimate - half, "high": estimate + half, "sd": sd})
    for name, middle, sd in zip(design.groups, fit.log_spread, fit.log_spread_sd, strict=True):
        low, high = (float(np.exp(middle + side * z * sd)) for side in (-1, 1))
        estimate = float(np.exp(middle))
        records.append({"term": f"spread[{name}]", "estimate": estimate, "low": low, "high": high, "sd": estimate * float(sd)})
    groups = ", ".join(f"{name}: {int(code.max()) + 1}" for name, code in design.groups.items())
    return pd.DataFrame.from_records(records).assign(n=len(design.outcome), groups=groups, method=fit.method)
