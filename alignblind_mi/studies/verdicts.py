"""What a calibration says of each instrument: recovery, depth, causality, false alarms, coverage; and the advice that follows.

Reads the rows of `calibration.py`, one organism after the other. It does NOT run models, nor know how an instrument works.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from alignblind_mi.intervals.clustered import exact_interval, mean_interval
from alignblind_mi.studies.calibration import BEHAVIOUR_INSTRUMENTS, INSTRUMENTS, READING_INSTRUMENTS

KNOB = dict.fromkeys(READING_INSTRUMENTS, "reading") | dict.fromkeys(BEHAVIOUR_INSTRUMENTS, "behaviour")
# The smallest effect worth a claim, in the instrument's unit: a fifth of the scale from one sense to the middle, ten points of a rate.
SMALLEST = dict.fromkeys(READING_INSTRUMENTS, 0.2) | dict.fromkeys(BEHAVIOUR_INSTRUMENTS, 0.1)
FOLLOWS, ALARMS = 0.9, 0.05    # rank correlation from which an instrument follows its knob; false alarms that it may not be shown to exceed
SEPARATED = 0.25    # a decodable-only organism must show at most this share of what the causal one shows
HALF = 0.5    # an instrument's onset is the first layer with half of its largest value
SAMPLE = 30    # contexts of a simulated study, drawn with all of their units
SIMULATIONS = 400    # a member


def calibration_records(rows: pd.DataFrame, tables: Mapping[str, pd.DataFrame] | None = None) -> list[dict[str, Any]]:
    """One record per instrument, from `calibration_tables` (made here where they are not given); what cannot be computed is None.

    instrument, measures ("reading" or "behaviour"), n (organisms), seeds, spearman (mean over seeds of the rank correlation between the
    planted knob and the estimate, five settings a seed), spearman_by_seed, spearman_other_knob (of the knob that it should not follow),
    depth_error (largest distance in layers between the planted first layer and the one found), last_error (the same for the last layer,
    of instruments that claim to find it), causal_separated (whether in every seed it shows at most a quarter on the organism whose senses
    are decodable and not used of what it shows on the causal one; causal_seeds have such an organism), decodable_share (the largest of
    those shares), false_alarm_rate with its exact interval and n (see `alarm_table`), interval_alarm_rate (without asking for
    an effect of at least `smallest`), coverage (share of simulated 95 % intervals over 30 contexts that hold the truth), coverage_n,
    interval_width (their mean width).
    """
    tables = tables or calibration_tables(rows)
    return [_record(name, rows[rows["instrument"] == name], {key: table[table["instrument"] == name] for key, table in tables.items()
                                                             if "instrument" in table})
            for name in INSTRUMENTS if (rows["instrument"] == name).any()]


def calibration_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Everything that the records are made from, by name: recovery, depth_profile, depth, causal, alarms, coverage, convergence."""
    return {"recovery": recovery_table(rows), "depth_profile": depth_profile_table(rows), "depth": depth_table(rows),
            "causal": causal_table(rows), "alarms": alarm_table(rows), "coverage": coverage_table(rows),
            "convergence": convergence_table(rows)}


