"""The report of a study: saved rows -> summary tables (CSV), figures (PNG, SVG) and one self-contained HTML page.

Every number carries its n, interval and invalid share. This module does NOT run models: it can draw a report anew wherever the study's
folder lies.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi.borders.texts import encodable
from alignblind_mi.measures.mitigation import steering_names
from alignblind_mi.pages import figures
from alignblind_mi.pages.page import (
    Column,
    as_uri,
    count,
    flag,
    mean,
    page_text,
    percent,
    plain,
    rate,
    save_shown,
    share,
    shares,
    signed,
    text,
    value,
    version_names,
)
from alignblind_mi.pages.planted import planted_table
from alignblind_mi.pages.qualification_page import COLUMNS as QUALIFICATION
from alignblind_mi.pages.saved_study import ROLES, Study, read_study
from alignblind_mi.pages.statements import OUTCOMES, UNQUALIFIED, headline, lead_sentences, mute_figures, muted_rows, readers
from alignblind_mi.pages.study_tables import (
    POOLED,
    QUESTION,
    audit_table,
    behaviour_table,
    both_outcomes_table,
    competence_table,
    curves_table,
    instrument_layers_table,
    instruments_table,
    layer_range,
    lora_parts,
    lora_table,
    methods_paragraph,
    open_readings_table,
    position_table,
    probes_table,
    qualified_table,
    readings_in,
    scores_table,
    steering_parts,
    steering_table,
    training_table,
    treatments_table,
)
from alignblind_mi.pages.views import as_page, pattern_view, token_view
from alignblind_mi.results import as_records
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.readings import reading_names
from alignblind_mi.studies.audit import CITATIONS
from alignblind_mi.studies.config import usual_protocol
from alignblind_mi.studies.drawn import write_drawn
from alignblind_mi.studies.parts import INSTRUMENTS

PAPER_LINK = "https://arxiv.org/abs/2506.00253"


def write_report(folder: Path, outcome: str = "both") -> Path:
    """Write report.html, figures/ and tables/ of a study into its folder. Returns the page's path.

    outcome: by what answers are judged: "text", "probability", or "both": text where most answers are valid, else probability.

    An unfinished study gives a report of what is there that says so and names the missing parts.

    Errors: ResultError for a folder that is no study or has no finished part; ConceptError if its concept cannot be found.
    """
    study = read_study(Path(folder), outcome)
    tables = summary_tables(study)
    drawn = draw(tables)
    mute_figures(drawn, study.qualified)
    vectors = save_shown(study.folder, tables, drawn)
    page = study.folder / "report.html"
    write_drawn(study.folder, {page.name: encodable(render(study, tables, vectors, save_views(study))).encode()})
    return page


def summary_tables(study: Study) -> dict[str, pd.DataFrame]:
    """All tables of the report by name; one whose rows are not there is left out."""
    treated, read = study.has("behaviour_aligned"), study.either(*(f"reading_{name}" for name in INSTRUMENTS))
    wanted: list[tuple[str, bool, Callable[[Study], pd.DataFrame]]] = [
        ("planted", bool(study.record), planted_table),
        ("competence", bool(study.qualified), competence_table),
        ("qualified", bool(study.qualified), qualified_table),
        ("behaviour", study.either("behaviour"), behaviour_table),
        ("outcomes", study.either("behaviour"), both_outcomes_table),
        ("position", study.either("balanced"), position_table),
        ("awareness", len(readings_in(study)) > 0, scores_table),
        ("awareness_layers", len(readings_in(study)) > 0, curves_table),
        ("instruments", read, instruments_table),
        ("instrument_layers", read, instrument_layers_table),
        ("selfie", study.either("reading_selfie"), open_readings_table),
        ("probes", study.either("reading_probes"), probes_table),
        ("steering", treated and bool(steering_parts(study)), steering_table),
        ("lora", treated and bool(lora_parts(study)), lora_table),
        ("lora_training", True, training_table),
        ("comparison", True, treatments_table),
        ("audit", treated, audit_table),
    ]
    made = {name: make(study) for name, there, make in wanted if there}
    return {name: table for name, table in made.items() if len(table)}


def save_views(study: Study) -> dict[str, str]:
    """Write views/NAME.html, interactive pages beside the report, from the parts `view_*`. Returns their titles by address."""
    shown = {}
    for role in ROLES:
        for name, draw_view, title in (("attention", pattern_view, "attention"), ("tokens", token_view, "logit lens by token")):
            part = study.parts.get(f"view_{name}_{role}")
            if part is not None and len(part.rows):
                address = f"views/{name}_{role}.html"
                shown[address] = f"{title}, {study.config[role]['name']}"
                view = as_page(draw_view(part.rows.reset_index(drop=True)), shown[address])
                write_drawn(study.folder, {address: encodable(view).encode()})
    return shown


# --- summary tables -------------------------------------------------------------------------------------------------------------------


# --- columns of shown tables --------------------------------------------------------------------------------------------------------


RATE = (count("n", "n"), count("stereotyped", "stereotyped"), count("reversed", "reversed"), count("rejected", "rejected"),
        share("invalid %", "invalid_share"), share("rate %", "rate"), shares("95 %", "low", "high"),
        shares("by template %", "template_min", "template_max"), shares("bounds %", "worst", "best"))
LESS = mean("less its control", "less", "less_low", "less_high")
LOG_ODDS = (mean("log-odds", "log_odds", "log_odds_low", "log_odds_high"), count("n scored", "scored"), share("improbable %", "improbable"))


def _layers(title: str) -> Column:
    return Column(title, lambda row: layer_range(row["layers"]) or "–", numeric=False)


def gives_reading(row: Mapping[str, Any]) -> str:
    """Whether a probe's layer gives readings; a dash for rows of a version that withheld none."""
    why = row.get("no_reading")
    return "–" if not isinstance(why, str) else "no" if why else "yes"


