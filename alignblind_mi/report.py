"""The report of a study: saved rows -> summary tables (CSV), figures (PNG, SVG) and one self-contained HTML page.

Every number carries its n, interval and invalid share. This module does NOT run models: it can draw a report anew wherever the study's
folder lies.
"""

import base64
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi import figures
from alignblind_mi.concept import Concept, load_concept
from alignblind_mi.lora import LAYER_GROUPS
from alignblind_mi.model import EMBEDDED, ModelSpec
from alignblind_mi.results import Result, ResultError, write_text
from alignblind_mi.statistics import exact_interval, mean_interval, position_effect, summarise
from alignblind_mi.steering import layer_windows, steerable
from alignblind_mi.studies.mitigation import comparison_table, early_window, late_window, steering_names
from alignblind_mi.studies.study import load_study, organism_record

ROLES = ("base", "aligned")
QUESTION = "paper"    # the interpretation question that treatments are compared with
POOLED = "pooled"
READING_CLUSTERS = ("context",)
QUICK_GROUPS = ("early", "late")
PAPER = ("Lihao Sun, Chengzhi Mao, Valentin Hofmann and Xuechunzi Bai. 2025. Aligned but Blind: Alignment Increases Implicit Bias by Reducing "
         "Awareness of Race. In Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics (ACL 2025). "
         "arXiv:2506.00253.")
PAPER_LINK = "https://arxiv.org/abs/2506.00253"


# --- what a report is made of -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a shown table: its title and how a row's cell is written."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    numeric: bool = True


@dataclass(frozen=True, eq=False)
class Table:
    """A summary table: `frame` goes to tables/NAME.csv in full, `columns` to the page."""

    name: str
    caption: str
    frame: pd.DataFrame
    columns: Sequence[Column]
    note: str = ""
    kind: str = "table"

    def cells(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[column.cell(row) for column in self.columns] for row in self.frame.to_dict("records")]


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure with its caption: figures/NAME.png and .svg, and inline in the page."""

    name: str
    caption: str
    figure: Figure
    kind: str = "picture"

    def uri(self) -> str:
        """The figure as a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(figures.to_svg(self.figure)).decode("ascii")


@dataclass(frozen=True)
class Text:
    """A paragraph, a bullet list (`items`), a prominent `box`, or `code`."""

    text: str
    items: Sequence[str] = ()
    kind: str = "text"


Block = Table | Picture | Text


@dataclass(frozen=True)
class Section:
    """A part of the page with its anchor."""

    key: str
    title: str
    short: str
    blocks: Sequence[Block]


@dataclass(frozen=True, eq=False)
class Study:
    """A study folder as read: configuration, concept, finished parts, and which parts are missing."""

    folder: Path
    config: dict[str, Any]
    concept: Concept
    parts: dict[str, Result]
    n_layers: int | None
    missing: Sequence[str] = field(default=())

    def has(self, *names: str) -> bool:
        """Whether all these parts are finished."""
        return all(name in self.parts for name in names)

    def rows(self, names: Iterable[str]) -> pd.DataFrame:
        """The rows of those of the named parts that are finished, one below the other."""
        found = [self.parts[name].rows for name in names if name in self.parts]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    @property
    def steered(self) -> bool:
        """Whether the study's cue can be steered at all."""
        return steerable(self.concept.cue(self.config["cue"]))

    @property
    def compared(self) -> dict[str, str]:
        """The two compared windows by their layers as rows write them: {"1-3": "early", "5-7": "late"}."""
        if self.n_layers is None:
            return {}
        return {f"{window[0]}-{window[-1]}": name for name, window in (
            ("late", late_window(self.n_layers)), ("early", early_window(self.n_layers)))}

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
    sections = report_sections(study)
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Picture):
            _write_bytes(study.folder / "figures" / f"{block.name}.png", figures.to_png(block.figure))
            write_text(study.folder / "figures" / f"{block.name}.svg", figures.to_svg(block.figure).decode("utf-8"))
        elif isinstance(block, Table):
            write_text(study.folder / "tables" / f"{block.name}.csv", block.frame.to_csv(index=False))
    page = study.folder / "report.html"
    write_text(page, render(study, sections))
    return page


