"""The report of a study: saved rows -> summary tables (CSV), figures (PNG, SVG) and one self-contained HTML page.

Every number carries its n, interval and invalid share. This module does NOT run models: it can draw a report anew wherever the study's
folder lies.
"""

import base64
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi.borders.reading import is_file, is_folder, named, read_json, read_object
from alignblind_mi.borders.texts import csv_text, encodable, label, shortened, visible
from alignblind_mi.measures.awareness import n_readings, readings_of, selfie_table, summarise_readings
from alignblind_mi.measures.mitigation import comparison_table, early_window, late_window, steering_names
from alignblind_mi.mitigations.finetuning import layers_text
from alignblind_mi.mitigations.lora import LAYER_GROUPS, trainable
from alignblind_mi.mitigations.steering import can_steer, layer_windows
from alignblind_mi.models.spec import EMBEDDED, ModelSpec
from alignblind_mi.pages import figures
from alignblind_mi.pages.views import as_page, pattern_view, token_view
from alignblind_mi.results import Result, ResultError
from alignblind_mi.statistics.paired import corrected, paired_differences
from alignblind_mi.statistics.rates import exact_interval, mean_interval, position_effect, summarise, t_interval
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.stimuli.readings import reading_names
from alignblind_mi.studies.audit import CITATIONS, alignment_claims, methods_opening, rows_by, software, treatment_claim
from alignblind_mi.studies.drawn import write_drawn
from alignblind_mi.studies.study import INSTRUMENTS, instruments, load_study, organism_record, questions, view_names

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

ROLES = ("base", "aligned")
PARTS = ("behaviour_", "balanced_", "awareness_", "reading_", "view_", "steering_", "lora_")    # how the names of a study's parts begin
QUESTION = "paper"    # the interpretation question that treatments are compared with
POOLED = "pooled"
QUICK_GROUPS = ("early", "late")
BOTH_COLUMNS = frozenset({"model", "treatment", "role"})
ANSWER_COLUMNS = BOTH_COLUMNS | {"kind", "category", "template", "word_pair", "option_order", "word_order", "outcome", "log_odds"}
INSTRUMENT_COLUMNS = BOTH_COLUMNS | {"instrument", "identifier", "context", "control", "mark", "mention", "layer", "blind"}
READING_COLUMNS = BOTH_COLUMNS | {"interpretation", "context", "control", "mark", "mention", "layer", "d_group", "d_other", "base_group",
                                  "base_other", "blind"}
PAPER_LINK = "https://arxiv.org/abs/2506.00253"
LONGEST, LONGEST_TITLE = 500, 2000    # characters of a text on a page, and of the same text where it is pointed at
# Pages run nothing and fetch nothing: styles and pictures are inside them, the views beside them are shown in frames without rights.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-src 'self' file:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, eq=False)
class Study:
    """A study folder as read: configuration, concept, finished parts, and which parts are missing."""

    folder: Path
    config: dict[str, Any]
    concept: Concept
    parts: dict[str, Result]
    n_layers: int | None
    missing: Sequence[str] = ()

    def has(self, *names: str) -> bool:
        """Whether all these parts are finished."""
        return all(name in self.parts for name in names)

    def either(self, *kinds: str) -> bool:
        """Whether a part of one of these kinds is finished for one of the two models."""
        return any(f"{kind}_{role}" in self.parts for kind in kinds for role in ROLES)

    def rows(self, names: Iterable[str]) -> pd.DataFrame:
        """The rows of those of the named parts that are finished, one below the other."""
        found = [self.parts[name].rows for name in names if name in self.parts]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    @property
    def unfinished(self) -> list[str]:
        """What is missing, in words: parts by name, and steering as a whole where the depth of the model is not known yet."""
        return [*self.missing, *(["all steering parts"] if self.n_layers is None and self.steered else [])]

    @property
    def steered(self) -> bool:
        """Whether the study's cue can be steered at all."""
        return can_steer(self.concept, self.config["cue"])

    @property
    def read(self) -> bool:
        """Whether the identifiers of the study's cue have senses that can be read."""
        return self.concept.has_senses(self.config["cue"])

    @property
    def trained(self) -> bool:
        """Whether the study trains LoRA."""
        return trainable(self.concept, self.config["cue"])

    @property
    def compared(self) -> dict[str, str]:
        """The two compared windows by their layers as rows write them: {"1-3": "early", "5-7": "late"}. Rows of before
        wrote a window of one layer as 5-5."""
        if self.n_layers is None:
            return {}
        return {written: name for name, window in (("late", late_window(self.n_layers)), ("early", early_window(self.n_layers)))
                for written in (f"{window[0]}-{window[-1]}", layers_text(window))}

    @property
    def organism(self) -> bool:
        """Whether a model is an organism: one of the embedded pair, or a rebuilt one with its record beside it."""
        return any(self.config[role]["name"].startswith(EMBEDDED) for role in ROLES) or bool(self.record)

    @property
    def record(self) -> dict[str, Any]:
        """organism.json of the aligned model; empty for any other model, or where the checkpoint is not on this machine."""
        try:
            return organism_record(ModelSpec(**self.config["aligned"]))
        except FileNotFoundError:
            return {}