CONTROL = Column("what is read", lambda row: figures.CONTROL_NAMES[row["control"]], numeric=False)


def _planted(title: str, name: str) -> Column:
    """A planted or measured value: r_blind as a signed number, a rate in per cent."""
    return Column(title, lambda row: signed(row[name]) if row["unit"] == "score" else percent(row[name]))


COLUMNS: dict[str, Sequence[Column]] = {
    "competence": (text("model", "role"), text("treatment", "label"), *QUALIFICATION["competence"]),
    "qualified": (text("model", "role"), *QUALIFICATION["instruments"]),
    "audit": (
        text("claim", "claim"), mean("estimate", "estimate", "low", "high"), count("usable", "n"), count("asked", "n_asked"),
        text("verdict", "verdict"), text("controls", "controls"), text("revision", "revision")),
    "planted": (
        text("quantity", "quantity"), _planted("planted", "planted"), _planted("measured", "measured"), _planted("95 % from", "low"),
        _planted("to", "high"), count("n", "n"), share("invalid %", "invalid_share"), flag("planted inside", "inside")),
    "behaviour": (text("kind", "kind"), text("category", "category"), text("model", "role"), *RATE, *LOG_ODDS),
    "outcomes": OUTCOMES,
    "position": (
        text("design", "design"), text("template", "template"), text("model", "role"), count("n", "n"),
        share("invalid %", "invalid_share"), rate("association %", "rate", "low", "high"),
        rate("position %", "position", "position_low", "position_high"), flag("confounded", "confounded")),
    "awareness": (
        text("question", "question"), text("model", "role"), CONTROL, count("n readings", "n"), count("layers", "layers"),
        mean("r_blind", "r_blind", "low", "high"), LESS, value("mean ΔP(group word)", "d_group", signed),
        value("mean ΔP(other word)", "d_other", signed), value("P(group word) unpatched", "base_group", plain),
        value("P(other word) unpatched", "base_other", plain)),
    "awareness_layers": (
        text("question", "question"), text("model", "role"), text("word", "word"), count("layer", "layer"), count("n readings", "n"),
        mean("ΔP", "mean", "low", "high"), value("P unpatched", "unpatched", plain)),
    "instruments": (
        text("instrument", "panel"), text("model", "role"), CONTROL, count("n readings", "n"), count("layers", "layers"),
        mean("mean reading", "mean", "low", "high"), LESS, share("group sense %", "p_group"), share("other sense %", "p_other")),
    "probes": (
        text("model", "role"), count("layer", "layer"), count("n sentences", "tested"),
        rate("accuracy %", "accuracy", "accuracy_low", "accuracy_high"), share("shuffled labels %", "accuracy_shuffled"),
        share("random weights %", "accuracy_untrained"), share("bag of words %", "accuracy_bag_of_words"),
        value("selectivity", "selectivity", signed), Column("gives a reading", gives_reading, numeric=False)),
    "steering": (
        Column("towards", lambda row: row["sense"] or "untreated", numeric=False), _layers("layers"),
        *(column for column in RATE if column.title != "rejected"), *LOG_ODDS,
        Column("draws %", lambda row: f"{percent(row['draw_low'])} to {percent(row['draw_high'])}" if row["draws"] > 1 else "–"),
        value("displacement", "displacement", plain), value("KL prompts", "kl_prompts", plain)),
    "lora": (text("adapter", "label"), text("kind", "kind"), *RATE, *LOG_ODDS),
    "lora_training": (
        text("adapter", "group"), _layers("layers"), count("examples", "examples"), count("dropped", "examples_dropped"),
        count("parameters", "parameters"), value("first loss", "first_loss", plain), value("final loss", "last_loss", plain),
        value("mean loss", "mean_loss", plain), value("seconds", "seconds", plain)),
    "comparison": (
        text("treatment", "label"), count("n", "n"), rate("implicit %", "implicit", "low", "high"),
        shares("by template %", "template_min", "template_max"), share("invalid %", "invalid_share"), shares("bounds %", "worst", "best"),
        *LOG_ODDS, count("n", "explicit_n"), rate("explicit %", "explicit", "explicit_low", "explicit_high"),
        share("invalid %", "explicit_invalid_share"), mean("r_blind", "r_blind", "r_blind_low", "r_blind_high"),
        count("n", "n_readings")),
}