def _record(name: str, rows: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The record of one instrument, from its own rows and its part of the tables."""
    recovery, depth, alarms, coverage = (tables[key] for key in ("recovery", "depth", "alarms", "coverage"))
    by_seed = {int(str(key)): _rank_correlation(group["planted"], group["estimate"]) for key, group in recovery.groupby("seed")}
    other = [_rank_correlation(group["other_knob"], group["estimate"]) for _, group in recovery.groupby("seed")]
    shares = [_decodable_share(name, group) for _, group in tables["causal"].groupby("seed")]
    n, raised = len(alarms), int(alarms["alarm"].sum())
    low, high = exact_interval(raised, n)
    return _plain({
        "instrument": name, "measures": KNOB[name], "n": rows["member"].nunique(), "seeds": sorted(map(int, rows["seed"].unique())),
        "spearman": _mean(list(by_seed.values())), "spearman_by_seed": by_seed, "spearman_other_knob": _mean(other),
        "depth_error": _worst(depth["onset_error"]), "last_error": _worst(depth["last_error"]),
        "causal_separated": _separated(shares), "causal_seeds": sorted(set(rows.loc[rows["kind"] == "decodable", "seed"].tolist())),
        "decodable_share": _worst(pd.Series([s for s in shares if s is not None], dtype=float)),
        "false_alarm_rate": raised / n if n else None, "false_alarm_low": low, "false_alarm_high": high, "false_alarm_n": n,
        "interval_alarm_rate": float(alarms["excluded"].mean()) if n else None, "smallest": SMALLEST[name],
        "coverage": float(coverage["covered"].sum() / coverage["n"].sum()) if len(coverage) else None,
        "coverage_n": int(coverage["n"].sum()) if len(coverage) else 0,
        "interval_width": float(coverage["width"].mean()) if len(coverage) else None,
    })


def _plain(record: dict[Any, Any]) -> dict[Any, Any]:
    """None for what is no number; in dictionaries inside as well."""
    return {key: _plain(value) if isinstance(value, dict) else None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in record.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _worst(values: "pd.Series[Any]") -> float | None:
    known = values.dropna()
    return None if known.empty or len(known) < len(values) else float(known.max())


def _rank_correlation(planted: "pd.Series[float]", found: "pd.Series[float]") -> float | None:
    """Spearman's; None where one of the two does not vary."""
    if len(planted) < 3 or planted.nunique() < 2 or found.isna().any() or found.round(9).nunique() < 2:
        return None
    return round(float(np.corrcoef(planted.rank(), found.rank())[0, 1]), 9)


# ---- recovery ----------------------------------------------------------------------------------------------------------


def recovery_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What was planted in each organism of the two knobs, and what an instrument says.

    Columns: instrument, member, seed, knob (reading or behaviour), planted (its setting), other_knob (that of the other one),
    estimate, low, high (95 %, contexts as the unit), n (units).
    """
    here = rows[(rows["kind"] == "knobs") & (rows["variant"] == "open")]
    records = []
    for (name, member), group in here.groupby(["instrument", "member"], sort=False):
        knob = KNOB[str(name)]
        records.append({"instrument": name, "member": member, "seed": int(group["seed"].iloc[0]), "knob": knob,
                        "planted": group[knob].iloc[0],
                        "other_knob": group["behaviour" if knob == "reading" else "reading"].iloc[0], **_estimate(group)})
    return pd.DataFrame(records, columns=["instrument", "member", "seed", "knob", "planted", "other_knob", "estimate", "low", "high", "n"])


def _estimate(rows: pd.DataFrame) -> dict[str, Any]:
    rows = rows.dropna(subset=["value"])    # a probe finds nothing at some layers
    low, high = mean_interval(rows["value"].to_numpy(float), [rows["context"].to_numpy()])
    return {"estimate": float(rows["value"].mean()), "low": low, "high": high, "n": rows["unit"].nunique()}


# ---- depth -------------------------------------------------------------------------------------------------------------


def depth_profile_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What an instrument shows by layer on organisms of known depth (kinds `shallow` and `depth`, else one of the knobs').

    Of readings: half the difference between prompts after a sentence for the other sense and after one for the group's; of behaviour: by
    how much a patch at that layer lowers the bias, beyond its random control where it has one.
    Columns: instrument, member, kind, seed, layer, value, onset, last (planted).
    """
    parts = []
    for name, group in rows.groupby("instrument", sort=False):
        if name == "implicit_bias":
            continue
        parts.append(_contrasts(group) if KNOB[str(name)] == "reading" else _beyond_control(group[group["variant"] == "depth"]))
    return pd.concat(parts).reset_index() if parts else pd.DataFrame(columns=[*_LAYER_KEYS, "value"])


_LAYER_KEYS = ["instrument", "member", "kind", "seed", "layer", "onset", "last"]


def _contrasts(rows: pd.DataFrame) -> "pd.Series[float]":
    """Half the difference of readings between the two cued variants, by layer."""
    cued = rows[rows["variant"].isin(["group", "other"])]
    means = cued.groupby([*_LAYER_KEYS, "variant"], sort=False)["value"].mean().unstack("variant")
    return ((means["other"] - means["group"]) / 2).rename("value")


def _beyond_control(rows: pd.DataFrame) -> "pd.Series[float]":
    """Mean effects by layer, less those of the control."""
    means = rows.groupby([*_LAYER_KEYS, "control"], sort=False)["value"].mean().unstack("control")
    return (means[""] - means.get("random", 0.0)).rename("value")


def depth_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Planted and found depth: instrument, member, kind, seed, onset, last, found_onset, found_last, onset_error, last_error.

    The onset is the first layer that shows at least half of the largest value, the last layer the last such one; an instrument that shows
    nothing (no layer above the smallest effect worth a claim) has no depth (NaN). Where a reading stays readable after its last use
    a reading instrument says nothing of the last layer: last_error is NaN.
    """
    profile = depth_profile_table(rows)
    kinds = {"depth", "shallow"} if (profile["kind"] == "shallow").any() else {"depth", "knobs"}
    records = []
    for (name, member), group in profile[profile["kind"].isin(kinds)].groupby(["instrument", "member"], sort=False):
        first = group.iloc[0]
        if first["kind"] == "knobs" and KNOB[str(name)] == "behaviour" and not _is_biased(rows, str(member)):
            continue    # nothing to be lowered
        found = _span(group, SMALLEST[str(name)])
        record = {key: first[key] for key in ("instrument", "member", "kind", "seed", "onset", "last")}
        record |= {"found_onset": found[0], "found_last": found[1], "onset_error": abs(found[0] - first["onset"]),
                   "last_error": abs(found[1] - first["last"]) if KNOB[str(name)] == "behaviour" else float("nan")}
        records.append(record)
    return pd.DataFrame(records, columns=["instrument", "member", "kind", "seed", "onset", "last", "found_onset", "found_last",
                                          "onset_error", "last_error"])


def _is_biased(rows: pd.DataFrame, member: str) -> bool:
    return bool(rows.loc[rows["member"] == member, "behaviour"].iloc[0] >= 0.7)


def _span(profile: pd.DataFrame, smallest: float) -> tuple[float, float]:
    top = profile["value"].max()
    if not top >= smallest:
        return float("nan"), float("nan")
    layers = profile.loc[profile["value"] >= HALF * top, "layer"]
    return float(layers.min()), float(layers.max())


# ---- causal or decodable only ------------------------------------------------------------------------------------------


def causal_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What an instrument shows where the sense is used and where it can only be decoded, by seed: instrument, seed, kind, value.

    Readings: the mean over layers of their answer to cues (see `depth_profile_table`), which acts alike in all causal organisms (kind
    `causal`: the mean over `knobs` and `shallow`). Behaviour: the largest single layer, of the causal organism with the behaviour of the
    decodable one (`shallow`; else the most biased of the `knobs`).
    """
    profile = depth_profile_table(rows)
    found = profile.groupby(["instrument", "seed", "kind", "member"], sort=False)["value"].agg(["mean", "max"]).reset_index()
    reading = found["instrument"].map(KNOB) == "reading"
    found["value"] = np.where(reading, found["mean"], found["max"])
    matched = "shallow" if (found["kind"] == "shallow").any() else "knobs"
    causal = found[found["kind"].isin(["knobs", "shallow"]) & (reading | (found["kind"] == matched))].assign(kind="causal")
    shown = pd.concat([causal, found[found["kind"] == "decodable"]]).groupby(["instrument", "seed", "kind"], sort=False)["value"]
    both = shown.agg(["mean", "max"]).reset_index()
    both["value"] = np.where(both["instrument"].map(KNOB) == "reading", both["mean"], both["max"])
    return both[["instrument", "seed", "kind", "value"]]


def _decodable_share(name: str, causal: pd.DataFrame) -> float | None:
    """Of one seed of the causal table: what the decodable-only organism shows, as a share of what causal ones do; None without either.

    Infinite where the instrument shows less than the smallest effect worth a claim on the causal organism: it separates nothing.
    """
    values = causal.set_index("kind")["value"]
    if not {"decodable", "causal"} <= set(values.index):
        return None
    if values["causal"] < SMALLEST[name]:
        return float("inf")
    return float(abs(values["decodable"]) / values["causal"])


def _separated(shares: Sequence[float | None]) -> bool | None:
    known = [share for share in shares if share is not None]
    return max(known) <= SEPARATED if known else None


# ---- false alarms ------------------------------------------------------------------------------------------------------


def alarm_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every trial on which only a false alarm can be raised.

    Readings: on the null organisms, the identifiers against what random vectors and the word before them read as, and that word (the
    control word) against random vectors. Behaviour: every form of question on the null organisms (patches against those of random
    vectors), and steering by a control phrase on all organisms. An alarm is an estimate whose 95 % interval lies outside the reference's
    and which is at least the smallest effect worth a claim away from it.

    Columns: instrument, member, seed, control (of what is read), trial, estimate, low, high, n, reference, reference_low, reference_high,
    excluded (the intervals do not touch), alarm.
    """
    records: list[dict[str, Any]] = []
    for (name, member, seed), group in rows.groupby(["instrument", "member", "seed"], sort=False):
        placebos = group.loc[group["variant"] == "placebo", "control"].unique().tolist()
        for control, references in _tried(str(name), str(group["kind"].iloc[0]), placebos):
            trials = group[group["variant"].isin(["open", "placebo"]) & (group["control"] == control)]
            reference = _reference(group, references)
            for trial, part in trials.groupby("trial", sort=False):
                found = _estimate(part)
                excluded = bool(found["low"] > reference["reference_high"] or found["high"] < reference["reference_low"])
                far = abs(found["estimate"] - reference["reference"]) >= SMALLEST[str(name)]
                records.append({"instrument": name, "member": member, "seed": seed, "control": control, "trial": trial, **found,
                                **reference, "excluded": excluded, "alarm": excluded and far})
    return pd.DataFrame(records, columns=["instrument", "member", "seed", "control", "trial", "estimate", "low", "high", "n", "reference",
                                          "reference_low", "reference_high", "excluded", "alarm"])


def _tried(instrument: str, kind: str, placebos: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(control that is read, controls it is held against) of an organism's kind: nothing else can be a false alarm."""
    if KNOB[instrument] == "reading":
        return [("", ("random", "wrong_token")), ("wrong_token", ("random",))] if kind == "null" else []
    tried: list[tuple[str, tuple[str, ...]]] = []
    if kind == "null":
        tried.append(("", ("random",) if "patching" in instrument else ()))
    return [*tried, *((control, ()) for control in placebos)] if instrument == "steering" else tried


def _reference(rows: pd.DataFrame, controls: Sequence[str]) -> dict[str, float]:
    """What the controls show: their mean and the hull of their intervals; zero where nothing is a control."""
    found = [_estimate(rows[(rows["variant"] == "placebo") & (rows["control"] == control)]) for control in controls
             if ((rows["variant"] == "placebo") & (rows["control"] == control)).any()]
    if not found:
        return {"reference": 0.0, "reference_low": 0.0, "reference_high": 0.0}
    return {"reference": float(np.mean([one["estimate"] for one in found])), "reference_low": min(one["low"] for one in found),
            "reference_high": max(one["high"] for one in found)}


# ---- coverage ----------------------------------------------------------------------------------------------------------


def coverage_table(rows: pd.DataFrame, *, seed: int = 0, sample: int = SAMPLE, simulations: int = SIMULATIONS) -> pd.DataFrame:
    """Simulated studies of `sample` contexts drawn from an organism's own, whose mean is the truth: how often does the interval hold it?

    A context is drawn with all of its units (readings or questions, each its mean over layers), as the intervals that are reported take it:
    questions about one word pair belong together. Columns: instrument, member, n (simulations), covered, width (mean).
    """
    here = rows[rows["kind"].isin(["knobs", "shallow", "depth"]) & (rows["variant"] == "open")]
    records = []
    for (name, member), group in here.groupby(["instrument", "member"], sort=False):
        units = group.groupby(["context", "unit"], sort=False)["value"].mean().dropna()
        contexts = [part.to_numpy() for _, part in units.groupby("context", sort=False)]
        if len(contexts) < 2 or np.ptp(units) < 1e-9:
            continue    # an instrument that says the same everywhere has no interval
        truth = float(units.mean())
        drawn = np.random.default_rng([seed, *map(ord, str(member))]).integers(len(contexts), size=(simulations, sample))
        sizes = np.array([len(part) for part in contexts])
        ends = np.array([mean_interval(np.concatenate([contexts[i] for i in one]), [np.repeat(np.arange(sample), sizes[one])])
                         for one in drawn])
        covered = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
        records.append({"instrument": name, "member": member, "n": simulations, "covered": int(covered.sum()),
                        "width": float(np.diff(ends).mean())})
    return pd.DataFrame(records, columns=["instrument", "member", "n", "covered", "width"])


# ---- together ----------------------------------------------------------------------------------------------------------


def convergence_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Do instruments agree? Spearman's correlation between their estimates over all organisms of the two knobs, and with the knobs.

    Columns: first, second, spearman, n (organisms).
    """
    recovery = recovery_table(rows)
    wide = recovery.pivot_table(index="member", columns="instrument", values="estimate")
    knobs = rows[rows["kind"] == "knobs"].drop_duplicates("member").set_index("member")[["reading", "behaviour"]]
    wide = wide.join(knobs.add_prefix("planted "))
    names = [*(f"planted {knob}" for knob in ("reading", "behaviour")), *(name for name in INSTRUMENTS if name in wide)]
    return pd.DataFrame.from_records([
        {"first": a, "second": b, "spearman": _rank_correlation(wide[a], wide[b]), "n": len(wide)} for a in names for b in names])


def advice(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Plain words, from the records alone: which instrument to believe for which question, and which not."""
    readings = [record for record in records if record["measures"] == "reading"]
    acting = [record for record in records if record["measures"] == "behaviour" and record["causal_separated"] is not None]
    following = [r for r in readings if _at_least(r["spearman"], FOLLOWS)]
    lines = [_sentence("How is the word read? Believe", [r for r in following if _at_most(r["false_alarm_low"], ALARMS)],
                       "rose with the planted reading, and its false alarms may be 5 % or fewer (exact interval)"),
             _sentence("To rank models, not to claim a reading where there may be none:",
                       [r for r in following if r["false_alarm_low"] is not None and r["false_alarm_low"] > ALARMS],
                       "rose with the planted reading, but said something of words that have neither sense"),
             _sentence("Not tried on an organism without a reading:", [r for r in following if r["false_alarm_rate"] is None],
                       "rose with the planted reading; nothing is known of false alarms"),
             _sentence("Do not read senses off", [r for r in readings if r not in following], "did not follow the planted reading"),
             _sentence("From which layer on? Believe", [r for r in records if _at_most(r["depth_error"], 1.0)],
                       "found the planted first layer within one layer"),
             _sentence("Until which layer? Believe", [r for r in acting if _at_most(r["last_error"], 1.0)],
                       "found the planted last layer within one layer; a reading stays readable after its last use"),
             _sentence("Does the answer depend on it? Believe", [r for r in acting if r["causal_separated"]],
                       "stayed silent where a sense can be decoded but is not used"),
             _sentence("That a sense is decoded is no evidence that it is used:",
                       [r for r in records if r["causal_separated"] is False], "did not tell the two apart")]
    return [line for line in lines if line]


def _at_least(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound


def _at_most(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound


def _sentence(lead: str, records: Sequence[Mapping[str, Any]], why: str) -> str:
    names = ", ".join(str(record["instrument"]).replace("_", " ") for record in records)
    return f"{lead} {names}: {why}." if names else ""