def write_report(folder: Path) -> Path:
    """Write report.html, figures/ and tables/ of a study into its folder. Returns the page's path.

    An unfinished study gives a report of what is there that says so and names the missing parts.

    Errors: ResultError for a folder that is no study or has no finished part; ConceptError if its concept cannot be found.
    """
    study = read_study(Path(folder))
    tables = summary_tables(study)
    drawn = draw(tables)
    vectors = save_shown(study.folder, tables, drawn)
    page = study.folder / "report.html"
    write_drawn(study.folder, {page.name: encodable(render(study, tables, vectors, save_views(study))).encode()})
    return page


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


def save_shown(folder: Path, tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> dict[str, bytes]:
    """Write tables/NAME.csv, figures/NAME.png and figures/NAME.svg into a folder. Returns the figures as SVG, by name."""
    vectors = {name: figures.to_svg(figure) for name, figure in drawn.items()}
    files = {f"tables/{name}.csv": csv_text(table).encode() for name, table in tables.items()}
    for name, figure in drawn.items():
        files |= {f"figures/{name}.png": figures.to_png(figure), f"figures/{name}.svg": vectors[name]}
    write_drawn(folder, files)
    return vectors


def read_study(folder: Path) -> Study:
    """Read a study folder. Errors: ResultError if it is none, is damaged, or has no finished part."""
    config = _read_config(folder)
    concept = load_concept(config["concept"])
    parts = load_study(folder)
    single = sorted(name for name, part in parts.items() if _is_single(part))
    known = {name: part for name, part in parts.items() if name.startswith(PARTS) and name not in single}
    if single and not known:
        raise ResultError(f"{folder} holds what one verb measured on one model ({single[0]}), and no study: that verb prints it again "
                          f"(with the same options and --out {folder}), and has no page.")
    if not known:
        raise ResultError(f"{folder} is a study without a finished part: run `alignblind study --out {folder}` with the models of "
                          "its study.json first.")
    for name, part in known.items():
        _check_columns(folder / f"{name}.parquet", part)
    n_layers = _n_layers(part for name, part in known.items() if not name.startswith("view_"))    # a view is of one layer
    missing = [name for name in expected_parts(config, concept, n_layers) if name not in known]
    return Study(folder, config, concept, known, n_layers, missing)


def _is_single(part: Result) -> bool:
    """Whether a part is of a verb that measures one model, and of no study: its model has neither role."""
    return "role" in part.rows and len(part.rows) > 0 and not part.rows["role"].isin(ROLES).any()


def _read_config(folder: Path) -> dict[str, Any]:
    note = folder / "study.json"
    if not is_folder(folder):
        raise ResultError(f"{named('', folder)} is not a folder: give the --out folder of a study.")
    if not is_file(note):
        raise ResultError(f"{folder} holds no study (no study.json in it): give the --out folder of `alignblind study`.")
    config = read_json(note, "", ResultError, advice="restore it or run the study into another folder")
    wanted = ("base", "aligned", "concept", "cue", "quick", "seed", "decoding", "lora")
    lacking = [name for name in wanted if not isinstance(config, dict) or name not in config]
    if lacking:
        raise ResultError(f"{note} is not the configuration of a study: it lacks {', '.join(lacking)}.")
    return dict(config)


def _check_columns(file: Path, part: Result) -> None:
    reading = file.stem.startswith("awareness") or file.stem.endswith("_awareness")
    if file.stem.startswith("view"):
        return    # `views` says what it cannot show
    wanted = INSTRUMENT_COLUMNS if file.stem.startswith("reading") else READING_COLUMNS if reading else ANSWER_COLUMNS
    lacking = sorted(wanted - set(part.rows.columns))
    if lacking:
        raise ResultError(f"{file} lacks the columns {', '.join(lacking)}: another version made it. Delete it and its .json to compute "
                          "it anew.")


def _n_layers(parts: Iterable[Result]) -> int | None:
    """The depth of the models, from the layers that were read."""
    found = [int(part.rows["layer"].max()) + 1 for part in parts if "layer" in part.rows and part.rows["role"].eq("aligned").all()]
    return max(found, default=None)


def expected_parts(config: dict[str, Any], concept: Concept, n_layers: int | None) -> list[str]:
    """Names of all parts of a study, in the order in which they are computed; without steering where the depth is not known yet."""
    names, cue = [], config["cue"]
    for role in ROLES:
        names += [f"behaviour_{role}", f"balanced_{role}", *(f"awareness_{role}_{question}" for question in questions(concept, cue)),
                  *(f"reading_{name}_{role}" for name in instruments(concept, cue, config.get("selfie", "paper"))),
                  *(f"view_{name}_{role}" for name in view_names(concept, cue))]
    if can_steer(concept, cue) and n_layers:
        compared = [early_window(n_layers), late_window(n_layers)]
        for sense in steering_names(concept):
            for window in compared if config["quick"] else layer_windows(n_layers):
                label = f"steering_{sense}_{window[0]:02d}-{window[-1]:02d}"
                names += [label, f"{label}_awareness"] if window in compared else [label]
    for group in (QUICK_GROUPS if config["quick"] else LAYER_GROUPS) if trainable(concept, cue) else ():
        names += [f"lora_{group}", f"lora_{group}_awareness"]
    return list(dict.fromkeys(names))


# --- summary tables -------------------------------------------------------------------------------------------------------------------


def summary_tables(study: Study) -> dict[str, pd.DataFrame]:
    """All tables of the report by name; one whose rows are not there is left out."""
    treated, read = study.has("behaviour_aligned"), study.either(*(f"reading_{name}" for name in INSTRUMENTS))
    wanted: list[tuple[str, bool, Callable[[Study], pd.DataFrame]]] = [
        ("planted", bool(study.record), planted_table),
        ("behaviour", study.either("behaviour"), behaviour_table),
        ("position", study.either("balanced"), position_table),
        ("awareness", len(_readings(study)) > 0, scores_table),
        ("awareness_layers", len(_readings(study)) > 0, curves_table),
        ("instruments", read, instruments_table),
        ("instrument_layers", read, instrument_layers_table),
        ("selfie", study.either("reading_selfie"), open_readings_table),
        ("probes", study.either("reading_probes"), probes_table),
        ("steering", treated and bool(_steering_parts(study)), steering_table),
        ("lora", treated and bool(_lora_parts(study)), lora_table),
        ("lora_training", True, training_table),
        ("comparison", True, treatments_table),
        ("audit", treated, audit_table),
    ]
    made = {name: make(study) for name, there, make in wanted if there}
    return {name: table for name, table in made.items() if len(table)}


def behaviour_table(study: Study) -> pd.DataFrame:
    """One row per role, kind and category (and pooled), published design: counts, rate, intervals, bounds, mean log-odds."""
    rows = study.rows(f"behaviour_{role}" for role in ROLES)
    table = _summary(rows, ("role", "kind", "category"), study)
    pooled = _summary(rows, ("role", "kind"), study).assign(category=POOLED)
    return _ordered(pd.concat([table, pooled], ignore_index=True), kind=("implicit", "explicit"),
                    category=(*study.concept.categories, POOLED), role=ROLES)


def position_table(study: Study) -> pd.DataFrame:
    """One row per design, role and template: association beside position; in the published design they cannot be told apart."""
    rows = study.rows(f"{design}_{role}" for design in ("balanced", "behaviour") for role in ROLES)
    table = position_effect(rows, by=("design", "role"))
    table["invalid_share"] = 1 - table["valid"] / table["n"]
    return _ordered(table, design=("balanced", "published"), template=[template.name for template in study.concept.implicit], role=ROLES)


def curves_table(study: Study) -> pd.DataFrame:
    """One row per question, role, sense and source layer: mean change of the sense word's probability, its interval, n readings."""
    rows = _readings(study)
    records = []
    for (question, role, layer), group in rows.groupby(["interpretation", "role", "layer"], sort=False):
        for side, sense in (("group", study.concept.group_sense), ("other", study.concept.other_sense)):
            low, high = t_interval(group[f"d_{side}"].to_numpy(float), group["context"].to_numpy())
            records.append({"question": question, "role": role, "sense": sense, "word": study.concept.senses[sense].word, "layer": layer,
                            "n": len(group), "mean": group[f"d_{side}"].mean(), "low": low, "high": high,
                            "unpatched": group[f"base_{side}"].mean()})
    return pd.DataFrame.from_records(records)


def scores_table(study: Study) -> pd.DataFrame:
    """One row per question, role and control (none first): r_blind with interval, n readings and the unpatched probabilities."""
    records = []
    for (question, role, control), group in _all_readings(study).groupby(["interpretation", "role", "control"], sort=False):
        low, high = t_interval(group["blind"].to_numpy(float), group["context"].to_numpy())
        records.append({"question": question, "role": role, "control": control, "n": n_readings(group), "layers": group["layer"].nunique(),
                        "r_blind": group["blind"].mean(), "low": low, "high": high, "d_group": group["d_group"].mean(),
                        **{name: group[name].mean() for name in ("d_other", "base_group", "base_other")}})
    return pd.DataFrame.from_records(records)


def _instrument_rows(study: Study) -> pd.DataFrame:
    """Readings by every instrument: the patchscope's first question and the parts `reading_*`, with a column `panel`."""
    names = [f"awareness_{role}_{QUESTION}" for role in ROLES]
    names += [f"reading_{name}_{role}" for name in INSTRUMENTS for role in ROLES]
    rows = study.rows(names)
    return rows.assign(panel=rows["instrument"].str.replace("_", " "))


def instruments_table(study: Study) -> pd.DataFrame:
    """One row per instrument, role and control: mean reading (-1 the group sense, 1 the other) with its interval, n readings."""
    return summarise_readings(_instrument_rows(study), by=("panel", "role", "control"))


def instrument_layers_table(study: Study) -> pd.DataFrame:
    """One row per instrument, role and layer: mean reading with its interval, n readings (no controls)."""
    return summarise_readings(readings_of(_instrument_rows(study)), by=("panel", "role", "layer"))


def open_readings_table(study: Study) -> pd.DataFrame:
    """One row per role and control: how many open-ended readings were of each sense or none, with shares and exact intervals."""
    return selfie_table(study.rows(f"reading_selfie_{role}" for role in ROLES), study.concept, by=("role", "control"))


def probes_table(study: Study) -> pd.DataFrame:
    """One row per role and layer: accuracy of the sense probe on sentences it was not trained on, beside its control probes."""
    rows = readings_of(study.rows(f"reading_probes_{role}" for role in ROLES))
    shown = [name for name in ("tested", "accuracy", "accuracy_low", "accuracy_high", "accuracy_shuffled", "accuracy_untrained",
                               "selectivity") if name in rows]
    return rows.drop_duplicates(["role", "layer"])[["role", "layer", *shown]].reset_index(drop=True)


def steering_table(study: Study) -> pd.DataFrame:
    """Implicit answers: the untreated row, then one row per sense or control and window of layers, by the window's first layer."""
    rows = study.rows(["behaviour_aligned", *_steering_parts(study)])
    table = _summary(rows[rows["kind"] == "implicit"], ("family", "sense", "layers"), study)
    table["start"] = [int(layers.split("-")[0]) if layers else -1 for layers in table["layers"]]
    return _ordered(table, sense=("", *steering_names(study.concept)), start=sorted(table["start"].unique()))


def lora_table(study: Study) -> pd.DataFrame:
    """Implicit and explicit answers: the untreated aligned model, then each layer group that was fine-tuned."""
    rows = study.rows(["behaviour_aligned", *_lora_parts(study)])
    table = _summary(rows, ("treatment", "kind"), study)
    table.insert(1, "label", [name.removeprefix("lora_") for name in table["treatment"]])
    return table


def training_table(study: Study) -> pd.DataFrame:
    """What each adapter's training.json says: layers, examples, parameters, losses, seconds."""
    records = []
    for group in LAYER_GROUPS:
        note = study.folder / "adapters" / f"lora_{group}" / "training.json"
        if is_file(note):
            needs = ("layers", "loss", "examples", "examples_dropped", "parameters", "seconds")
            found = read_object(note, "", ResultError, needs=needs, advice="delete its folder to train the adapter anew")
            losses = found.get("losses") or [math.nan]
            records.append({"group": group, "layers": layers_text(found["layers"]), "first_loss": losses[0],
                            "last_loss": losses[-1], "mean_loss": found["loss"], **{key: found[key] for key in (
                                "examples", "examples_dropped", "parameters", "seconds")}})
    return pd.DataFrame.from_records(records)


def treatments_table(study: Study) -> pd.DataFrame:
    """One row per model and treatment that has both answers and readings: see `comparison_table`, with labels."""
    treated = [name for name in (*_steering_parts(study), *_lora_parts(study)) if study.has(f"{name}_awareness")]
    rows = []
    for role, names in (("base", []), ("aligned", treated)):
        answers = study.rows([f"behaviour_{role}", *names])
        readings = study.rows([f"awareness_{role}_{QUESTION}", *(f"{name}_awareness" for name in names)])
        if len(answers) and len(readings):
            table = comparison_table(answers, readings, seed=study.config["seed"])
            about = answers.drop_duplicates("treatment").set_index("treatment")
            table.insert(0, "label", [_label(study, role, name, about.loc[name]) for name in table["treatment"]])
            rows.append(table)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def audit_table(study: Study) -> pd.DataFrame:
    """Claim -> estimate -> interval -> controls -> revision: what alignment did, and whether each treatment lowers implicit bias.

    Placebos of a steering window are those that were steered in it; LoRA has none in a study (`alignblind compare` trains one).
    """
    revision = _revision(study)
    aligned, base = study.rows(["behaviour_aligned"]), study.rows(["behaviour_base"]).assign(treatment="base")
    readings = [study.rows([f"awareness_base_{QUESTION}"]).assign(treatment="base"), study.rows([f"awareness_aligned_{QUESTION}"])]
    read = pd.concat([readings_of(part) for part in readings if len(part)]) if all(map(len, readings)) else pd.DataFrame()
    records = alignment_claims(pd.concat([base, aligned]), read, revision) if len(base) else []
    treated = study.rows([*_steering_parts(study), *_lora_parts(study)])
    if len(treated):
        records += _treatment_claims(study, pd.concat([aligned, treated]), revision)
    return pd.DataFrame.from_records(records)


def _treatment_claims(study: Study, answers: pd.DataFrame, revision: str) -> list[dict[str, Any]]:
    """A claim of each compared window and each adapter."""
    implicit = answers[answers["kind"] == "implicit"]
    about = {str(name): rows.iloc[0] for name, rows in implicit.groupby("treatment", sort=False)}
    wanted = [name for name, row in about.items() if row.get("family") == "lora"
              or (row.get("family") == "steering" and row["layers"] in study.compared)]
    kept = implicit[implicit["treatment"].isin(["untreated", *wanted])]
    differences = rows_by(corrected(paired_differences(kept, by=("kind",)))) if wanted else {}
    out = []
    for name in wanted:
        layers = str(about[name]["layers"])
        placebos = [other for other, row in about.items() if row.get("family") == "placebo" and row["layers"] == layers]
        row = differences[name]
        more = max(_invalid(answers, name, kind) - _invalid(answers, "untreated", kind) for kind in ("implicit", "explicit"))
        out.append(treatment_claim(implicit, name, row, placebos if about[name]["family"] == "steering" else [], more, revision,
                                   label=_label(study, "aligned", name, about[name])))
    return out


def _invalid(answers: pd.DataFrame, treatment: str, kind: str) -> float:
    """The share of invalid answers; 0 where none of the kind was asked."""
    outcomes = answers.loc[(answers["treatment"] == treatment) & (answers["kind"] == kind), "outcome"]
    return float((outcomes == "invalid").mean()) if len(outcomes) else 0.0


def methods_paragraph(study: Study) -> str:
    """A paragraph that a paper can start from; empty for a study without the aligned model's answers."""
    if not study.has("behaviour_aligned"):
        return ""
    rows, note = study.rows(["behaviour_aligned"]), study.parts["behaviour_aligned"].provenance
    opening = methods_opening(study.config, rows[rows["kind"] == "implicit"], _revision(study), "each in the order of the paper",
                              read=len(_readings(study)) > 0)
    said = "Steering replaces the identifiers' residual stream in windows of layers, beside placebo phrases. "
    steered = said if _steering_parts(study) else ""
    return (f"{opening}{study.config['base']['name']} was asked the same. Differences are paired by item, with intervals clustered over "
            "word pairs and templates (Cameron, Gelbach and Miller, 2011), exact where counts are small, and p-values corrected after "
            f"Holm (1979). {steered}"
            f"{software(note.get('versions', {}))}")


def _revision(study: Study) -> str:
    """The weights of the aligned model."""
    return str(study.config.get("aligned_revision") or "not recorded")


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
        table = _summary(rows[rows["kind"] == "implicit"], ("role",), study)
        yield _planted_rate(f"{role}: implicit rate", planted[role]["implicit"], _records(table)[0])
        asked = rows[rows["kind"] == "explicit"]
        if len(asked):
            what = f"{role}: agreement with explicit statements, whichever way they are put"
            yield _planted_rate(what, planted[role]["explicit_agreement"], _agreement(asked))


def _agreement(asked: pd.DataFrame) -> dict[str, Any]:
    """How often explicit statements were agreed with: endorsing the stereotype or its reverse, whichever the statement says."""
    valid = asked[asked["outcome"] != "invalid"]
    agreed = int((valid["outcome"] == valid["statement"].map({"stereotype": "stereotyped", "reverse": "reversed"})).sum())
    low, high = exact_interval(agreed, len(valid))
    return {"rate": agreed / len(valid) if len(valid) else math.nan, "low": low, "high": high, "n": len(asked),
            "invalid_share": 1 - len(valid) / len(asked)}


def _planted_rate(quantity: str, value: float, found: dict[str, Any]) -> dict[str, Any]:
    measured = {name: found[name] for name in ("low", "high", "n", "invalid_share")}
    return {"quantity": quantity, "unit": "rate", "planted": value, "measured": found["rate"], **measured}


def _planted_readings(study: Study, planted: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for row in _records(scores_table(study)) if len(_readings(study)) else []:
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
    for row in _records(table[table["family"] != "untreated"]):
        first, _, last = row["layers"].partition("-")
        window = set(range(int(first), int(last or first) + 1))
        whole = bool(effect) and effect <= window
        if whole or window <= none:
            value = full.get(row["sense"], truth["implicit"]) if whole else truth["implicit"]
            yield _planted_rate(f"aligned: implicit rate, steered towards {row['sense']} at layers {_range(row['layers'])}", value, row)


def _summary(rows: pd.DataFrame, by: Sequence[str], study: Study) -> pd.DataFrame:
    """`summarise` with the mean log-odds of each group and its clustered interval (NaN for explicit answers)."""
    seed = int(study.config["seed"])
    groups = [group for _, group in rows.groupby(list(by), sort=False, dropna=False)]
    means = [group["log_odds"].mean() for group in groups]
    ends = [_interval(group, "log_odds", ("word_pair", "template"), study) for group in groups]
    table = pd.concat([summarise(group, by=by, seed=seed) for group in groups], ignore_index=True)
    return table.assign(log_odds=means, log_odds_low=[low for low, _ in ends], log_odds_high=[high for _, high in ends])


def _interval(rows: pd.DataFrame, column: str, clusters: Sequence[str], study: Study) -> tuple[float, float]:
    if rows[column].isna().any():
        return math.nan, math.nan
    labels = [rows[name].to_numpy() for name in clusters]
    low, high = mean_interval(rows[column].to_numpy(float), labels, seed=int(study.config["seed"]))
    return low, high


def _ordered(table: pd.DataFrame, **orders: Sequence[Any]) -> pd.DataFrame:
    """The table sorted by columns whose values have an order of their own."""
    ranks = {name: {value: i for i, value in enumerate(order)} for name, order in orders.items()}
    keys = pd.DataFrame({name: table[name].map(rank) for name, rank in ranks.items()})
    return table.loc[keys.sort_values(list(orders), kind="stable").index].reset_index(drop=True)


def _all_readings(study: Study) -> pd.DataFrame:
    """Readings of both models by every question, and their controls."""
    return study.rows(f"awareness_{role}_{question}" for question in study.concept.interpretations for role in ROLES)


def _readings(study: Study) -> pd.DataFrame:
    rows = _all_readings(study)
    return readings_of(rows) if len(rows) else rows


def _steering_parts(study: Study) -> list[str]:
    return [name for sense in (steering_names(study.concept) if study.steered else []) for name in sorted(study.parts)
            if name.startswith(f"steering_{sense}_") and not name.endswith("_awareness")]


def _lora_parts(study: Study) -> list[str]:
    return [f"lora_{group}" for group in LAYER_GROUPS if study.has(f"lora_{group}")]


def _label(study: Study, role: str, treatment: str, about: pd.Series) -> str:
    if about["family"] == "untreated":
        return role if role == "base" else f"{role}, untreated"
    if about["family"] == "lora":
        return "LoRA " + treatment.removeprefix("lora_")
    what = "steering" if about["family"] == "steering" else "placebo"
    return f"{what}: {about['sense']}, {study.compared.get(about['layers'], 'layers')} {_range(about['layers'])}"


def _range(layers: str) -> str:
    return layers.replace("-", "–")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


# --- columns of shown tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a shown table: its title and how a row's cell is written."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    numeric: bool = True


def percent(share: float | int | None) -> str:
    """A share in per cent with one decimal; a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def signed(value: float | int | None) -> str:
    """A signed number with two significant digits and a true minus; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:+.1f}" if abs(value) >= 10 else f"{value:+#.2g}"
    return text.replace("-", "−") if value else "0.0"


def plain(value: float | int | None) -> str:
    """A number that is never negative: two significant digits, or whole from 100 on."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:#.2g}".rstrip(".")


def _text(title: str, name: str) -> Column:
    return Column(title, lambda row: str(row[name]), numeric=False)


def _count(title: str, name: str) -> Column:
    return Column(title, lambda row: "–" if pd.isna(row.get(name)) else f"{int(row[name]):,}".replace(",", " "))


def _share(title: str, name: str) -> Column:
    return Column(title, lambda row: percent(row.get(name, math.nan)))


def _shares(title: str, low: str, high: str) -> Column:
    """Two ends in per cent: an interval, or bounds."""
    return Column(title, lambda row: _ends(percent(row.get(low, math.nan)), percent(row.get(high, math.nan))))


def _rate(title: str, name: str, low: str, high: str) -> Column:
    """A rate in per cent with its interval in brackets."""
    ends = _shares("", low, high)
    return Column(title, lambda row: "–" if pd.isna(row.get(name, math.nan)) else f"{percent(row[name])} [{ends.cell(row)}]")


def _mean(title: str, name: str, low: str, high: str) -> Column:
    """A signed mean with its interval in brackets."""
    def cell(row: dict[str, Any]) -> str:
        ends = _ends(signed(row.get(low, math.nan)), signed(row.get(high, math.nan)), ", ")
        return "–" if pd.isna(row.get(name, math.nan)) else f"{signed(row[name])} [{ends}]"
    return Column(title, cell)


def _ends(low: str, high: str, between: str = "–") -> str:
    return "–" if low == high == "–" else f"{low}{between}{high}"


RATE = (_count("n", "n"), _count("stereotyped", "stereotyped"), _count("reversed", "reversed"), _count("rejected", "rejected"),
        _share("invalid %", "invalid_share"), _share("rate %", "rate"), _shares("exact 95 %", "low", "high"),
        _shares("clustered 95 %", "cluster_low", "cluster_high"), _shares("bounds %", "worst", "best"))
LOG_ODDS = _mean("log-odds", "log_odds", "log_odds_low", "log_odds_high")


def _mark(title: str, name: str) -> Column:
    return Column(title, lambda row: "yes" if row[name] else "no", numeric=False)


def _layers(title: str) -> Column:
    return Column(title, lambda row: _range(row["layers"]) or "–", numeric=False)


CONTROL = Column("what is read", lambda row: figures.CONTROL_NAMES[row["control"]], numeric=False)


def _signed(title: str, name: str) -> Column:
    return Column(title, lambda row: signed(row[name]))


def _plain(title: str, name: str) -> Column:
    return Column(title, lambda row: plain(row[name]))


def _planted(title: str, name: str) -> Column:
    """A planted or measured value: r_blind as a signed number, a rate in per cent."""
    return Column(title, lambda row: signed(row[name]) if row["unit"] == "score" else percent(row[name]))


COLUMNS: dict[str, Sequence[Column]] = {
    "audit": (
        _text("claim", "claim"), _mean("estimate", "estimate", "low", "high"), _count("n", "n"), _text("verdict", "verdict"),
        _text("controls", "controls"), _text("revision", "revision")),
    "planted": (
        _text("quantity", "quantity"), _planted("planted", "planted"), _planted("measured", "measured"), _planted("95 % from", "low"),
        _planted("to", "high"), _count("n", "n"), _share("invalid %", "invalid_share"), _mark("planted inside", "inside")),
    "behaviour": (_text("kind", "kind"), _text("category", "category"), _text("model", "role"), *RATE, LOG_ODDS),
    "position": (
        _text("design", "design"), _text("template", "template"), _text("model", "role"), _count("n", "n"),
        _share("invalid %", "invalid_share"), _rate("association %", "rate", "low", "high"),
        _rate("position %", "position", "position_low", "position_high"), _mark("confounded", "confounded")),
    "awareness": (
        _text("question", "question"), _text("model", "role"), CONTROL, _count("n readings", "n"), _count("layers", "layers"),
        _mean("r_blind", "r_blind", "low", "high"), _signed("mean ΔP(group word)", "d_group"), _signed("mean ΔP(other word)", "d_other"),
        _plain("P(group word) unpatched", "base_group"), _plain("P(other word) unpatched", "base_other")),
    "awareness_layers": (
        _text("question", "question"), _text("model", "role"), _text("word", "word"), _count("layer", "layer"), _count("n readings", "n"),
        _mean("ΔP", "mean", "low", "high"), _plain("P unpatched", "unpatched")),
    "instruments": (
        _text("instrument", "panel"), _text("model", "role"), CONTROL, _count("n readings", "n"), _count("layers", "layers"),
        _mean("mean reading", "mean", "low", "high"), _share("group sense %", "p_group"), _share("other sense %", "p_other")),
    "probes": (
        _text("model", "role"), _count("layer", "layer"), _count("n sentences", "tested"),
        _rate("accuracy %", "accuracy", "accuracy_low", "accuracy_high"), _share("shuffled labels %", "accuracy_shuffled"),
        _share("random weights %", "accuracy_untrained"), _signed("selectivity", "selectivity")),
    "steering": (
        Column("towards", lambda row: row["sense"] or "untreated", numeric=False), _layers("layers"),
        *(column for column in RATE if column.title != "rejected"), LOG_ODDS),
    "lora": (_text("adapter", "label"), _text("kind", "kind"), *RATE, LOG_ODDS),
    "lora_training": (
        _text("adapter", "group"), _layers("layers"), _count("examples", "examples"), _count("dropped", "examples_dropped"),
        _count("parameters", "parameters"), _plain("first loss", "first_loss"), _plain("final loss", "last_loss"),
        _plain("mean loss", "mean_loss"), _plain("seconds", "seconds")),
    "comparison": (
        _text("treatment", "label"), _count("n", "n"), _rate("implicit %", "implicit", "low", "high"),
        _shares("clustered", "cluster_low", "cluster_high"), _share("invalid %", "invalid_share"), _shares("bounds %", "worst", "best"),
        LOG_ODDS, _count("n", "explicit_n"), _rate("explicit %", "explicit", "explicit_low", "explicit_high"),
        _share("invalid %", "explicit_invalid_share"), _mean("r_blind", "r_blind", "r_blind_low", "r_blind_high"),
        _count("n", "n_readings")),
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
    return page_text(
        "report.html.j2", study=study, config=study.config, concept=study.concept,
        cue=study.concept.cue(study.config["cue"]), record=study.record,
        tables={name: _records(table) for name, table in tables.items()}, columns=COLUMNS | _sense_columns(study.concept),
        pictures={name: as_uri(svg) for name, svg in vectors.items()}, questions=_questions(study.concept),
        phrases=_phrases(study), provenance=_provenance(study),
        commands=f"{_command(study)}\nalignblind report {shlex.quote(study.folder.name)}", link=PAPER_LINK, question=QUESTION,
        pooled=POOLED, roles=ROLES, views=views, methods=methods_paragraph(study), citations=CITATIONS)


def _sense_columns(concept: Concept) -> dict[str, tuple[Column, ...]]:
    """The columns of the table of open readings, which are named after the concept's senses."""
    names = reading_names(concept) if concept.has_senses() else []
    shares = [_rate(f"{name} %", f"{name}_share", f"{name}_low", f"{name}_high") for name in names]
    return {"selfie": (_text("model", "role"), CONTROL, _count("n texts", "n"), *shares)}


def page_text(template: str, **given: Any) -> str:
    """A page from one of the package's templates. Every text is escaped, and shortened where it is longer than any that is meant."""
    return encodable(_environment().get_template(template).render(given))


def _environment() -> "Environment":
    """jinja2 over the package's templates: strict about names, with this module's ways to write numbers."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(loader=PackageLoader("alignblind_mi.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True, finalize=_shown)
    found.filters |= {"percent": percent, "signed": signed, "label": label, "whole": _whole}
    found.globals["policy"] = POLICY
    return found


def _shown(value: Any) -> Any:
    """What stands in a page for a value: a text with its control characters written out, its end only when pointed at if it is long."""
    from markupsafe import Markup

    if hasattr(value, "__html__") or not isinstance(value, str):
        return value
    text = visible(value)
    if len(text) <= LONGEST:
        return text
    return Markup('<span title="{}">{}</span>').format(shortened(text, LONGEST_TITLE), shortened(text, LONGEST))


def _whole(text: str) -> "Markup":
    """The filter for our own paragraphs, however long."""
    from markupsafe import escape

    return escape(visible(text))


def as_uri(svg: bytes) -> "Markup":
    """An image as a data URI."""
    from markupsafe import escape

    return escape("data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii"))


def _questions(concept: Concept) -> dict[str, str]:
    """The interpretation questions with their placeholders, by name."""
    return {name: asked.text.format(x=asked.placeholder) for name, asked in concept.interpretations.items()}


def _phrases(study: Study) -> dict[str, str]:
    """What is steered towards, by name, with the cue's identifiers; empty where nothing is steered."""
    cue, concept = study.concept.cue(study.config["cue"]), study.concept
    names = steering_names(concept) if study.steered else []
    return {name: concept.steering_phrase(name).format(marked=cue.marked[0], unmarked=cue.unmarked[0]) for name in names}


def version_names(notes: Iterable[dict[str, Any]]) -> list[str]:
    """Every package with its version that some parts were made with."""
    return sorted({f"{name} {version}" for note in notes for name, version in note.get("versions", {}).items()})


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
    if config.get("chat"):
        words += ["--chat", *(["--system", config["chat"]["system"]] if config["chat"]["system"] else [])]
    for name, default in (("dtype", None), ("device_map", None), ("quantization", None), ("engine", "auto")):
        given = config["aligned"].get(name, default)
        words += [f"--{name.replace('_', '-')}", str(given)] if given != default else []
    return shlex.join([*words, *(["--quick"] if config["quick"] else []), "--out", study.folder.name])
