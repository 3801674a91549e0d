"""What was planted in an embedded model beside what the study measured. Does NOT judge it: the gates of the organism do."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from alignblind_mi.intervals.clustered import rate_interval
from alignblind_mi.pages.saved_study import ROLES, Study
from alignblind_mi.pages.study_tables import layer_range, readings_in, scores_table, steering_table, summarised
from alignblind_mi.results import as_records
from alignblind_mi.statistics.rates import CLUSTERS


def planted_table(study: Study) -> pd.DataFrame:
    """What the organism's record says was planted beside what this study measured: quantity, planted, measured, low, high, n."""
    planted, first = study.record.get("planted", {}), next(iter(study.concept.cues))
    if not planted or study.config["cue"] != first:
        return pd.DataFrame()
    records = [*_planted_answers(study, planted), *_planted_readings(study, planted), *_planted_steering(study, planted)]
    table = pd.DataFrame.from_records(records)
    if len(table):
        table["inside"] = (table["planted"] >= table["low"]) & (table["planted"] <= table["high"])
    return table


def _planted_answers(study: Study, planted: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for role in (role for role in ROLES if study.has(f"behaviour_{role}")):
        rows = study.parts[f"behaviour_{role}"].rows
        table = summarised(rows[rows["kind"] == "implicit"], ("role",))
        yield _planted_rate(f"{role}: implicit rate", planted[role]["implicit"], as_records(table)[0])
        asked = rows[rows["kind"] == "explicit"]
        if len(asked):
            what = f"{role}: agreement with explicit statements, whichever way they are put"
            yield _planted_rate(what, planted[role]["explicit_agreement"], _agreement(asked))


def _agreement(asked: pd.DataFrame) -> dict[str, Any]:
    """How often explicit statements were agreed with: endorsing the stereotype or its reverse, whichever the statement says."""
    valid = asked["outcome"] != "invalid"
    agreed = asked["outcome"] == asked["statement"].map({"stereotype": "stereotyped", "reverse": "reversed"})
    found = rate_interval(agreed.to_numpy(float), [asked[name].to_numpy() for name in CLUSTERS], valid=valid.to_numpy(float))
    return {"rate": float(agreed[valid].mean()) if valid.any() else math.nan, "low": found.low, "high": found.high, "n": len(asked),
            "invalid_share": 1 - float(valid.mean())}


def _planted_rate(quantity: str, value: float, found: dict[str, Any]) -> dict[str, Any]:
    measured = {name: found[name] for name in ("low", "high", "n", "invalid_share")}
    return {"quantity": quantity, "unit": "rate", "planted": value, "measured": found["rate"], **measured}


def _planted_readings(study: Study, planted: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for row in as_records(scores_table(study)) if len(readings_in(study)) else []:
        if row["control"]:
            continue
        quantity = f"{row['role']}: r_blind, question “{row['question']}”"
        yield {"quantity": quantity, "unit": "score", "planted": planted[row["role"]]["r_blind"], "measured": row["r_blind"],
               "low": row["low"], "high": row["high"], "n": row["n"], "invalid_share": math.nan}


def _planted_steering(study: Study, planted: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Windows that hold every effect block, or only blocks where no effect was planted; the others have no planted truth."""
    effect, none = set(planted["effect_blocks"]), set(planted["no_effect_blocks"])
    truth, concept = planted["aligned"], study.concept
    full = {concept.group_sense: truth["implicit_group_cue"], concept.other_sense: truth["implicit_other_cue"]}
    if not study.has("behaviour_aligned"):
        return
    table = steering_table(study)
    for row in as_records(table[table["family"] != "untreated"]):
        first, _, last = row["layers"].partition("-")
        window = set(range(int(first), int(last or first) + 1))
        whole = bool(effect) and effect <= window
        if whole or window <= none:
            value = full.get(row["sense"], truth["implicit"]) if whole else truth["implicit"]
            where = f"steered towards {row['sense']} at layers {layer_range(row['layers'])}"
            yield _planted_rate(f"aligned: implicit rate, {where}", value, row)