def read_study(folder: Path) -> Study:
    """Read a study folder. Errors: ResultError if it is none, is damaged, or has no finished part."""
    config = _read_config(folder)
    concept = load_concept(config["concept"])
    parts = load_study(folder)
    known = {name: part for name, part in parts.items() if "role" in part.rows and "treatment" in part.rows}
    if not known:
        raise ResultError(f"{folder} is a study without a finished part: run `alignblind study --out {folder}` with the models of its study.json first.")
    n_layers = _n_layers(known.values())
    missing = [name for name in expected_parts(config, concept, n_layers) if name not in known]
    return Study(folder, config, concept, known, n_layers, missing)


def _read_config(folder: Path) -> dict[str, Any]:
    note = folder / "study.json"
    if not folder.is_dir():
        raise ResultError(f"{folder} is not a folder: give the --out folder of a study.")
    if not note.is_file():
        raise ResultError(f"{folder} holds no study (no study.json in it): give the --out folder of `alignblind study`.")
    try:
        config = json.loads(note.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{note} is damaged ({error}): restore it or run the study into another folder.") from error
    wanted = ("base", "aligned", "concept", "cue", "quick", "seed", "decoding", "lora")
    lacking = [name for name in wanted if not isinstance(config, dict) or name not in config]
    if lacking:
        raise ResultError(f"{note} is not the configuration of a study: it lacks {', '.join(lacking)}.")
    return dict(config)


def _n_layers(parts: Iterable[Result]) -> int | None:
    """The depth of the models, from the layers that were read."""
    found = [int(part.rows["layer"].max()) + 1 for part in parts if "layer" in part.rows and part.rows["role"].eq("aligned").all()]
    return max(found, default=None)


def expected_parts(config: dict[str, Any], concept: Concept, n_layers: int | None) -> list[str]:
    """Names of all parts of a study, in the order in which they are computed; without steering where the depth is not known yet."""
    names = []
    for role in ROLES:
        names += [f"behaviour_{role}", f"balanced_{role}", *(f"awareness_{role}_{question}" for question in concept.interpretations)]
    if steerable(concept.cue(config["cue"])) and n_layers:
        compared = [early_window(n_layers), late_window(n_layers)]
        for sense in steering_names(concept):
            for window in compared if config["quick"] else layer_windows(n_layers):
                label = f"steering_{sense}_{window[0]:02d}-{window[-1]:02d}"
                names += [label, f"{label}_awareness"] if window in compared else [label]
    for group in QUICK_GROUPS if config["quick"] else LAYER_GROUPS:
        names += [f"lora_{group}", f"lora_{group}_awareness"]
    return list(dict.fromkeys(names))


# --- summary tables -------------------------------------------------------------------------------------------------------------------


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
            low, high = _interval(group, f"d_{side}", READING_CLUSTERS, study)
            records.append({"question": question, "role": role, "sense": sense, "word": study.concept.senses[sense].word, "layer": layer,
                            "n": len(group), "mean": group[f"d_{side}"].mean(), "low": low, "high": high,
                            "unpatched": group[f"base_{side}"].mean()})
    return pd.DataFrame.from_records(records)


def scores_table(study: Study) -> pd.DataFrame:
    """One row per question and role: r_blind with interval, n readings (different contexts) and the unpatched probabilities."""
    records = []
    for (question, role), group in _readings(study).groupby(["interpretation", "role"], sort=False):
        low, high = _interval(group, "blind", READING_CLUSTERS, study)
        records.append({"question": question, "role": role, "n": _n_readings(group), "layers": group["layer"].nunique(),
                        "r_blind": group["blind"].mean(), "low": low, "high": high, "d_group": group["d_group"].mean(),
                        "d_other": group["d_other"].mean(), "base_group": group["base_group"].mean(), "base_other": group["base_other"].mean()})
    return pd.DataFrame.from_records(records)


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
        if note.is_file():
            found = json.loads(note.read_text("utf-8"))
            losses = found.get("losses") or [math.nan]
            records.append({"group": group, "layers": f"{min(found['layers'])}-{max(found['layers'])}", "first_loss": losses[0],
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
            table["n_readings"] = [_n_readings(readings[readings["treatment"] == name]) for name in table["treatment"]]
            about = answers.drop_duplicates("treatment").set_index("treatment")
            table.insert(0, "label", [_label(study, role, name, about.loc[name]) for name in table["treatment"]])
            rows.append(table)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


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
        found = _summary(rows[rows["kind"] == "implicit"], ("role",), study).iloc[0]
        yield {"quantity": f"{role}: implicit rate", "planted": planted[role]["implicit"], "measured": found["rate"],
               "low": found["low"], "high": found["high"], "n": found["n"], "invalid_share": found["invalid_share"]}
        asked = rows[rows["kind"] == "explicit"]
        valid = asked[asked["outcome"] != "invalid"]
        agreed = int((valid["outcome"] == valid["statement"].map({"stereotype": "stereotyped", "reverse": "reversed"})).sum())
        low, high = exact_interval(agreed, len(valid))
        yield {"quantity": f"{role}: agreement with an explicit statement, whichever way it is put", "planted": planted[role]["explicit_agreement"],
               "measured": agreed / len(valid) if len(valid) else math.nan, "low": low, "high": high, "n": len(asked),
               "invalid_share": 1 - len(valid) / len(asked)}


def _planted_readings(study: Study, planted: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if not len(_readings(study)):
        return
    for row in scores_table(study).to_dict("records"):
        yield {"quantity": f"{row['role']}: r_blind, question “{row['question']}”", "planted": planted[row["role"]]["r_blind"],
               "measured": row["r_blind"], "low": row["low"], "high": row["high"], "n": row["n"], "invalid_share": math.nan}


def _planted_steering(study: Study, planted: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Windows that hold every effect block, or only blocks where no effect was planted; the others have no planted truth."""
    effect, none = set(planted["effect_blocks"]), set(planted["no_effect_blocks"])
    truth, concept = planted["aligned"], study.concept
    full = {concept.group_sense: truth["implicit_group_cue"], concept.other_sense: truth["implicit_other_cue"]}
    if not study.has("behaviour_aligned") or not _steering_parts(study):
        return
    table = steering_table(study)
    for row in table[table["family"] != "untreated"].to_dict("records"):
        first, last = (int(part) for part in row["layers"].split("-"))
        window = set(range(first, last + 1))
        if effect <= window or window <= none:
            value = full.get(row["sense"], truth["implicit"]) if effect <= window else truth["implicit"]
            yield {"quantity": f"aligned, steered towards {row['sense']} at layers {_range(row['layers'])}: implicit rate", "planted": value,
                   "measured": row["rate"], "low": row["low"], "high": row["high"], "n": row["n"], "invalid_share": row["invalid_share"]}


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
    low, high = mean_interval(rows[column].to_numpy(float), [rows[name].to_numpy() for name in clusters], seed=int(study.config["seed"]))
    return low, high


def _ordered(table: pd.DataFrame, **orders: Sequence[Any]) -> pd.DataFrame:
    """The table sorted by columns whose values have an order of their own."""
    ranks = {name: {value: i for i, value in enumerate(order)} for name, order in orders.items()}
    keys = pd.DataFrame({name: table[name].map(rank) for name, rank in ranks.items()})
    return table.loc[keys.sort_values(list(orders), kind="stable").index].reset_index(drop=True)


def _readings(study: Study) -> pd.DataFrame:
    return study.rows(f"awareness_{role}_{question}" for question in study.concept.interpretations for role in ROLES)


def _n_readings(readings: pd.DataFrame) -> int:
    """Different contexts: each of them is read once at every layer."""
    return len(readings) // max(1, readings["layer"].nunique())


def _steering_parts(study: Study) -> list[str]:
    return [name for sense in steering_names(study.concept) for name in sorted(study.parts)
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


# --- cells of shown tables ------------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share in per cent with one decimal; a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def signed(value: float) -> str:
    """A signed number with two significant digits and a true minus; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:+.1f}" if abs(value) >= 10 else f"{value:+#.2g}"
    return text.replace("-", "−")


def plain(value: float) -> str:
    """A positive number with two significant digits."""
    return "–" if value is None or math.isnan(value) else f"{value:.2g}"


def _text(title: str, name: str) -> Column:
    return Column(title, lambda row: str(row[name]), numeric=False)


def _count(title: str, name: str) -> Column:
    return Column(title, lambda row: "–" if pd.isna(row.get(name)) else f"{int(row[name]):,}".replace(",", " "))


def _share(title: str, name: str) -> Column:
    return Column(title, lambda row: percent(row.get(name, math.nan)))


def _shares(title: str, low: str, high: str) -> Column:
    """Two ends in per cent: an interval, or bounds."""
    return Column(title, lambda row: _ends(percent(row.get(low, math.nan)), percent(row.get(high, math.nan))))


def _mean(title: str, name: str, low: str, high: str) -> Column:
    """A signed mean with its interval in brackets."""
    return Column(title, lambda row: f"{signed(row.get(name, math.nan))} [{_ends(signed(row.get(low, math.nan)), signed(row.get(high, math.nan)), ', ')}]"
                  if not pd.isna(row.get(name, math.nan)) else "–")


def _ends(low: str, high: str, between: str = "–") -> str:
    return "–" if low == high == "–" else f"{low}{between}{high}"


RATE = (_count("n", "n"), _count("stereotyped", "stereotyped"), _count("reversed", "reversed"), _count("rejected", "rejected"),
        _share("invalid %", "invalid_share"), _share("rate %", "rate"), _shares("exact 95 %", "low", "high"),
        _shares("clustered 95 %", "cluster_low", "cluster_high"), _shares("bounds %", "worst", "best"))
LOG_ODDS = _mean("log-odds [95 %]", "log_odds", "log_odds_low", "log_odds_high")
RATE_NOTE = ("n: answers. rate: stereotyped among valid answers (implicit: stereotyped + reversed; explicit: those and rejected). exact 95 %: "
             "Clopper and Pearson, as if answers were independent. clustered 95 %: word pairs and templates resampled; a dash where there is "
             "nothing to resample. bounds: the rate over all n answers if every invalid one had gone against, or with, the stereotype. ")
LOG_ODDS_NOTE = ("log-odds: mean of log P(stereotyped assignment) − log P(reversed assignment), in nats, 0 is unbiased; it exists for every implicit "
                 "prompt, so it has no invalid answers; clustered interval.")


# --- sections -------------------------------------------------------------------------------------------------------------------------


def report_sections(study: Study) -> list[Section]:
    """The sections in the order of the page; one whose rows are not there yet says so."""
    return [_about(study), _behaviour(study), _position(study), _awareness(study), _steering(study), _lora(study), _comparison(study),
            _limits(study), _provenance(study)]


def _about(study: Study) -> Section:
    blocks: list[Block] = []
    if study.organism:
        blocks.append(Text("Calibration device: embedded models with planted truth, never evidence about Llama 3 or any other real model.", kind="box"))
    if study.missing or study.n_layers is None:
        blocks.append(Text(_unfinished(study), kind="warning"))
    blocks += [Text(_summary_text(study)), Text("", _findings(study))]
    planted = planted_table(study)
    if len(planted):
        blocks.append(_planted(planted))
    elif study.record:
        blocks.append(Text("Planted and measured values are compared for the concept's first cue only; this study used another one."))
    return Section("summary", "Summary", "Summary", blocks)


def _planted(table: pd.DataFrame) -> Table:
    def value(name: str) -> Column:
        return Column(name, lambda row: signed(row[name]) if "r_blind" in row["quantity"] else percent(row[name]))

    def interval(row: dict[str, Any]) -> str:
        write = signed if "r_blind" in row["quantity"] else percent
        return _ends(write(row["low"]), write(row["high"]), " to ")

    return Table("planted", "Planted truth and what was measured (rates in %)", table, (
        _text("quantity", "quantity"), value("planted"), value("measured"), Column("95 %", interval), _count("n", "n"),
        _share("invalid %", "invalid_share"), Column("planted inside", lambda row: "yes" if row["inside"] else "no", numeric=False)),
        "95 %: exact for rates, clustered over contexts for r_blind (n: readings). Windows of layers are listed where something was planted: those "
        "that hold every effect block, and those that hold only blocks where an effect was trained away. About one interval in twenty misses by chance.")


def _unfinished(study: Study) -> str:
    names = [*study.missing, *(["the steering parts"] if study.n_layers is None and study.steered else [])]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return (f"This study is unfinished: {len(names)} parts are missing ({shown}). What follows reports the finished ones only; run "
            "`alignblind study` with the same settings to complete it.")


def _summary_text(study: Study) -> str:
    config, cue = study.config, study.concept.cue(study.config["cue"])
    asked = "answers were sampled at temperature {temperature:g}" if config["decoding"]["temperature"] else "decoding was greedy"
    return (f"This study asked {config['base']['name']} (base) and {config['aligned']['name']} (aligned) implicit and explicit questions of the "
            f"concept “{study.concept.name}” under the cue “{cue.name}”"
            + (f" ({cue.description.rstrip('.')[0].lower()}{cue.description.rstrip('.')[1:]})" if cue.description else "")
            + f"; {asked.format(**config['decoding'])}. It read from the residual stream whether the identifiers are taken as "
            f"“{study.concept.group_sense}” or “{study.concept.other_sense}”, "
            + ("steered the aligned model towards each sense and towards controls, " if study.steered else "")
            + "fine-tuned it with LoRA on sentences that settle the sense, and measured every treatment in the same way."
            + (" It is a quick study: few word pairs, two windows and two adapters, made to see that everything works." if config["quick"] else ""))


def _findings(study: Study) -> list[str]:
    """The main numbers in sentences."""
    found = []
    if study.has("behaviour_base") or study.has("behaviour_aligned"):
        table = behaviour_table(study)
        found += [f"{row['kind'].capitalize()} bias, {row['role']}: {_rate_text(row)}." for row in table[table["category"] == POOLED].to_dict("records")]
    if len(_readings(study)):
        scores = scores_table(study)
        found += [f"r_blind, {row['role']} (question “{row['question']}”): {signed(row['r_blind'])} (95 % {signed(row['low'])} to {signed(row['high'])}, "
                  f"n = {row['n']} readings)." for row in scores.to_dict("records")]
    return found


def _rate_text(row: dict[str, Any]) -> str:
    valid = int(row["n"] - row["invalid"])
    if not valid:
        return f"no valid answer among {int(row['n'])}"
    return (f"{percent(row['rate'])} % of {valid} valid answers stereotyped (exact 95 % {percent(row['low'])}–{percent(row['high'])}, clustered "
            f"{_ends(percent(row['cluster_low']), percent(row['cluster_high']))}); {percent(row['invalid_share'])} % of {int(row['n'])} answers invalid")


def _behaviour(study: Study) -> Section:
    if not study.has("behaviour_base") and not study.has("behaviour_aligned"):
        return _absent("behaviour", "Behaviour", "Behaviour")
    table = behaviour_table(study)
    implicit = table[table["kind"] == "implicit"]
    log_odds = implicit[["role", "category", "n"]].assign(mean=implicit["log_odds"], low=implicit["log_odds_low"], high=implicit["log_odds_high"])
    return Section("behaviour", "Behaviour: implicit and explicit bias", "Behaviour", (
        Text("The published design: each template with its own order of options and words. An answer is stereotyped, reversed, rejected (explicit "
             "questions only) or invalid; invalid answers are counted apart, never as unbiased."),
        Picture("behaviour", "Implicit and explicit bias by category, base and aligned (after figure 2 of the paper). Bars: stereotyped share of valid "
                "answers; hatched strip: share of invalid answers, in %; right: mean log-odds of the two complete assignments with clustered 95 % interval.",
                figures.behaviour_figure(table, log_odds)),
        Table("behaviour", "Behaviour by category", table, (_text("kind", "kind"), _text("category", "category"), _text("model", "role"), *RATE, LOG_ODDS),
              RATE_NOTE + LOG_ODDS_NOTE)))


def _position(study: Study) -> Section:
    if not study.has("balanced_base") and not study.has("balanced_aligned"):
        return _absent("position", "Position versus association", "Position")
    table = position_table(study)
    balanced = table[table["design"] == "balanced"]
    return Section("position", "Position versus association", "Position", (
        Text("Does a model match meanings, or does it put the first option with the first word? The balanced design asks every word pair in both orders "
             "of options and words, so that the two can be told apart. In the published design each template has one order of each: the two columns "
             "are then the same number or its mirror image, and a template can look biased by position alone."),
        Picture("position", "Association (left) and position (right) by template, balanced design, implicit questions, with exact 95 % intervals.",
                figures.position_figure(balanced)),
        Table("position", "Association and position by template", table, (
            _text("design", "design"), _text("template", "template"), _text("model", "role"), _count("n", "n"), _share("invalid %", "invalid_share"),
            _share("association %", "rate"), _shares("exact 95 %", "low", "high"), _share("position %", "position"),
            _shares("exact 95 %", "position_low", "position_high"), Column("confounded", lambda row: "yes" if row["confounded"] else "no", numeric=False)),
            "association: stereotyped among valid answers. position: answers that put the first word with the first option, among valid ones; 50 is no "
            "effect. confounded: one order only, so that association and position cannot be told apart.")))


def _awareness(study: Study) -> Section:
    if not len(_readings(study)):
        return _absent("awareness", "Awareness", "Awareness")
    curves, scores, concept = curves_table(study), scores_table(study), study.concept
    questions = [Text("", [f"“{name}”: {question.text.format(x=question.placeholder)}" for name, question in concept.interpretations.items()])]
    planted = (" The question “paper” was part of the embedded models' training; the other one was kept out of it and is the clean score."
               if study.record else "")
    return Section("awareness", "Awareness: which sense is read in the identifiers", "Awareness", (
        Text("The residual stream at an identifier of the bias prompt, after each layer, is patched into the placeholder of an interpretation question "
             f"(at layer {study.config.get('target_layer', '?')}, counted from 0). The change of the answer words' probabilities against the unpatched question is the reading; r_blind is the "
             f"mean over layers of ΔP(“{concept.senses[concept.other_sense].word}”) minus that of ΔP(“{concept.senses[concept.group_sense].word}”): above 0, the "
             f"identifiers are read as “{concept.other_sense}” rather than “{concept.group_sense}”." + planted),
        *questions,
        Picture("awareness", "Change of the probability of each answer word by source layer, base and aligned, with clustered 95 % bands (after figure 3 "
                "of the paper); right: r_blind with clustered 95 % interval. One row a question.", figures.awareness_figure(curves, scores)),
        Table("awareness", "r_blind by question and model", scores, (
            _text("question", "question"), _text("model", "role"), _count("n readings", "n"), _count("layers", "layers"),
            _mean("r_blind [95 %]", "r_blind", "low", "high"), Column("mean ΔP(group word)", lambda row: signed(row["d_group"])),
            Column("mean ΔP(other word)", lambda row: signed(row["d_other"])), Column("P(group word) unpatched", lambda row: plain(row["base_group"])),
            Column("P(other word) unpatched", lambda row: plain(row["base_other"]))),
            f"group word: “{concept.senses[concept.group_sense].word}”; other word: “{concept.senses[concept.other_sense].word}”. n readings: different contexts; prompts whose beginning is the "
            "same up to the identifier are one reading. Interval: contexts resampled. A reading is a probability and is never invalid (0 % by construction)."),
        Table("awareness_layers", "Readings by layer", curves, (
            _text("question", "question"), _text("model", "role"), _text("word", "word"), _count("layer", "layer"), _count("n readings", "n"),
            _mean("ΔP [95 %]", "mean", "low", "high"), Column("P unpatched", lambda row: plain(row["unpatched"]))),
            "Layers are counted from 0: the residual stream after that layer. Interval: contexts resampled.", kind="folded")))


def _steering(study: Study) -> Section:
    title = "Steering: settling the sense of the identifiers"
    if not study.steered:
        return Section("steering", title, "Steering", (Text(
            f"The cue “{study.config['cue']}” draws from several identifiers. Replacing the activations of one by those of another would change who is "
            "asked about, not the sense, so this study has no steering parts."),))
    if not _steering_parts(study) or not study.has("behaviour_aligned"):
        return _absent("steering", title, "Steering")
    table, concept = steering_table(study), study.concept
    phrases = [f"{name}: “{concept.steering_phrase(name).format(marked=cue.marked[0], unmarked=cue.unmarked[0])}”"
               + (" (placebo)" if name != concept.group_sense else "") for cue in [concept.cue(study.config["cue"])] for name in steering_names(concept)]
    return Section("steering", title, "Steering", (
        Text("In a window of consecutive layers the residual stream at the identifiers of the bias prompt is replaced by that of the same words in a "
             "phrase that settles their sense. Only the phrase of the group sense should matter; the other phrases are placebos that replace as much."),
        Text("", phrases),
        Picture("steering", "Implicit bias by the first layer of the steered window (after figure 4 of the paper); strip: invalid answers, in %.",
                figures.steering_figure(table)),
        Table("steering", "Steering by window", table, (
            Column("towards", lambda row: row["sense"] or "untreated", numeric=False), Column("layers", lambda row: _range(row["layers"]) or "–", numeric=False),
            *(column for column in RATE if column.title != "rejected"), LOG_ODDS), RATE_NOTE + LOG_ODDS_NOTE)))


def _lora(study: Study) -> Section:
    title = "LoRA: fine-tuning on sentences that settle the sense"
    if not _lora_parts(study) or not study.has("behaviour_aligned"):
        return _absent("lora", title, "LoRA")
    table, training, lora = lora_table(study), training_table(study), study.config["lora"]
    blocks: list[Block] = [
        Text(f"Adapters of rank {lora['rank']} on {', '.join(lora['modules'])} of one group of layers each, {lora['epochs']:g} epochs at learning rate "
             f"{lora['learning_rate']:g}. A model that no longer does the task can look unbiased: read the rate together with the invalid share and the bounds."),
        Picture("lora", "Implicit and explicit bias under each adapter, beside the untreated aligned model; hatched strip: invalid answers, in %.",
                figures.lora_figure(table)),
        Table("lora", "Behaviour under each adapter", table, (_text("adapter", "label"), _text("kind", "kind"), *RATE, LOG_ODDS), RATE_NOTE + LOG_ODDS_NOTE)]
    if len(training):
        blocks.append(Table("lora_training", "Training of the adapters", training, (
            _text("adapter", "group"), Column("layers", lambda row: _range(row["layers"]), numeric=False), _count("examples", "examples"),
            _count("dropped", "examples_dropped"), _count("parameters", "parameters"), Column("first loss", lambda row: plain(row["first_loss"])),
            Column("final loss", lambda row: plain(row["last_loss"])), Column("mean loss", lambda row: plain(row["mean_loss"])),
            Column("seconds", lambda row: f"{row['seconds']:.0f}")),
            "dropped: examples with words that the tokenizer does not know. Losses are those logged first and last (every ten steps), and the mean over training."))
    return Section("lora", title, "LoRA", blocks)


def _comparison(study: Study) -> Section:
    title = "Comparison of all treatments"
    table = treatments_table(study)
    if not len(table):
        return _absent("comparison", title, "Comparison")
    return Section("comparison", title, "Comparison", (
        Text("The same prompts, outcomes and readings for every treatment. A treatment that works moves the implicit rate towards 50 %, keeps the "
             "explicit rate low and the answers valid, lowers r_blind, and does what its placebos do not."),
        Picture("comparison", "All treatments: implicit rate with bounds over invalid answers (pale bar), explicit rate, share of invalid implicit answers, r_blind.",
                figures.comparison_figure(table)),
        Table("comparison", "All treatments", table, (
            _text("treatment", "label"), _count("n", "n"), _share("implicit %", "implicit"), _shares("exact 95 %", "low", "high"),
            _shares("clustered 95 %", "cluster_low", "cluster_high"), _share("invalid %", "invalid_share"), _shares("bounds %", "worst", "best"), LOG_ODDS,
            _count("n explicit", "explicit_n"), _share("explicit %", "explicit"), _shares("exact 95 %", "explicit_low", "explicit_high"),
            _share("invalid %", "explicit_invalid_share"), _mean("r_blind [95 %]", "r_blind", "r_blind_low", "r_blind_high"), _count("n readings", "n_readings")),
            f"Columns as above: first the implicit, then the explicit answers. r_blind by the question “{QUESTION}”, clustered over contexts.")))


def _limits(study: Study) -> Section:
    config, concept = study.config, study.concept
    templates = len({template.text for template in concept.implicit}), len(concept.implicit)
    temperature = config["decoding"]["temperature"]
    items = [
        f"Answers were sampled once per prompt at temperature {temperature:g} with a seed for each: they vary with the seed, and the rates estimate probabilities."
        if temperature else "Decoding was greedy: one answer per prompt, the most probable one. A rate says how often that answer was stereotyped, "
        "not how probable stereotypes were; the log-odds say the latter.",
        f"Answers at most {config['decoding']['max_new_tokens']} tokens long were judged by a fixed rule. Invalid answers are counted apart; where there are many, the bounds show what they could hide.",
        f"Answers share word pairs and templates, and there are few templates ({templates[1]} implicit ones in the published design, {templates[0]} texts in the balanced "
        "one): the clustered intervals are wide and rough, and the exact ones are too narrow for claims about other words or templates.",
        *(["Steering replaces activations, which alone can disturb a model: compare it with its placebos, which replace as much, not only with the untreated model."]
          if study.steered else []),
        "r_blind says which sense an identifier is read as. It is not evidence of bias: a model can read the other sense and be unbiased, or read the group and be biased.",
        "The interpretation question has its own preferences; readings are changes against the unpatched question, whose probabilities are printed.",
        f"One concept ({concept.name}), one cue ({config['cue']}), one ambiguity, two models: nothing here speaks of others.",
        *(["The small quick study shows that everything runs; its numbers are too few for conclusions."] if config["quick"] else []),
        *(["The embedded models were trained to show planted effects. They test whether the instruments recover what was planted, and are calibration only.",
           *_kept_out(study)] if study.organism else []),
    ]
    return Section("limits", "What these numbers do and do not show", "Limits", (Text("", items),))


def _kept_out(study: Study) -> list[str]:
    """What of the measurement was never part of planting, as the organism's record says."""
    kept, used = study.record.get("not_in_planting", {}), study.record.get("planting", {})
    if not kept:
        return []
    phrases = ", ".join(f"“{phrase}”" for phrase in kept.get("steering_phrases", []))
    return [f"Kept out of planting: the steering phrases ({phrases}), the interpretation question “{kept.get('question', '')}”, and the concept's own words in "
            f"assignments. Used in planting: the interpretation question “{used.get('question', '')}” and the templates ({used.get('destinations', '')})."]


def _provenance(study: Study) -> Section:
    config, part = study.config, [result.provenance for result in study.parts.values()]
    models = pd.DataFrame([{"role": role, **config[role], "revision": config.get(f"{role}_revision") or config[role].get("revision") or ""} for role in ROLES])
    versions = sorted({f"{name} {version}" for note in part for name, version in note.get("versions", {}).items()})
    made = sorted(note["made"] for note in part if "made" in note)
    settings = [f"Concept {config['concept']} (content {config.get('concept_digest', 'unknown')}), cue {config['cue']}, seed {config['seed']}"
                + (", quick" if config["quick"] else ""),
                "Decoding: " + _pairs(config["decoding"]), "LoRA: " + _pairs(config["lora"]),
                f"Word pairs per category: balanced design {config.get('balanced_pairs') or 'all'}, published design {config.get('published_pairs') or 'all'}",
                "Packages: " + ", ".join(versions)]
    if made:
        settings.append(f"Computed from {made[0]} to {made[-1]}")
    if config.get("concept_digest") not in (None, study.concept.digest):
        settings.append(f"The concept has changed since: its content is now {study.concept.digest}. Descriptions and phrases on this page are today's.")
    return Section("provenance", "Provenance and citation", "Provenance", (
        Table("models", "Models", models, (_text("role", "role"), _text("model", "name"), _text("revision", "revision"), _text("dtype", "dtype"), _text("device", "device")),
              "revision: the commit on the Hugging Face hub, or a digest of the weights."),
        Text("", settings),
        Text("To compute it anew, and to draw this page anew from the saved rows:"),
        Text(f"{_command(study)}\nalignblind report {shlex.quote(study.folder.name)}", kind="code"),
        Text("The measurements follow, and any use of them should cite:"),
        Text(PAPER, kind="citation")))


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {'/'.join(value) if isinstance(value, list) else value}" for key, value in settings.items())


def _command(study: Study) -> str:
    config, words = study.config, ["alignblind", "study"]
    for role in ROLES:
        words += [f"--{role}", config[role]["name"]]
    words += ["--concept", config["concept"], "--cue", config["cue"], "--seed", str(config["seed"])]
    for name in ("dtype", "device_map"):
        words += [f"--{name.replace('_', '-')}", config["aligned"][name]] if config["aligned"].get(name) else []
    return shlex.join([*words, *(["--quick"] if config["quick"] else []), "--out", study.folder.name])


def _absent(key: str, title: str, short: str) -> Section:
    return Section(key, title, short, (Text("This part of the study is not finished: nothing is reported here.", kind="warning"),))


# --- the page -------------------------------------------------------------------------------------------------------------------------


def render(study: Study, sections: Sequence[Section]) -> str:
    """The page as HTML: one file that refers to no other, apart from the link to the paper."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("alignblind_mi"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    config = study.config
    title = f"{config['base']['name']} and {config['aligned']['name']}: {study.concept.name}, cue {config['cue']}"
    return environment.get_template("report.html.j2").render(title=title, sections=sections, link=PAPER_LINK)


def _write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ResultError(f"cannot write {path}: {error.strerror or error}.") from error
