"""The page of a comparison: records, tables, figures, the audit of its claims and a methods paragraph.

Reads saved parts and computes nothing but `comparison_verdicts.py`. Writes comparison.json, comparison.html, tables/*.csv and figures/*.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi.borders.texts import encodable
from alignblind_mi.models.spec import EMBEDDED, ModelSpec
from alignblind_mi.pages import figures
from alignblind_mi.pages.report import Column, as_uri, page_text, percent, plain, save_shown, signed, version_names
from alignblind_mi.studies.audit import CITATIONS, LEAST, MOST_INVALID, MOST_WRONG
from alignblind_mi.studies.comparison_verdicts import (
    Compared,
    comparison_records,
    comparison_tables,
    methods_paragraph,
    read_comparison,
    unfinished,
)
from alignblind_mi.studies.drawn import write_drawn
from alignblind_mi.studies.study import organism_record


def write_comparison(folder: Path) -> Path:
    """Write records, tables, figures and the page of a comparison folder. Returns the page. Errors: ResultError as `read_comparison`."""
    found = read_comparison(folder)
    tables = comparison_tables(found)
    records = comparison_records(found, tables)
    vectors = save_shown(folder, tables, _draw(tables))
    page = folder / "comparison.html"
    text = json.dumps(records, indent=1, allow_nan=False) + "\n"
    write_drawn(folder, {"comparison.json": text.encode(), page.name: encodable(_render(found, tables, vectors)).encode()})
    return page


def _draw(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    shown = tables["comparison"].assign(label=tables["comparison"]["treatment"].str.replace("_", " "))
    drawn = {"comparison": figures.comparison_figure(shown)}
    if len(tables["points"]):
        drawn["frontier"] = figures.frontier_figure(tables["points"])
    if len(tables["doses"]):
        drawn["doses"] = figures.dose_figure(tables["doses"])
    return drawn


def _words(title: str, name: str) -> Column:
    return Column(title, lambda row: str(row[name]).replace("_", " "), numeric=False)


def _value(title: str, name: str, write: Any) -> Column:
    return Column(title, lambda row: write(row.get(name)))


def _points(value: Any) -> str:
    """A difference of rates in percentage points."""
    return "–" if value is None or pd.isna(value) else f"{100 * value:+.1f}"


def _interval(title: str, names: tuple[str, str, str], write: Any) -> Column:
    estimate, low, high = names
    return Column(title, lambda row: f"{write(row.get(estimate))} [{write(row.get(low))}, {write(row.get(high))}]")


def _rates(title: str, names: tuple[str, str, str]) -> Column:
    estimate, low, high = names
    return Column(title, lambda row: f"{percent(row.get(estimate))} [{percent(row.get(low))}–{percent(row.get(high))}]")


def _count(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else f"{int(value):,}".replace(",", " ")


def _p(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.2g}"


COLUMNS = {
    "comparison": (
        _words("treatment", "treatment"), _words("family", "family"), _value("n", "n", _count),
        _rates("implicit %", ("implicit", "low", "high")), Column("bounds %", lambda r: f"{percent(r['worst'])}–{percent(r['best'])}"),
        _value("invalid %", "invalid_share", percent), _rates("explicit %", ("explicit", "explicit_low", "explicit_high")),
        _value("explicit invalid %", "explicit_invalid_share", percent),
        _interval("r_blind", ("r_blind", "r_blind_low", "r_blind_high"), signed), _value("KL neutral", "kl_neutral", plain),
        _value("KL mentions", "kl_mentions", plain), _value("other-sense questions %", "colour_accuracy", percent),
        _value("group questions %", "group_accuracy", percent),
        _value("copying %", "copy_accuracy", percent), _value("judging %", "judging_accuracy", percent),
        _value("parameters", "parameters", _count), _value("seconds", "seconds", plain), _value("latency ratio", "latency", plain)),
    "differences": (
        _words("kind", "kind"), _words("treatment", "treatment"), _value("n", "n", _count), _value("discordant", "n_discordant", _count),
        _interval("difference, points", ("difference", "low", "high"), _points), _words("interval", "interval"),
        Column("bounds, points", lambda r: f"{_points(r['bound_low'])} to {_points(r['bound_high'])}"),
        _value("invalid %", "invalid", percent), _interval("log-odds", ("log_odds", "log_odds_low", "log_odds_high"), signed),
        _value("p", "p", _p), _value("Holm", "p_holm", _p), _value("BH", "p_bh", _p)),
    "slopes": (
        _words("treatment", "treatment"), _value("n", "n", _count), _interval("mean change, nats", ("mean", "low", "high"), signed),
        _value("sd", "sd", plain), _value("5 %", "q05", signed), _value("95 %", "q95", signed),
        _rates("wrong way %", ("wrong", "wrong_low", "wrong_high"))),
    "position": (
        _words("treatment", "treatment"), _value("n", "n", _count), _value("valid", "valid", _count),
        _rates("association %", ("rate", "low", "high")), _rates("position %", ("position", "position_low", "position_high"))),
    "mixed": (
        _words("term", "term"), _interval("log-odds", ("estimate", "low", "high"), signed), _value("answers", "n", _count),
        _words("groups", "groups"), _words("method", "method")),
    "equal_damage": (
        _words("damage", "damage_measure"), _value("at", "damage", plain), _words("curve", "family"),
        _interval("benefit, points", ("benefit", "low", "high"), _points),
        _interval("over unlearning, points", ("difference", "difference_low", "difference_high"), _points), _words("why not", "reason")),
    "readings": (
        _words("treatment", "treatment"), _words("instrument", "instrument"), _value("readings", "n", _count),
        _interval("mean", ("mean", "low", "high"), signed), _value("P(group)", "p_group", plain), _value("P(other)", "p_other", plain)),
    "elsewhere": (
        _words("treatment", "treatment"), _words("concept", "concept"), _words("cue", "cue"), _value("n", "n", _count),
        _rates("implicit %", ("rate", "low", "high")), Column("bounds %", lambda r: f"{percent(r['worst'])}–{percent(r['best'])}"),
        _value("invalid %", "invalid_share", percent)),
    "bbq": (
        _words("treatment", "treatment"), _words("context", "condition"), _value("n", "n", _count),
        _value("questions", "questions", _count), _rates("accuracy %", ("accuracy", "accuracy_low", "accuracy_high")),
        _value("unknown %", "unknown_share", percent),
        _interval("bias score", ("bias", "low", "high"), signed)),
    "audit": (
        _words("claim", "claim"), _interval("estimate", ("estimate", "low", "high"), signed), _value("n", "n", _count),
        _words("verdict", "verdict"), _words("controls", "controls"), _words("revision", "revision")),
    "left_out": (_words("treatment", "treatment"), _words("reason", "reason")),
}


def _render(found: Compared, tables: dict[str, pd.DataFrame], vectors: dict[str, bytes]) -> str:
    config, notes = found.config, list(found.notes.values())
    names = {role: config[role]["name"] for role in ("base", "aligned")}
    spec = ModelSpec(**config["aligned"])
    made = sorted(note["made"] for note in notes)
    return page_text(
        "comparison.html.j2", config=config, names=names,
        organism=any(name.startswith(EMBEDDED) for name in names.values()) or bool(organism_record(spec)),
        tables={name: table.to_dict("records") for name, table in tables.items()}, columns=COLUMNS,
        pictures={name: as_uri(svg) for name, svg in vectors.items()}, unfinished=unfinished(found), methods=methods_paragraph(found),
        citations=CITATIONS, revisions={name: note["revision"] for name, note in found.notes.items() if name in ("base", "untreated")},
        versions=version_names(notes), made=made, seed=config["seed"], least=LEAST, most_invalid=MOST_INVALID, most_wrong=MOST_WRONG)