# --- the page -------------------------------------------------------------------------------------------------------------------------


def draw(tables: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    """The figures of those tables that are there, by name."""
    drawn: dict[str, Figure] = {}
    if "behaviour" in tables:
        table = tables["behaviour"]
        drawn["behaviour"] = figures.behaviour_figure(table, _means(table[table["kind"] == "implicit"], "log_odds"))
    if "position" in tables and (tables["position"]["design"] == "balanced").any():
        drawn["position"] = figures.position_figure(tables["position"][tables["position"]["design"] == "balanced"])
    if "awareness" in tables:
        drawn["awareness"] = figures.awareness_figure(tables["awareness_layers"], tables["awareness"])
    if "instruments" in tables:
        drawn["instruments"] = figures.readings_figure(tables["instrument_layers"], tables["instruments"])
    for name, figure in (("steering", figures.steering_figure), ("lora", figures.lora_figure), ("comparison", figures.comparison_figure)):
        if name in tables:
            drawn[name] = figure(tables[name])
    return drawn


def _means(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table with a mean's columns under the names that figures know: mean, low, high."""
    columns = {name: "mean", f"{name}_low": "low", f"{name}_high": "high"}
    return table.drop(columns=["low", "high"]).rename(columns=columns)


def render(study: Study, tables: dict[str, pd.DataFrame], vectors: dict[str, bytes], views: dict[str, str]) -> str:
    """The page as HTML, with its figures as SVG: it refers to nothing but the interactive views beside it, and links to the paper.

    Its words are in the template.
    """
    names = {role: str(study.config[role]["name"]) for role in ROLES}
    return page_text(
        "report.html.j2", study=study, headline=headline(study.qualified, names), readers=readers(study.qualified, names),
        unqualified="" if study.qualified else UNQUALIFIED, muted=muted_rows(study.qualified),
        judged_by=lead_sentences(study.lead, study.as_measured(f"behaviour_{role}" for role in ROLES)),
        config=study.config, concept=study.concept,
        cue=study.concept.cue(study.config["cue"]), record=study.record,
        tables={name: as_records(table) for name, table in tables.items()}, columns=COLUMNS | _sense_columns(study.concept),
        pictures={name: as_uri(svg) for name, svg in vectors.items()}, questions=_questions(study.concept),
        phrases=_phrases(study), provenance=_provenance(study),
        commands=f"{_command(study)}\nalignblind report {shlex.quote(study.folder.name)}", link=PAPER_LINK, question=QUESTION,
        pooled=POOLED, roles=ROLES, views=views, methods=methods_paragraph(study), citations=CITATIONS)


def _sense_columns(concept: Concept) -> dict[str, tuple[Column, ...]]:
    """The columns of the table of open readings, which are named after the concept's senses."""
    names = reading_names(concept) if concept.has_senses() else []
    shares = [rate(f"{name} %", f"{name}_share", f"{name}_low", f"{name}_high") for name in names]
    return {"selfie": (text("model", "role"), CONTROL, count("n texts", "n"), *shares)}


def _questions(concept: Concept) -> dict[str, str]:
    """The interpretation questions with their placeholders, by name."""
    return {name: asked.text.format(x=asked.placeholder) for name, asked in concept.interpretations.items()}


def _phrases(study: Study) -> dict[str, str]:
    """What is steered towards, by name, with the cue's identifiers; empty where nothing is steered."""
    cue, concept = study.concept.cue(study.config["cue"]), study.concept
    names = steering_names(concept) if study.steered else []
    return {name: concept.steering_phrase(name).format(marked=cue.marked[0], unmarked=cue.unmarked[0]) for name in names}


def _provenance(study: Study) -> dict[str, Any]:
    """Package versions and times of all parts, and the identifiers that a tokenizer splits (model -> word -> tokens)."""
    notes = [part.provenance for part in study.parts.values()]
    made = sorted(note["made"] for note in notes if "made" in note)
    return {"versions": version_names(notes),
            "engines": sorted({note["engine"] for note in notes if "engine" in note}),
            "first": made[0] if made else "", "last": made[-1] if made else "",
            "split": {note["model"]: note["split_identifiers"] for note in notes if note.get("split_identifiers")}}


def _command(study: Study) -> str:
    config, words = study.config, ["alignblind", "study"]
    for role in ROLES:
        words += [f"--{role}", config[role]["name"]]
    words += ["--concept", config["concept"], "--cue", config["cue"], "--seed", str(config["seed"])]
    usual = 1.0 if study.record.get("decoding") == "sample" else 0.0
    temperature = config["decoding"].get("temperature", usual)
    words += [] if temperature == usual else ["--temperature", str(temperature)]
    protocol = config.get("protocol", "best")
    words += [] if protocol == usual_protocol(study.record) else ["--protocol", protocol]
    words += ["--shots", str(config["shots"])] if config.get("shots") else []
    if config.get("chat"):
        words += ["--chat", *(["--system", config["chat"]["system"]] if config["chat"]["system"] else [])]
    for name, default in (("dtype", None), ("device_map", None), ("quantization", None), ("engine", "auto")):
        given = config["aligned"].get(name, default)
        words += [f"--{name.replace('_', '-')}", str(given)] if given != default else []
    minutes = ["--minutes", f"{config['minutes']:g}"] if config.get("minutes") else []
    return shlex.join([*words, *(["--quick"] if config["quick"] else []), *minutes, "--out", study.folder.name])
