"""Two treatments on the same items: differences, slopes, exact and clustered tests, and their correction for many comparisons.

It reads tidy rows (one per answer, or one per value of a side effect) and pairs them by item, so that what makes one item harder than
another cancels out. It does NOT know what a treatment is, nor any group, word or model.

Which test, and when. An item is a word pair asked in a template, so that items share words and templates (crossed dependence). McNemar's
test holds exactly as long as the treatment acts on every item alike; once its effect differs between templates or words it takes chance
for effect. The two-way clustered test allows for that, and asks whether the difference would be there with other words and templates too.
`paired_differences` uses it wherever counts allow, and McNemar's where they do not; which one, it says in each row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from alignblind_mi.borders.settings import Chance, Draws, Names, Seed, takes
from alignblind_mi.statistics.rates import (
    CLUSTERS,
    DRAWS,
    LEVEL,
    Interval,
    StatisticsError,
    bounds,
    clustered_draws,
    clustered_interval,
    coded,
    exact_interval,
    groups,
    require,
)

ITEM = ("concept", "cue", "kind", "category", "template", "option_order", "word_order", "statement", "word_pair", "marked", "unmarked")
BASELINE = "untreated"
FEWEST = 10    # items off the commonest change, below which no normal approximation is used (tests: error rates on either side of it)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_CLUSTERS = 2


class MeanTest(NamedTuple):
    """An estimate, its interval and its two-sided p-value against 0; `df` are the degrees of freedom, `se` the standard error."""

    estimate: float
    low: float
    high: float
    p: float
    se: float
    df: float


_NOTHING = MeanTest(*[float("nan")] * 6)


# --- pairing --------------------------------------------------------------------------------------------------------------------------


@takes(StatisticsError)
def paired(rows: pd.DataFrame, treated: str, *, baseline: str = BASELINE, between: str = "treatment", item: Names = ITEM,
           values: Names = ("outcome", "log_odds")) -> pd.DataFrame:
    """The items that two treatments share, one row each: the item's columns, and every value twice, as VALUE_baseline and VALUE_treated.

    An item is what agrees in all columns of `item` (those that the rows have). In `.attrs["unpaired"]`: how many items only one has.

    Errors: StatisticsError for a missing column, a treatment without rows, an item that one treatment has twice, or no shared item.
    """
    require(rows, [between, *values])
    keys = [name for name in item if name in rows.columns and name != between]
    if not keys:
        raise StatisticsError(f"the rows have none of the columns that tell items apart ({', '.join(item)}): pass `item`.")
    sides = [_side(rows, name, between, keys, values) for name in (baseline, treated)]
    found = sides[0].merge(sides[1], on=keys, how="inner", suffixes=("_baseline", "_treated"))
    if found.empty:
        raise StatisticsError(f"{treated!r} and {baseline!r} share no item: they were asked different prompts "
                              f"(an item is what agrees in {', '.join(keys)}).")
    found.attrs["unpaired"] = len(sides[0]) + len(sides[1]) - 2 * len(found)
    return found


def _side(rows: pd.DataFrame, name: str, between: str, keys: list[str], values: Sequence[str]) -> pd.DataFrame:
    side = rows.loc[rows[between] == name, [*keys, *values]]
    if side.empty:
        known = ", ".join(map(str, rows[between].unique()))
        raise StatisticsError(f"no row has {between} {name!r}; the rows have: {known or 'none'}.")
    twice = side.duplicated(keys)
    if twice.any():
        example = side.loc[twice, keys].iloc[0].to_dict()
        raise StatisticsError(f"{int(twice.sum())} rows of {name!r} repeat an item, such as {example}: select one sample or model, "
                              f"or name the column that tells them apart in `item`.")
    return side


# --- tests ----------------------------------------------------------------------------------------------------------------------------


def clustered_test(values: Float[np.ndarray, " n"], clusters: Sequence[Shaped[np.ndarray, " n"]], *, level: float = LEVEL) -> MeanTest:
    """Student's test of a mean against 0 with one or two crossed cluster variables (labels), such as word pair and template.

    The variance is that of Cameron, Gelbach and Miller (2011): by the first variable, plus by the second, less by their cells; never less
    than any of the three, each with its factor k / (k - 1). Degrees of freedom after Satterthwaite, from those of the variables (levels
    less one): few templates cost much where they differ, little where they do not. One variable: `statistics.t_interval`. NaN values are
    left out; a variable with one level adds nothing; all NaN where none has two. Values that all agree give no width and, unless they
    are 0, no p-value.

    Errors: StatisticsError for more than two cluster variables.
    """
    from scipy.special import stdtr, stdtrit

    if len(clusters) > _MOST_CLUSTERS:
        raise StatisticsError(f"clustered_test takes one or two cluster variables, not {len(clusters)}.")
    known = ~np.isnan(values)
    n, values = int(known.sum()), values[known]
    codes = [pd.factorize(coded(labels, len(known))[known])[0] for labels in clusters]
    codes = [code for code in codes if n and code.max() > 0]
    if not codes:
        return _NOTHING
    mean = float(values.mean())
    parts = [_variance(values - mean, code) for code in codes]
    variance = max(parts)
    if len(codes) == _MOST_CLUSTERS:
        cells = _variance(values - mean, pd.factorize(codes[0] * (int(codes[1].max()) + 1) + codes[1])[0])
        variance = max(variance, cells, sum(parts) - cells)
    if variance <= np.finfo(float).eps * mean**2:
        return MeanTest(mean, mean, mean, 1.0 if mean == 0 else float("nan"), 0.0, float("nan"))
    spent = sum(part**2 / int(code.max()) for part, code in zip(parts, codes, strict=True))
    df, se = min(variance**2 / spent, n - 1.0) if spent else n - 1.0, float(np.sqrt(variance))
    half = float(stdtrit(df, (1 + level) / 2)) * se
    return MeanTest(mean, mean - half, mean + half, float(2 * stdtr(df, -abs(mean) / se)), se, float(df))


def _variance(residuals: np.ndarray, code: np.ndarray) -> float:
    """Variance of a mean from the sums of its residuals by cluster."""
    sums = np.bincount(code, residuals)
    return float(sums @ sums / len(residuals) ** 2 * len(sums) / (len(sums) - 1))


def mcnemar_p(less: int, more: int) -> float:
    """The exact two-sided p-value of McNemar (1947): are the items that changed as likely to go either way? 1 where none changed."""
    from scipy.stats import binomtest

    return float(binomtest(int(more), int(less + more), 0.5).pvalue) if less + more else 1.0


def exact_difference(less: int, more: int, n: int, *, level: float = LEVEL) -> Interval:
    """The exact interval of a paired difference of shares, (more - less) / n, from the n items' discordant ones.

    Two intervals after Clopper and Pearson, of the discordant share d = (less + more) / n and of q = more / (less + more), each at the
    square root of the level; the ends are the extremes of d (2 q - 1) within both. Given the discordant items the two hold independently of
    each other, so that together they hold with the level at least. Items count as independent.

    Errors: StatisticsError for counts below 0 or beyond n.
    """
    if min(less, more) < 0 or less + more > n:
        raise StatisticsError(f"{less} and {more} discordant of {n} items: expected counts of at least 0 that add up to {n} at most.")
    share, lean = (exact_interval(*counts, float(np.sqrt(level))) for counts in ((less + more, n), (more, less + more)))
    ends = [d * (2 * q - 1) for d in share for q in lean]
    return Interval(float(min(ends)), float(max(ends)))


# --- tables ---------------------------------------------------------------------------------------------------------------------------


@takes(StatisticsError)
def paired_differences(rows: pd.DataFrame, *, baseline: str = BASELINE, between: str = "treatment", by: Names = ("model", "kind"),
                       item: Names = ITEM, cluster: Names = CLUSTERS, level: Chance = LEVEL, draws: Draws = DRAWS,
                       seed: Seed = 0) -> pd.DataFrame:
    """How much does each treatment change the stereotyped rate and the log-odds? One row per group and treatment, against `baseline`.

    Columns: `by`, `between`, baseline; n_items (shared), n_unpaired (left out), n (valid under both), n_discordant, n_less, n_more
    (discordant items by direction of stereotyping), invalid_baseline, invalid (shares of the shared items); rate_baseline, rate, difference
    (all over the n), low, high, p, interval; cluster_low, cluster_high (pigeonhole bootstrap over `cluster`), clustered_over; p_mcnemar;
    bound_low, bound_high (the difference over all shared items, had every invalid answer gone one way or the other); log_odds (mean change,
    nats), log_odds_low, log_odds_high, log_odds_p (`clustered_test`), n_log_odds.

    `interval` names where low, high and p come from: "clustered" is `clustered_test`; "exact" are `exact_difference` and `mcnemar_p`, taken
    where fewer than `FEWEST` items differ from the commonest change or nothing clusters. Templates and word pairs both count as drawn from
    more of their kind; with cluster=("word_pair",) the statement is about these templates only, and sharper.
    The pigeonhole bootstrap is wider than need be where clusters matter little, and too narrow with few templates (tests/test_paired.py).

    Errors: StatisticsError as in `paired`, for an unknown outcome, and where there is nothing to compare with the baseline.
    """
    logs = ["log_odds"] if "log_odds" in rows.columns else []
    require(rows, [between, *by, *cluster, "outcome"], numbers=logs)
    values = ["outcome", *logs]
    records = []
    for key, name, both in _comparisons(rows, baseline, between, by, [*item, *cluster], values):
        labels = [both[variable].to_numpy() for variable in cluster]
        record = {**key, between: name, "baseline": baseline, **_rates(both, labels, level)}
        record |= _bootstrapped(both, cluster, labels, level, draws, seed)
        if "log_odds" in values:
            change = both["log_odds_treated"].to_numpy(float) - both["log_odds_baseline"].to_numpy(float)
            found = clustered_test(change, labels, level=level)
            record |= {"log_odds": found.estimate, "log_odds_low": found.low, "log_odds_high": found.high, "log_odds_p": found.p,
                       "n_log_odds": int(np.isfinite(change).sum())}
        records.append(record)
    return pd.DataFrame.from_records(records)


@takes(StatisticsError)
def paired_means(rows: pd.DataFrame, *, baseline: str = BASELINE, between: str = "treatment", by: Names = ("measure",),
                 value: str = "value", item: Names = ("item",), cluster: Names = ("item",),
                 level: Chance = LEVEL) -> pd.DataFrame:
    """`paired_differences` of any measured value, such as a side effect ([treatment, measure, item, value]), in the value's own unit.

    Columns: `by`, `between`, baseline, n_items, n_unpaired, n (both values known), mean_baseline, mean, difference, low, high, p
    (`clustered_test`; by default every item is its own cluster, which makes it Student's paired test).

    Errors: StatisticsError as in `paired`, and for more than two cluster variables.
    """
    require(rows, [between, *by, *cluster, value], numbers=[value])
    records = []
    for key, name, both in _comparisons(rows, baseline, between, by, [*item, *cluster], [value]):
        before, after = (both[f"{value}_{side}"].to_numpy(float) for side in ("baseline", "treated"))
        known = np.isfinite(before) & np.isfinite(after)
        found = clustered_test(np.where(known, after - before, np.nan), [both[variable].to_numpy() for variable in cluster], level=level)
        records.append({**key, between: name, "baseline": baseline, "n_items": len(both), "n_unpaired": both.attrs["unpaired"],
                        "n": int(known.sum()), "mean_baseline": _mean(before[known]), "mean": _mean(after[known]),
                        "difference": _mean((after - before)[known]), "low": found.low, "high": found.high, "p": found.p})
    return pd.DataFrame.from_records(records)


@takes(StatisticsError)
def item_slopes(rows: pd.DataFrame, *, baseline: str = BASELINE, between: str = "treatment", by: Names = ("model", "kind"),
                item: Names = ITEM) -> pd.DataFrame:
    """The change in log-odds (nats) of every shared item, one row each: `by`, `between`, the item's columns, before, after, change.

    Items without log-odds (explicit ones) are left out.

    Errors: StatisticsError as in `paired`.
    """
    require(rows, [between, *by, "log_odds"], numbers=["log_odds"])
    asked = rows[rows["log_odds"].notna()]
    parts = []
    for key, name, both in _comparisons(asked, baseline, between, by, item, ["log_odds"]):
        slopes = both.rename(columns={"log_odds_baseline": "before", "log_odds_treated": "after"})
        slopes["change"] = slopes["after"].to_numpy(float) - slopes["before"].to_numpy(float)
        labels: dict[str, Any] = {**key, between: name}
        parts.append(slopes.assign(**labels)[[*by, between, *(c for c in slopes.columns if c not in by)]])
    return pd.concat(parts, ignore_index=True)


@takes(StatisticsError)
def summarise_slopes(slopes: pd.DataFrame, *, by: Names = ("model", "kind", "treatment"), cluster: Names = CLUSTERS,
                     level: Chance = LEVEL) -> pd.DataFrame:
    """One row per group of `item_slopes`: how the items' changes are spread, and how many go the wrong way (more stereotyped).

    Columns: `by`, n, mean, low, high (`clustered_test`), sd, q05 ... q95 (nats), n_wrong (change above 0), wrong, wrong_low, wrong_high
    (share of the n and its exact interval, items as independent).

    Errors: StatisticsError for a missing column.
    """
    require(slopes, [*by, *cluster, "change"], numbers=["change"])
    records = []
    for key, group in groups(slopes, by):
        change = group["change"].to_numpy(float)
        found = clustered_test(change, [group[variable].to_numpy() for variable in cluster], level=level)
        wrong = int((change > 0).sum())
        share = exact_interval(wrong, len(change), level)
        spread: dict[str, object] = {f"q{round(100 * q):02d}": float(np.quantile(change, q)) for q in QUANTILES}
        records.append({**key, "n": len(change), "mean": float(change.mean()), "low": found.low, "high": found.high,
                        "sd": float(change.std(ddof=1)) if len(change) > 1 else float("nan"), **spread, "n_wrong": wrong,
                        "wrong": wrong / len(change), "wrong_low": share.low, "wrong_high": share.high})
    return pd.DataFrame.from_records(records)


def corrected(table: pd.DataFrame, *, p: str = "p", family: Sequence[str] = ()) -> pd.DataFrame:
    """The table with its p-values corrected for being many: columns P_holm, P_bh and P_family added (P is the column's name).

    Holm (1979) bounds the chance of any false claim, whatever the dependence; Benjamini and Hochberg (1995) the expected share of false
    claims among all, for independent or positively dependent tests. A family is the whole table, or each group of the columns `family`;
    P_family is its size, without rows whose p-value is NaN (these stay NaN).

    Errors: StatisticsError for a missing column or p-values outside of 0 to 1.
    """
    from statsmodels.stats.multitest import multipletests

    require(table, [p, *family], numbers=[p])
    known = table[p].notna()
    wrong = table.loc[known & ~table[p].between(0, 1), p]
    if len(wrong):
        raise StatisticsError(f"the column {p!r} holds {float(wrong.iloc[0])}, which is no p-value: expected numbers from 0 to 1.")
    out = table.reset_index(drop=True)
    for name in ("holm", "bh"):
        out[f"{p}_{name}"] = np.nan
    out[f"{p}_family"] = 0
    for _, group in groups(out, family):
        index = group.index[group[p].notna()]
        out.loc[group.index, f"{p}_family"] = len(index)
        for name, method in (("holm", "holm"), ("bh", "fdr_bh")):
            if len(index):
                out.loc[index, f"{p}_{name}"] = multipletests(out.loc[index, p].to_numpy(float), method=method)[1]
    return out.set_axis(table.index)


@takes(StatisticsError)
def difference_draws(rows: pd.DataFrame, *, baseline: str = BASELINE, between: str = "treatment", item: Names = ITEM,
                     cluster: Names = CLUSTERS, draws: Draws = DRAWS, seed: Seed = 0) -> pd.DataFrame:
    """[draw, treatment]: the pigeonhole bootstrap's differences of stereotyped rates, the same draw of clusters for all treatments.

    So treatments can be compared with each other, and intervals carried through what is computed from several of them
    (`frontier.equal_damage`). The rows are of one model and one kind.

    Errors: StatisticsError as in `paired`.
    """
    require(rows, [between, *cluster, "outcome"])
    levels = [pd.Index(rows[variable].unique()).sort_values() for variable in cluster]
    found = {}
    for _, name, both in _comparisons(rows, baseline, between, (), [*item, *cluster], ["outcome"]):
        change, valid = _change(both)
        codes = [index.get_indexer(both[variable]) for index, variable in zip(levels, cluster, strict=True)]
        found[name] = clustered_draws(change, codes, valid=valid, levels=[len(index) for index in levels], draws=draws, seed=seed)
    return pd.DataFrame(found)


def _comparisons(rows: pd.DataFrame, baseline: str, between: str, by: Sequence[str], item: Sequence[str],
                 values: Sequence[str]) -> list[tuple[dict[str, object], str, pd.DataFrame]]:
    """(group, treatment, shared items) of every treatment but the baseline, in the order of the rows."""
    found = []
    for key, group in groups(rows, by):
        for name in group[between].unique():
            if name != baseline:
                found.append((key, str(name), paired(group, name, baseline=baseline, between=between, item=tuple(dict.fromkeys(item)),
                                                     values=values)))
    if not found:
        raise StatisticsError(f"nothing to compare with {baseline!r}: the rows have no other {between}.")
    return found


def _change(both: pd.DataFrame) -> tuple[Float[np.ndarray, " item"], np.ndarray]:
    """([item] change in stereotyping: -1, 0 or 1, [item] whether both answers are valid)."""
    before, after = both["outcome_baseline"], both["outcome_treated"]
    change: np.ndarray = (after == "stereotyped").to_numpy(float) - (before == "stereotyped").to_numpy(float)
    return change, ((before != "invalid") & (after != "invalid")).to_numpy()


def _rates(both: pd.DataFrame, labels: Sequence[np.ndarray], level: float) -> dict[str, object]:
    change, valid = _change(both)
    kept, n = change[valid], int(valid.sum())
    less, more = int((kept < 0).sum()), int((kept > 0).sum())
    before = int((both["outcome_baseline"][valid] == "stereotyped").sum())
    test = clustered_test(kept, [label[valid] for label in labels], level=level)
    if min(less + more, n - less, n - more) < FEWEST or not test.se > 0:
        low, high, p, interval = *exact_difference(less, more, n, level=level), mcnemar_p(less, more), "exact"
    else:
        low, high, p, interval = test.low, test.high, test.p, "clustered"
    sides = [bounds(int((both[side] == "stereotyped").sum()), int((both[side] == "invalid").sum()), len(both))
             for side in ("outcome_baseline", "outcome_treated")]
    return {
        "n_items": len(both), "n_unpaired": both.attrs["unpaired"], "n": n, "n_discordant": less + more, "n_less": less, "n_more": more,
        "invalid_baseline": float((both["outcome_baseline"] == "invalid").mean()),
        "invalid": float((both["outcome_treated"] == "invalid").mean()),
        "rate_baseline": before / n if n else float("nan"), "rate": (before + more - less) / n if n else float("nan"),
        "difference": (more - less) / n if n else float("nan"), "low": low, "high": high, "p": p if n else float("nan"),
        "interval": interval, "p_mcnemar": mcnemar_p(less, more) if n else float("nan"),
        "bound_low": sides[1].worst - sides[0].best, "bound_high": sides[1].best - sides[0].worst,
    }


def _bootstrapped(both: pd.DataFrame, cluster: Sequence[str], labels: Sequence[np.ndarray], level: float, draws: int,
                  seed: int) -> dict[str, object]:
    change, valid = _change(both)
    low, high = clustered_interval(change, labels, valid=valid, level=level, draws=draws, seed=seed)
    over = [name for name, label in zip(cluster, labels, strict=True) if len(np.unique(label[valid])) > 1]
    return {"cluster_low": low, "cluster_high": high, "clustered_over": "+".join(over)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
