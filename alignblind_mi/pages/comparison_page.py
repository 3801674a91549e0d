"""The page of a comparison: records, tables, figures, the audit of its claims and a methods paragraph.

Reads saved parts and computes nothing but `comparison_verdicts.py`. Writes comparison.json, comparison.html, tables/*.csv and figures/*.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi.borders.texts import encodable
from alignblind_mi.models.spec import EMBEDDED, ModelSpec
from alignblind_mi.pages import figures
from alignblind_mi.pages.page import (
    Column,
    as_uri,
    count,
    mean,
    p_value,
    page_text,
    plain,
    points,
    rate,
    save_shown,
    share,
    shares,
    signed,
    value,
    version_names,
    words,
)
from alignblind_mi.pages.qualification_page import COLUMNS as QUALIFICATION
from alignblind_mi.pages.statements import OUTCOMES, UNQUALIFIED, headline, lead_sentences, mute_figures, muted_rows, readers
from alignblind_mi.studies.audit import CITATIONS, LEAST, MOST_INVALID, MOST_WRONG
from alignblind_mi.studies.comparison_verdicts import (
    Compared,
    comparison_records,
    comparison_tables,
    methods_paragraph,
    read_comparison,
    unfinished,
)
from alignblind_mi.studies.config import organism_record
from alignblind_mi.studies.drawn import write_drawn


def write_comparison(folder: Path, outcome: str = "both") -> Path:
    """Write records, tables, figures and the page of a comparison folder, answers judged by an `outcome` (see `log_odds.leading`). Returns
    the page. Errors: as `read_comparison`."""
    found = read_comparison(folder, outcome)
    tables = comparison_tables(found)
    records = comparison_records(found, tables)
    drawn = _draw(tables)
    mute_figures(drawn, found.qualified)
    vectors = save_shown(folder, tables, drawn)
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


def spread(row: dict[str, Any], name: str) -> str:
    """A mean, and the least and largest of several draws."""
    return f"{plain(row[name])} [{plain(row[name + '_low'])} to {plain(row[name + '_high'])}]"


COLUMNS: dict[str, Sequence[Column]] = {
    "competence": (words("treatment", "treatment"), *QUALIFICATION["competence"]),
    "outcomes": OUTCOMES,
    "qualified": (words("model", "role"), *QUALIFICATION["instruments"]),
    "comparison": (
        words("treatment", "treatment"), words("family", "family"), count("n", "n"),
        rate("implicit %", "implicit", "low", "high"), shares("by template %", "template_min", "template_max"),
        shares("bounds %", "worst", "best"), share("invalid %", "invalid_share"),
        rate("explicit %", "explicit", "explicit_low", "explicit_high"),
        share("explicit invalid %", "explicit_invalid_share"),
        mean("r_blind", "r_blind", "r_blind_low", "r_blind_high"),
        value("displacement", "displacement", plain), value("KL prompts", "kl_prompts", plain),
        value("KL neutral", "kl_neutral", plain),
        value("KL mentions", "kl_mentions", plain), share("other-sense questions %", "colour_accuracy"),
        share("group questions %", "group_accuracy"),
        share("copying %", "copy_accuracy"), share("judging %", "judging_accuracy"),
        count("parameters", "parameters"), value("seconds", "seconds", plain), value("latency ratio", "latency", plain)),
    "differences": (
        words("kind", "kind"), words("treatment", "treatment"), count("n", "n"), count("discordant", "n_discordant"),
        share("untreated %", "rate_baseline"), share("treated %", "rate"), mean("difference, points", "difference", "low", "high", points),
        Column("bounds, points", lambda r: f"{points(r['bound_low'])} to {points(r['bound_high'])}"),
        share("invalid %", "invalid"), mean("log-odds", "log_odds", "log_odds_low", "log_odds_high"), count("n scored", "scored"),
        share("improbable %", "improbable"), value("p", "p", p_value), value("Holm", "p_holm", p_value), value("BH", "p_bh", p_value)),
    "placebos": (
        words("treatment", "treatment"), count("draws", "draws"), count("n", "n"), share("untreated %", "untreated"),
        share("treated %", "rate"), rate("noise %", "noise", "noise_low", "noise_high"), value("sd of draws", "noise_sd", plain),
        value("displacement", "displacement", plain),
        Column("of noise", lambda r: spread(r, "noise_displacement")), value("KL prompts", "kl_prompts", plain),
        Column("of noise", lambda r: spread(r, "noise_kl"))),
    "slopes": (
        words("treatment", "treatment"), count("n", "n"), mean("mean change, nats", "mean", "low", "high"),
        value("sd", "sd", plain), value("5 %", "q05", signed), value("95 %", "q95", signed),
        rate("wrong way %", "wrong", "wrong_low", "wrong_high")),
    "position": (
        words("treatment", "treatment"), count("n", "n"), count("valid", "valid"),
        rate("association %", "rate", "low", "high"), rate("position %", "position", "position_low", "position_high")),
    "mixed": (
        words("term", "term"), mean("log-odds", "estimate", "low", "high"), count("answers", "n"),
        words("groups", "groups"), words("method", "method")),
    "equal_damage": (
        words("damage", "damage_measure"), value("at", "damage", plain), words("curve", "family"),
        mean("benefit, points", "benefit", "low", "high", points),
        mean("over unlearning, points", "difference", "difference_low", "difference_high", points), words("why not", "reason")),
    "readings": (
        words("treatment", "treatment"), words("instrument", "instrument"), count("readings", "n"),
        mean("mean", "mean", "low", "high"), value("P(group)", "p_group", plain), value("P(other)", "p_other", plain)),
    "elsewhere": (
        words("treatment", "treatment"), words("concept", "concept"), words("cue", "cue"), count("n", "n"),
        rate("implicit %", "rate", "low", "high"), shares("by template %", "template_min", "template_max"),
        shares("bounds %", "worst", "best"), share("invalid %", "invalid_share")),
    "bbq": (
        words("treatment", "treatment"), words("context", "condition"), count("n", "n"),
        count("questions", "questions"), rate("accuracy %", "accuracy", "accuracy_low", "accuracy_high"),
        share("unknown %", "unknown_share"),
        mean("bias score", "bias", "low", "high")),
    "audit": (
        words("claim", "claim"), mean("estimate", "estimate", "low", "high"), count("usable", "n"),
        count("asked", "n_asked"), words("verdict", "verdict"), words("controls", "controls"), words("revision", "revision")),
    "left_out": (words("treatment", "treatment"), words("reason", "reason")),
}


def _render(found: Compared, tables: dict[str, pd.DataFrame], vectors: dict[str, bytes]) -> str:
    config, notes = found.config, list(found.notes.values())
    names = {role: config[role]["name"] for role in ("base", "aligned")}
    spec = ModelSpec(**config["aligned"])
    made = sorted(note["made"] for note in notes)
    return page_text(
        "comparison.html.j2", config=config, names=names, headline=headline(found.qualified, names),
        readers=readers(found.qualified, names), judged_by=lead_sentences(found.lead, found.as_measured),
        unqualified="" if found.qualified else UNQUALIFIED, muted=muted_rows(found.qualified),
        organism=any(name.startswith(EMBEDDED) for name in names.values()) or bool(organism_record(spec)),
        tables={name: table.to_dict("records") for name, table in tables.items()}, columns=COLUMNS,
        pictures={name: as_uri(svg) for name, svg in vectors.items()}, unfinished=unfinished(found), methods=methods_paragraph(found),
        citations=CITATIONS, revisions={name: note["revision"] for name, note in found.notes.items() if name in ("base", "untreated")},
        versions=version_names(notes), made=made, seed=config["seed"], least=LEAST, most_invalid=MOST_INVALID, most_wrong=MOST_WRONG)
