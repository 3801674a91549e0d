"""The calibration page: records, tables and figures of a calibration folder, and what follows in plain words.

Reads saved parts and computes nothing but `verdicts.py`. Writes calibration.json, calibration.html, tables/*.csv and figures/*.png, *.svg.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi.borders.reading import is_file, named, read_object
from alignblind_mi.borders.texts import encodable
from alignblind_mi.errors import ResultError
from alignblind_mi.pages import figures
from alignblind_mi.pages.page import (
    as_uri,
    count,
    page_text,
    plain,
    rate,
    save_shown,
    share,
    signed,
    text,
    value,
    version_names,
    words,
    yes,
)
from alignblind_mi.results import load_result
from alignblind_mi.studies.calibration import CUE, QUALIFIED, QUESTION, SELFIE_PROMPT, STREAM, TARGET_LAYER
from alignblind_mi.studies.drawn import write_drawn
from alignblind_mi.studies.qualified_organisms import honesty_records
from alignblind_mi.studies.verdicts import advice, calibration_records, calibration_tables


def read_calibration(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[dict[str, Any]]]:
    """All rows of a calibration folder, those of the qualification of its organisms (empty in a folder of a version that had none), and
    the provenance of each organism. Errors: ResultError for a folder without finished parts."""
    note = folder / "study.json"
    config = read_object(note, "", ResultError, advice="restore it, or calibrate into another folder") if is_file(note) else {}
    if "calibration" not in config:
        raise ResultError(f"{named('', folder)} holds no calibration: give the --out folder of `alignblind calibrate`.")
    files = sorted(folder.glob("*.parquet"))
    parts = [load_result(file) for file in files if not file.name.startswith(QUALIFIED)]
    told = [load_result(file).rows for file in files if file.name.startswith(QUALIFIED)]
    if not parts:
        raise ResultError(f"{folder} is a calibration without a finished part: run `alignblind calibrate --out {folder}`.")
    rows = pd.concat([part.rows for part in parts], ignore_index=True)
    return rows, pd.concat(told, ignore_index=True) if told else pd.DataFrame(), [part.provenance for part in parts]


def write_calibration(folder: Path) -> Path:
    """Write records, tables, figures and the page of a calibration folder. Returns the page."""
    rows, told, notes = read_calibration(folder)
    honesty = honesty_records(told) if len(told) else []
    tables = calibration_tables(rows)
    records = calibration_records(rows, tables)
    vectors = save_shown(folder, tables | {"records": pd.DataFrame(records), "qualified": told}, _draw(records, tables))
    page = folder / "calibration.html"
    drawn = {name: (json.dumps(found, indent=1, allow_nan=False) + "\n").encode()
             for name, found in (("calibration.json", records), ("qualified.json", honesty)) if found}
    write_drawn(folder, drawn | {page.name: encodable(_render(records, honesty, vectors, notes)).encode()})
    return page


def _draw(records: list[dict[str, Any]], tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    profile = tables["depth_profile"]
    known = profile[profile["member"].isin(tables["depth"]["member"])]
    return {"recovery": figures.recovery_figure(tables["recovery"]), "depth": figures.planted_depth_figure(known),
            "trust": figures.trust_figure(pd.DataFrame(records), tables["causal"]),
            "convergence": figures.convergence_figure(tables["convergence"])}


COLUMNS = {"records": (
    words("instrument", "instrument"),
    text("follows", "measures"),
    value("rank correlation with its knob", "spearman", signed), value("with the other knob", "spearman_other_knob", signed),
    count("first layer, error", "depth_error"), count("last layer, error", "last_error"),
    value("tells used from decodable", "causal_separated", yes), value("share shown where not used", "decodable_share", plain),
    rate("false alarms %", "false_alarm_rate", "false_alarm_low", "false_alarm_high"), count("trials", "false_alarm_n"),
    share("by intervals alone %", "interval_alarm_rate"), value("smallest effect", "smallest", plain),
    share("coverage %", "coverage"), value("width", "interval_width", plain), count("organisms", "n")), "qualified": (
    words("instrument", "instrument"), text("setting", "setting"), count("organisms", "organisms"), share("of them it reads %", "reads"),
    value("rank correlation with the planted reading", "spearman", signed), value("mean distance from it", "error", plain),
    share("interval holds it %", "held"), rate("reads random weights %", "random_reads", "random_low", "random_high"),
    count("models", "random_n"), rate("reads shuffled senses %", "shuffled_reads", "shuffled_low", "shuffled_high"),
    count("choices", "shuffled_n"))}


def _render(records: list[dict[str, Any]], honesty: list[dict[str, Any]], vectors: dict[str, bytes], notes: list[dict[str, Any]]) -> str:
    made = sorted(note["made"] for note in notes)
    return page_text(
        "calibration.html.j2", tables={"records": records, "qualified": honesty}, columns=COLUMNS, records=records, advice=advice(records),
        pictures={name: as_uri(svg) for name, svg in vectors.items()}, members=[(note["member"], note["failed_gates"]) for note in notes],
        causal_seeds=len(records[0]["causal_seeds"]), seeds=records[0]["seeds"], quick=notes[0]["config"]["quick"],
        versions=version_names(notes), made=made, cue=CUE, question=QUESTION, selfie=SELFIE_PROMPT,
        stream=STREAM, target_layer=TARGET_LAYER)
