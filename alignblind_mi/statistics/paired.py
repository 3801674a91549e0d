"""Two treatments on the same items: differences, slopes, their tests, and their correction for many comparisons.

It reads tidy rows (one per answer, or one per value of a side effect) and pairs them by item, so that what makes one item harder than
another cancels out. It does NOT know what a treatment is, nor any group, word or model.

An item is a word pair asked in a template, so that items share words and templates (crossed dependence). McNemar's test holds only as
long as the treatment acts on every item alike; once its effect differs between templates or words it takes chance for effect. So there is
one procedure for few and many items, `intervals.change_test`, and one for continuous values, `intervals.mean_test`: both ask whether the
difference would be there with other words and templates too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from alignblind_mi.borders.settings import Chance, Draws, Names, Seed, takes
from alignblind_mi.intervals.clustered import LEVEL, StatisticsError, change_test, mean_test, rate_interval
from alignblind_mi.statistics.rates import CLUSTERS, bounds, groups, require

ITEM = ("concept", "cue", "kind", "category", "template", "option_order", "word_order", "statement", "word_pair", "marked", "unmarked")
BASELINE = "untreated"
DRAWS = 2000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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


# --- tables ---------------------------------------------------------------------------------------------------------------------------


@takes(StatisticsError)
def paired_differences(rows: pd.DataFrame, *, baseline: str = BASELINE, between: str = "treatment", by: Names = ("model", "kind"),
                       item: Names = ITEM, cluster: Names = CLUSTERS, level: Chance = LEVEL) -> pd.DataFrame:
    """How much does each treatment change the stereotyped rate and the log-odds? One row per group and treatment, against `baseline`.

    Columns: `by`, `between`, baseline; n_items (shared), n_unpaired (left out), n (valid under both), n_discordant, n_less, n_more
    (discordant items by direction of stereotyping), invalid_baseline, invalid (shares of the shared items); rate_baseline, rate, difference
    (all over the n), low, high, p (`intervals.change_test`, so that p < 1 - level just where the interval leaves out 0), clustered_over
    (the `cluster` columns with two levels or more among the n); bound_low, bound_high (the difference over all shared items, had every
    invalid answer gone one way or the other); log_odds (mean change, nats), log_odds_low, log_odds_high, log_odds_p
    (`intervals.mean_test`), n_log_odds.

    Templates and word pairs both count as drawn from more of their kind; with cluster=("word_pair",) the statement is about these
    templates only, and sharper.

    Errors: StatisticsError as in `paired`, for an unknown outcome, and where there is nothing to compare with the baseline.
    """
    logs = ["log_odds"] if "log_odds" in rows.columns else []
    require(rows, [between, *by, *cluster, "outcome"], numbers=logs)
    values = ["outcome", *logs]
    records = []
    for key, name, both in _comparisons(rows, baseline, between, by, [*item, *cluster], values):
        labels = [both[variable].to_numpy() for variable in cluster]
        record = {**key, between: name, "baseline": baseline, **_rates(both, cluster, level)}
        if "log_odds" in values:
            change = both["log_odds_treated"].to_numpy(float) - both["log_odds_baseline"].to_numpy(float)
            found = mean_test(change, labels, level=level)
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
    (`intervals.mean_test`; by default every item is its own cluster, which makes it Student's paired test).

    Errors: StatisticsError as in `paired`, and for more than two cluster variables.
    """
    require(rows, [between, *by, *cluster, value], numbers=[value])
    records = []
    for key, name, both in _comparisons(rows, baseline, between, by, [*item, *cluster], [value]):
        before, after = (both[f"{value}_{side}"].to_numpy(float) for side in ("baseline", "treated"))
        known = np.isfinite(before) & np.isfinite(after)
        found = mean_test(np.where(known, after - before, np.nan), [both[variable].to_numpy() for variable in cluster], level=level)
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

    Columns: `by`, n, mean, low, high (`intervals.mean_test`), sd, q05 ... q95 (nats), n_wrong (change above 0), wrong, wrong_low,
    wrong_high (share of the n and its interval, `intervals.rate_interval` over the `cluster` columns).

    Errors: StatisticsError for a missing column.
    """
    require(slopes, [*by, *cluster, "change"], numbers=["change"])
    records = []
    for key, group in groups(slopes, by):
        change = group["change"].to_numpy(float)
        labels = [group[variable].to_numpy() for variable in cluster]
        found, share = mean_test(change, labels, level=level), rate_interval((change > 0).astype(float), labels, level=level)
        wrong = int((change > 0).sum())
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
    """[draw, treatment]: differences of stereotyped rates under resampled clusters, the same draw of clusters for all treatments.

    So treatments can be compared with each other, and intervals carried through what is computed from several of them
    (`frontier.equal_damage`). Every cluster variable is resampled by itself (the pigeonhole bootstrap of Owen 2007), which says what
    treatments have in common but is too narrow with few templates: each treatment's draws are therefore spread about its difference
    until 95 % of them are as wide as its interval in `paired_differences`. The rows are of one model and one kind.

    Errors: StatisticsError as in `paired`.
    """
    require(rows, [between, *cluster, "outcome"])
    levels = [pd.Index(rows[variable].unique()).sort_values() for variable in cluster]
    random, found = np.random.default_rng(seed), {}
    counts = [random.multinomial(len(index), np.full(len(index), 1 / len(index)), size=draws).astype(float) for index in levels]
    noise = random.normal(size=draws)    # for a treatment that changed no item, or all of them alike
    for _, name, both in _comparisons(rows, baseline, between, (), [*item, *cluster], ["outcome"]):
        change, valid = _change(both)
        codes = [index.get_indexer(both[variable]) for index, variable in zip(levels, cluster, strict=True)]
        drawn = _resampled(change, valid, codes, counts)
        test = change_test(change, [both[variable].to_numpy() for variable in cluster], valid=valid)
        known = drawn[np.isfinite(drawn)]
        width = float(np.diff(np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))[0]) if len(known) else 0.0
        unit = (drawn - test.estimate) / width if width > 0 else noise / float(np.diff(np.quantile(noise, [0.025, 0.975]))[0])
        found[name] = test.estimate + unit * (test.high - test.low)
    return pd.DataFrame(found)


def _resampled(values: Float[np.ndarray, " n"], valid: np.ndarray, codes: Sequence[np.ndarray],
               counts: Sequence[np.ndarray]) -> Float[np.ndarray, " draw"]:
    """Means of the valid values, each as often as its clusters were drawn (counts: [draw, level] a variable); NaN for a draw of none."""
    levels = [count.shape[1] for count in counts]
    cell = np.ravel_multi_index(list(codes), levels)
    sums = []
    for part in (values * valid, valid.astype(float)):
        cells = np.bincount(cell, part, minlength=int(np.prod(levels))).reshape(levels)
        axes = range(1, cells.ndim + 1)
        operands = [operand for axis, count in zip(axes, counts, strict=True) for operand in (count, [0, axis])]
        sums.append(np.einsum(cells, list(axes), *operands, [0], optimize=True))
    return np.divide(sums[0], sums[1], out=np.full(len(sums[0]), np.nan), where=sums[1] > 0)


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


def _rates(both: pd.DataFrame, cluster: Sequence[str], level: float) -> dict[str, object]:
    change, valid = _change(both)
    kept, n = change[valid], int(valid.sum())
    less, more = int((kept < 0).sum()), int((kept > 0).sum())
    before = int((both["outcome_baseline"][valid] == "stereotyped").sum())
    labels = [both[variable].to_numpy() for variable in cluster]
    test = change_test(change, labels, valid=valid, level=level)
    sides = [bounds(int((both[side] == "stereotyped").sum()), int((both[side] == "invalid").sum()), len(both))
             for side in ("outcome_baseline", "outcome_treated")]
    return {
        "n_items": len(both), "n_unpaired": both.attrs["unpaired"], "n": n, "n_discordant": less + more, "n_less": less, "n_more": more,
        "invalid_baseline": float((both["outcome_baseline"] == "invalid").mean()),
        "invalid": float((both["outcome_treated"] == "invalid").mean()),
        "rate_baseline": before / n if n else float("nan"), "rate": (before + more - less) / n if n else float("nan"),
        "difference": (more - less) / n if n else float("nan"), "low": test.low, "high": test.high, "p": test.p,
        "clustered_over": "+".join(name for name, label in zip(cluster, labels, strict=True) if len(np.unique(label[valid])) > 1),
        "bound_low": sides[1].worst - sides[0].best, "bound_high": sides[1].best - sides[0].worst,
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
