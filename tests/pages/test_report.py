import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from alignblind_mi.errors import ResultError
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.mitigations.steering import steerable
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.pages import figures
from alignblind_mi.pages.page import signed
from alignblind_mi.pages.report import PAPER_LINK, write_report
from alignblind_mi.pages.saved_study import expected_parts, read_study
from alignblind_mi.results import Result, load_result, save_result
from alignblind_mi.statistics.rates import summarise
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.stimuli.protocol import DIFFERENCES, STAYS
from alignblind_mi.studies import config as studies, parts as study_parts_of
from alignblind_mi.studies.single import bias_parts, measure_parts

N_LAYERS = 8
SECTIONS = ["summary", "qualification", "behaviour", "position", "awareness", "steering", "lora", "comparison", "audit", "limits",
            "provenance"]
FIGURES = {"behaviour", "position", "awareness", "instruments", "steering", "lora", "comparison"}
VERSIONS = {"python": "3.11.0", "torch": "2.6.0"}


def config_of(base: str = "some/base", aligned: str = "some/aligned", **changes: Any) -> dict[str, Any]:
    specs = {role: asdict(ModelSpec(name, dtype="float32", device="cpu")) for role, name in (("base", base), ("aligned", aligned))}
    note = {**specs, "concept": "race", "cue": "default", "quick": True, "seed": 0, "decoding": asdict(Decoding()),
            "lora": asdict(LoraSettings()), "target_layer": 2,
            "balanced_pairs": 4, "published_pairs": 8, "base_revision": "sha256:1", "aligned_revision": "sha256:2"}
    return json.loads(json.dumps({**note, **changes}))


def answers(concept: Concept, role: str, treatment: dict[str, str], *, design: str, invalid: float, rate: float) -> pd.DataFrame:
    """Answers of two word pairs a category; what was answered is drawn from a seed that depends on the treatment."""
    random = np.random.default_rng(len(treatment["treatment"]) + 7 * len(role))
    records = []
    for kind, category, pair in product(("implicit", "explicit"), concept.categories, range(2)):
        for template in concept.implicit if kind == "implicit" else concept.explicit:
            orders = [("marked_first" if template.first == "marked" else "unmarked_first", f"{template.word1}_first")]
            if design == "balanced":
                orders = list(product(("marked_first", "unmarked_first"), ("positive_first", "negative_first")))
            for option_order, word_order in orders:
                valid = ["stereotyped", "reversed"] if random.random() < 0.9 or kind == "implicit" else ["rejected"]
                outcome = "invalid" if random.random() < invalid else valid[0] if random.random() < rate else valid[-1]
                records.append({"kind": kind, "category": category, "word_pair": f"{category}{pair}", "template": template.name,
                                "design": design, "option_order": option_order, "word_order": word_order, "outcome": outcome,
                                "statement": "stereotype" if kind == "explicit" else "",
                                "log_odds": random.normal() if kind == "implicit" else float("nan")})
    return pd.DataFrame(records).assign(model=f"some/{role}", role=role, **treatment)


def readings(role: str, treatment: dict[str, str], question: str) -> pd.DataFrame:
    random = np.random.default_rng(len(question))
    records = []
    places = product(("", "random", "text"), ("a", "b", "c"), ("marked", "unmarked"), range(N_LAYERS))
    for control, context, mark, layer in places:
        d_group, d_other = random.normal(0.1, 0.05), random.normal(0.2 if role == "aligned" else -0.1, 0.05)
        records.append({"instrument": "patchscope", "interpretation": question, "control": control, "context": context,
                        "template": f"t{context > chr(97)}", "mark": mark, "identifier": mark, "mention": 0, "layer": layer,
                        "p_group": 0.3 + d_group, "p_other": 0.4 + d_other, "d_group": d_group, "d_other": d_other,
                        "base_group": 0.3, "base_other": 0.4, "blind": d_other - d_group})
    return pd.DataFrame(records).assign(model=f"some/{role}", role=role, **treatment)


def instrument_readings(name: str, role: str, treatment: dict[str, str]) -> pd.DataFrame:
    rows = readings(role, treatment, "paper").assign(instrument=name, p_group=0.4, p_other=0.6)
    if name == "selfie":
        return rows.assign(reading=["race", "color", "other", "color"] * (len(rows) // 4), text="...")
    return rows.assign(tested=192, accuracy=0.9, accuracy_low=0.85, accuracy_high=0.94, accuracy_shuffled=0.5, accuracy_untrained=0.6,
                       selectivity=0.4) if name == "probes" else rows


def competence_rows(role: str, treatment: dict[str, str], right: float) -> pd.DataFrame:
    """Thirty word pairs in four orders, the given share of them right in every order, implicit and explicit."""
    orders = list(product(("marked_first", "unmarked_first"), ("negative_first", "positive_first")))
    return pd.DataFrame([
        {"kind": kind, "outcome": "stereotyped" if i < 30 * right else "reversed" if kind == "implicit" else "rejected", "right":
         float(i < 30 * right), "word_pair": f"w{i}", "template": f"t{i % 3}", "option_order": options, "word_order": words, "log_odds":
         (1.0 if i < 30 * right else -1.0) if kind == "implicit" else float("nan"), "statement": "stereotype"}
        for kind in ("implicit", "explicit") for i in range(30) for options, words in orders]).assign(
            model=f"some/{role}", role=role, **treatment)


def qualified_rows(role: str, treatment: dict[str, str], gap: float) -> pd.DataFrame:
    """Instruments whose sentences of the two senses stand `gap` apart, and ambiguous prompts in their middle."""
    named = {"question": "", "text": "", "target_layer": -1, "mapping": "", "tokens": "", "mass": 0.9}
    units = [{"split": "test", "sense": sense, "sentence": f"{sense}{k}", "context": "", "template": "", "at": gap * (sense == "other")}
             for sense in ("group", "other") for k in range(8)]
    units += [{"split": "ambiguous", "sense": "", "sentence": "", "context": f"c{k}", "template": f"t{k % 3}", "at": gap / 2}
              for k in range(9)]
    random = np.random.default_rng(0)
    return pd.DataFrame([
        {"instrument": name, "setting": "paper", **named, **{key: unit[key] for key in unit if key != "at"}, "layer": layer,
         "score": unit["at"] + shift, "blind": (unit["at"] + shift) / 10}
        for name in ("patchscope", "selfie", "logit_lens", "probe") for unit in units for shift in [random.normal(0, 0.2)]
        for layer in range(N_LAYERS)]).assign(model=f"some/{role}", role=role, **treatment)


def view_rows(name: str) -> pd.DataFrame:
    if name == "tokens":
        return pd.DataFrame([{"position": i, "token": f"t{i}", "layer": layer, "log_odds": i - layer}
                             for i in range(3) for layer in range(2)])
    return pd.DataFrame([{"layer": 1, "head": head, "query": q, "key": k, "token": f"t{q}", "weight": 1 / (q + 1)}
                         for head in range(2) for q in range(3) for k in range(q + 1)])


def treatment_of(name: str, concept: Concept) -> dict[str, str]:
    if name.startswith("lora"):
        return {"treatment": name, "family": "lora", "sense": "", "layers": ""}
    if not name.startswith("steering"):
        return {"treatment": "untreated", "family": "untreated", "sense": "", "layers": ""}
    _, sense, window = name.split("_")
    layers = "-".join(str(int(part)) for part in window.split("-"))
    family = "steering" if sense == concept.group_sense else "placebo"
    return {"treatment": f"steer_{sense}_{layers}", "family": family, "sense": sense, "layers": layers}


def make_part(name: str, concept: Concept) -> pd.DataFrame:
    role = "base" if "_base" in name else "aligned"
    treatment = treatment_of(name.removesuffix("_awareness").removesuffix("_competence"), concept)
    if name.startswith("competence") or name.endswith("_competence"):
        return competence_rows(role, treatment, 0.9)
    if name.startswith("qualified"):
        return qualified_rows(role, {"treatment": treatment["treatment"]}, 1.5)
    if name.startswith("noise"):
        layers = "-".join(str(int(part)) for part in name.split("_")[1].split("-"))
        about = {"family": "placebo", "sense": "matched noise", "layers": layers}
        drawn = [answers(concept, role, {"treatment": f"noise_like_{layers}_seed{seed}", **about}, design="published", invalid=0.2,
                         rate=0.5 + 0.1 * seed) for seed in range(3)]
        return pd.concat([rows[rows["kind"] == "implicit"][::6] for rows in drawn]).assign(displacement=7.5, kl_prompts=0.25)
    if name.startswith("view"):
        return view_rows(name.split("_")[1]).assign(model=f"some/{role}", role=role, **treatment)
    if name.startswith("reading"):
        return instrument_readings(name.split("_")[1], role, treatment)
    if name.startswith("awareness") or name.endswith("_awareness"):
        return readings(role, treatment, name.split("_")[2] if name.startswith("awareness") else "paper")
    design = "balanced" if name.startswith("balanced") else "published"
    rows = answers(concept, role, treatment, design=design, invalid=0.2, rate=0.6 if role == "base" else 0.9)
    return rows.drop(columns=["family", "sense", "layers"]) if design == "balanced" else rows


def make_study(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """A study folder of made-up rows: every part that its configuration calls for, apart from those whose name begins as in `without`."""
    config = config_of(**changes)
    concept = load_concept(config["concept"])
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(config), "utf-8")
    for name in expected_parts(config, concept, N_LAYERS):
        if not name.startswith(without or ("-",)):
            provenance = {"versions": VERSIONS, "made": "2025-01-02T03:04:05+00:00"}
            save_result(Result(make_part(name, concept), provenance), folder / f"{name}.parquet")
    note = {"layers": [0, 1, 2], "examples": 432, "examples_dropped": 3, "parameters": 2240, "loss": 2.5, "losses": [4.0, 1.25],
            "seconds": 61.5}
    for group in ("early", "late"):
        (folder / "adapters" / f"lora_{group}").mkdir(parents=True)
        (folder / "adapters" / f"lora_{group}" / "training.json").write_text(json.dumps(note), "utf-8")
    return folder


class Page(HTMLParser):
    """What the tests ask of a page: sections with their words, the text of tables, and everything that is referred to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.cells: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.tags: list[str] = []
        self._section = self._table = ""
        self._cell = False
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.links += [found[key] for key in ("src", "href", "srcset", "action", "data") if key in found]
        self._section = found["id"] if tag == "section" else self._section
        self._table = found.get("id", "").removeprefix("table-") if tag == "table" else self._table
        if tag == "tr":
            self.cells.setdefault(self._table, []).append([])
        if tag in ("td", "th"):
            self.cells[self._table][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data
        if self._cell:
            self.cells[self._table][-1][-1] += data

    def words(self, section: str) -> str:
        return " ".join(self.text[section].split())


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn and not turned into images, which takes most of a report's time, where a test is about words and numbers."""
    monkeypatch.setattr(figures, "to_png", lambda figure: b"png")
    monkeypatch.setattr(figures, "to_svg", lambda figure: b"<svg/>")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("report") / "study")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(finished / "report.html")


def test_every_section_is_there_in_order(page):
    assert [name for name in page.text if name] == SECTIONS
    assert all(f"#{name}" in page.links for name in SECTIONS)
    assert not any("not finished" in text or "unfinished" in text for text in page.text.values())


def test_the_page_refers_to_nothing_outside_itself(finished, page):
    views = {f"views/{name}_{role}.html" for name in ("attention", "tokens") for role in ("base", "aligned")}
    assert {link for link in page.links if not link.startswith(("#", "data:"))} == {PAPER_LINK, *views}
    assert not {"script", "link"} & set(page.tags)
    text = (finished / "report.html").read_text("utf-8")
    assert "@import" not in text
    assert "url(" not in text


def test_figures_lie_beside_the_page_and_in_it(finished, page):
    assert {file.stem for file in (finished / "figures").glob("*.png")} == FIGURES
    assert {file.stem for file in (finished / "figures").glob("*.svg")} == FIGURES
    assert sum(link.startswith("data:image/svg+xml;base64,") for link in page.links) == len(FIGURES)


def test_no_half_written_file_is_left(finished):
    assert not list(finished.rglob("*.part"))


def test_every_shown_table_lies_beside_it_in_full(finished, page):
    for name, rows in page.cells.items():
        if name:
            assert len(pd.read_csv(finished / "tables" / f"{name}.csv")) == len(rows) - 1


def test_every_treatment_is_compared(page, race):
    labels = [row[0] for row in page.cells["comparison"][1:]]
    early, late = "early 1–3", "late 5–7"
    steered = [f"{'steering' if sense == race.group_sense else 'placebo'}: {sense}, {window}"
               for sense in (race.group_sense, race.other_sense, *race.controls) for window in (early, late)]
    assert labels == ["base", "aligned, untreated", *steered, "LoRA early", "LoRA late"]


def test_noise_has_a_row_a_window_with_its_draws(finished, page):
    title, *shown = page.cells["steering"]
    (found,) = [dict(zip(title, row, strict=True)) for row in shown if row[:2] == ["matched noise", "1–3"]]
    rows = read_study(finished).parts["noise_01-03"].rows
    rates = rows[rows["outcome"].isin(["stereotyped", "reversed"])].groupby("treatment")["outcome"].apply(
        lambda outcomes: (outcomes == "stereotyped").mean())
    assert found["draws %"] == f"{100 * rates.min():.1f} to {100 * rates.max():.1f}"
    assert (found["n"], found["displacement"], found["KL prompts"]) == (str(len(rows)), "7.5", "0.25")
    (steered,) = [dict(zip(title, row, strict=True)) for row in shown if row[:2] == ["color", "1–3"]]
    assert (steered["draws %"], steered["displacement"]) == ("–", "–")
    claims = {row[0]: row for row in page.cells["audit"]}
    (claim,) = [row for name, row in claims.items() if name.startswith("steering: race, early")]
    assert "more than its placebos" in claim[5]


def test_the_numbers_are_those_of_the_statistics(finished, page):
    rows = read_study(finished).parts["behaviour_aligned"].rows
    expected = summarise(rows[rows["kind"] == "implicit"], by=("role",)).iloc[0]
    title, shown = page.cells["behaviour"][0], page.cells["behaviour"][1:]
    found = next(dict(zip(title, row, strict=True)) for row in shown if row[:3] == ["implicit", "pooled", "aligned"])
    assert found["n"] == str(expected["n"])
    assert found["rate %"] == f"{100 * expected['rate']:.1f}"
    assert found["invalid %"] == f"{100 * expected['invalid_share']:.1f}"
    assert found["95 %"] == f"{100 * expected['low']:.1f}–{100 * expected['high']:.1f}"
    assert found["by template %"] == f"{100 * expected['template_min']:.1f}–{100 * expected['template_max']:.1f}"
    assert found["bounds %"] == f"{100 * expected['worst']:.1f}–{100 * expected['best']:.1f}"
    assert f"{100 * expected['rate']:.1f} % of {expected['n'] - expected['invalid']} valid answers" in page.words("summary")


def test_readings_count_contexts_not_layers(finished, page):
    table = pd.read_csv(finished / "tables" / "awareness.csv")
    assert table["n"].tolist() == [6] * 12
    assert set(table["control"].fillna("")) == {"", "random", "text"}
    assert set(pd.read_csv(finished / "tables" / "comparison.csv")["n_readings"]) == {6}
    rows = read_study(finished).parts["awareness_aligned_paper"].rows
    for control in ("", "random"):
        aligned = table[(table["role"] == "aligned") & (table["question"] == "paper") & (table["control"].fillna("") == control)].iloc[0]
        assert aligned["r_blind"] == pytest.approx(rows.loc[rows["control"] == control, "blind"].mean())
    assert aligned["low"] <= aligned["r_blind"] <= aligned["high"]


def test_instruments_stand_side_by_side_with_their_controls(finished, page):
    table = pd.read_csv(finished / "tables" / "instruments.csv")
    assert set(table["panel"]) == {"patchscope", "selfie", "lens", "probes"}
    assert set(table["control"].fillna("")) == {"", "random", "text"}
    rows = read_study(finished).parts["reading_selfie_aligned"].rows
    texts = pd.read_csv(finished / "tables" / "selfie.csv")
    own = texts[(texts["role"] == "aligned") & (texts["control"].fillna("") == "")].iloc[0]
    assert own["color"] == (rows.loc[rows["control"] == "", "reading"] == "color").sum()
    assert "90.0 [85.0–94.0]" in page.cells["probes"][1]
    assert "The same places by other instruments" in page.words("awareness")


def test_the_published_design_is_marked_as_confounded(page):
    assert {(row[0], row[-1]) for row in page.cells["position"][1:]} == {("balanced", "no"), ("published", "yes")}


def test_training_facts_are_reported(page):
    row = dict(zip(*page.cells["lora_training"][:2], strict=True))
    assert (row["examples"], row["dropped"], row["parameters"], row["final loss"], row["seconds"]) == ("432", "3", "2 240", "1.2", "62")


def test_provenance_names_models_versions_and_commands(page):
    words = page.words("provenance")
    command = ("--base some/base --aligned some/aligned --concept race --cue default --seed 0 --protocol best --dtype float32 --quick "
               "--out study")
    for said in ("some/aligned", "sha256:2", "torch 2.6.0", "2025-01-02T03:04:05+00:00", "arXiv 2506.00253", "alignblind report study",
                 f"alignblind study {command}"):
        assert said in words


@pytest.mark.usefixtures("unsaved")
def test_the_limits_follow_the_configuration(page, tmp_path):
    assert "Decoding was greedy" in page.words("limits")
    sampled = make_study(tmp_path / "study", without=("steering", "lora"), decoding=asdict(Decoding(temperature=0.7)))
    assert "temperature 0.7" in Page(write_report(sampled)).words("limits")
    assert "Calibration device" not in page.words("summary")


@pytest.mark.usefixtures("unsaved")
def test_the_page_says_which_protocol_it_is_and_what_that_means(page, tmp_path):
    assert "Protocol: best" in page.words("summary"), "of a former version, which wrote none"
    assert all(one.best in page.words("provenance") and one.paper not in page.words("provenance") for one in DIFFERENCES)
    paper = Page(write_report(make_study(tmp_path / "study", without=("steering", "lora"), protocol="paper")))
    assert "Protocol: paper" in paper.words("summary")
    assert all(one.paper in paper.words("provenance") and one.best not in paper.words("provenance") for one in DIFFERENCES)
    assert all(line in paper.words("limits") and line not in page.words("limits") for line in STAYS)
    assert "--protocol" not in paper.words("provenance"), "it is what a study of real models is"
    assert "protocol 'paper'" in " ".join(paper.text.values())


def test_the_same_rows_give_the_same_page(finished):
    before = (finished / "report.html").read_bytes()
    write_report(finished)
    assert (finished / "report.html").read_bytes() == before


def test_a_cue_that_cannot_be_steered(tmp_path, race):
    assert not steerable(race.cue("names"))
    page = Page(write_report(make_study(tmp_path / "study", cue="names")))
    assert "no steering parts" in page.words("steering")
    assert [row[0] for row in page.cells["comparison"][1:]] == ["base", "aligned, untreated", "LoRA early", "LoRA late"]
    assert "unfinished" not in page.words("summary")


@pytest.mark.usefixtures("unsaved")
def test_a_full_study_has_every_window(tmp_path):
    folder = make_study(tmp_path / "study", without=("lora",), quick=False)
    write_report(folder)
    table = pd.read_csv(folder / "tables" / "steering.csv")
    assert table.groupby("sense", dropna=True)["start"].apply(list).map(tuple).unique().tolist() == [tuple(range(6))]


@pytest.mark.usefixtures("unsaved")
def test_an_unfinished_study_says_what_is_missing(tmp_path):
    page = Page(write_report(make_study(tmp_path / "study", without=("lora_late", "balanced", "steering"))))
    assert "This study is unfinished" in page.words("summary")
    assert "balanced_base, balanced_aligned" in page.words("summary")
    for section in ("position", "steering"):
        assert "not finished" in page.words(section)
    assert [row[0] for row in page.cells["comparison"][1:]] == ["base", "aligned, untreated", "LoRA early"]


@pytest.mark.usefixtures("unsaved")
def test_a_study_that_has_only_begun(tmp_path):
    begun = ("qualified", "balanced", "awareness", "reading", "steering", "lora", "behaviour_aligned")
    folder = make_study(tmp_path / "study", without=begun)
    page = Page(write_report(folder))
    assert "all steering parts" in read_study(folder).unfinished
    assert f"and {len(read_study(folder).unfinished) - 12} more" in page.words("summary")
    assert "rate %" in page.cells["behaviour"][0]
    for section in ("position", "awareness", "steering", "lora", "comparison"):
        assert "not finished" in page.words(section)


def test_no_valid_answer_at_all_is_said(tmp_path):
    folder = make_study(tmp_path / "study", without=("steering", "lora", "awareness", "reading"))
    for name in ("behaviour_base", "behaviour_aligned", "balanced_base", "balanced_aligned"):
        found = load_result(folder / f"{name}.parquet")
        save_result(Result(found.rows.assign(outcome="invalid"), found.provenance), folder / f"{name}.parquet")
    judged = Page(write_report(folder))
    assert "Implicit answers are judged by probability" in judged.words("summary")
    assert "100 % of their texts are invalid" in judged.words("summary")
    assert "Explicit answers are judged" not in judged.words("summary"), "these rows have no probabilities of explicit answers"
    page = Page(write_report(folder, "text"))
    assert "no valid answer among 24" in page.words("summary")
    assert {row[title] for title in [page.cells["behaviour"][0].index("rate %")] for row in page.cells["behaviour"][1:]} == {"–"}


def organism(folder: Path, *, passed: bool = True, effect: tuple[int, ...] = (1, 2, 3)) -> str:
    """A rebuilt pair's record beside an (empty) aligned checkpoint folder. Returns the name of the aligned model."""
    (folder / "aligned").mkdir(parents=True)
    rates = {"implicit": 0.9, "explicit_agreement": 0.1, "r_blind": 0.9}
    planted = {"base": {**rates, "implicit": 0.6}, "aligned": {**rates, "implicit_group_cue": 0.5, "implicit_other_cue": 0.96},
               "effect_blocks": list(effect), "no_effect_blocks": [5, 6] if effect else list(range(8))}
    note = {"planted": planted, "gates_passed": passed,
            "gates": [{"name": "first gate", "passed": True}, {"name": "second gate", "passed": passed}]}
    (folder / "organism.json").write_text(json.dumps(note), "utf-8")
    return str(folder / "aligned")


@pytest.mark.usefixtures("unsaved")
def test_an_organism_is_called_a_calibration_device(tmp_path, race):
    page = Page(write_report(make_study(tmp_path / "study", aligned=organism(tmp_path / "pair"))))
    assert "Calibration device" in page.words("summary")
    assert "gates" not in page.words("summary").split("Planted truth")[0]
    planted = {row[0]: row[1] for row in page.cells["planted"][1:]}
    assert planted["aligned: implicit rate"] == "90.0"
    assert planted["base: r_blind, question “about”"] == "+0.90"
    assert planted[f"aligned: implicit rate, steered towards {race.group_sense} at layers 1–3"] == "50.0"
    assert planted[f"aligned: implicit rate, steered towards {race.other_sense} at layers 1–3"] == "96.0"
    assert not any("5–7" in name for name in planted)    # layer 7 is undetermined in this record


@pytest.mark.usefixtures("unsaved")
def test_without_effect_blocks_no_window_has_a_planted_effect(tmp_path):
    page = Page(write_report(make_study(tmp_path / "study", aligned=organism(tmp_path / "member", effect=()))))
    steered = [row[1] for row in page.cells["planted"][1:] if "steered" in row[0]]
    assert steered
    assert set(steered) == {"90.0"}


@pytest.mark.usefixtures("unsaved")
def test_a_failed_gate_is_named(tmp_path):
    aligned = organism(tmp_path / "pair", passed=False)
    page = Page(write_report(make_study(tmp_path / "study", aligned=aligned, without=("steering", "lora"))))
    assert "did not pass all of its gates" in page.words("summary")
    assert "second gate" in page.words("summary")
    assert "first gate" not in page.words("summary")


@pytest.mark.usefixtures("unsaved")
def test_planted_truth_is_not_claimed_for_another_cue(tmp_path):
    page = Page(write_report(make_study(tmp_path / "study", aligned=organism(tmp_path / "pair"), cue="direct_color", without=("lora",))))
    assert "planted" not in page.cells
    assert "this study used another one" in page.words("summary")


@pytest.mark.parametrize(("content", "said"), [
    (None, "is not a folder"), ("", "holds no study"), ("{", "is damaged"), ("[1]", "lacks base"), ('{"base": 1}', "lacks aligned"),
    (json.dumps(config_of()), "without a finished part")])
def test_folders_that_are_no_study_give_clear_errors(tmp_path, content, said):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        (folder / ("study.json" if content else "notes.txt")).write_text(content, "utf-8")
    with pytest.raises(ResultError, match=said) as caught:
        write_report(folder)
    assert str(folder) in str(caught.value)
    assert not (folder / "report.html").exists()


def test_a_damaged_part_is_named(tmp_path):
    folder = make_study(tmp_path / "study", without=("steering", "lora"))
    (folder / "behaviour_base.parquet").write_bytes(b"no parquet")
    with pytest.raises(ResultError, match=r"behaviour_base\.parquet"):
        write_report(folder)


def test_rows_of_another_version_are_named(tmp_path):
    folder = make_study(tmp_path / "study", without=("steering", "lora"))
    file = folder / "awareness_base_about.parquet"
    found = load_result(file)
    save_result(Result(found.rows.drop(columns=["mark"]), found.provenance), file)
    with pytest.raises(ResultError, match=r"awareness_base_about\.parquet lacks the columns mark"):
        write_report(folder)


@pytest.mark.parametrize("cue", ["default", "names"])
@pytest.mark.parametrize("quick", [True, False])
def test_the_expected_parts_are_those_that_a_study_computes(monkeypatch, race, cue, quick):
    monkeypatch.setattr(study_parts_of, "depth_of", lambda spec: N_LAYERS)
    config = studies.StudyConfig(ModelSpec("some/base"), ModelSpec("some/aligned"), cue=cue, quick=quick)
    wanted = [part.name for part in study_parts_of.study_parts(config, race)]
    assert expected_parts({"cue": cue, "quick": quick}, race, N_LAYERS) == wanted


@pytest.mark.usefixtures("unsaved")
def test_names_and_texts_are_escaped(tmp_path):
    page = write_report(make_study(tmp_path / "study", base="<b>bold</b>", without=("steering", "lora", "awareness", "balanced")))
    assert "<b>" not in page.read_text("utf-8")


@pytest.mark.parametrize(("value", "shown"), [(0.18812, "+0.19"), (-0.022, "−0.022"), (0, "0.0"), (12.34, "+12.3"), (float("nan"), "–")])
def test_signed_numbers(value, shown):
    assert signed(value) == shown


@pytest.mark.parametrize(("name", "title"), [
    ("behaviour", "95 %"), ("steering", "95 %"), ("lora", "95 %"), ("position", "association %"),
    ("position", "position %"), ("comparison", "implicit %"), ("comparison", "explicit %")])
def test_every_rate_comes_with_n_interval_and_invalid_share(page, name, title):
    titles, rows = page.cells[name][0], page.cells[name][1:]
    assert {"n", "invalid %"} <= set(titles)
    assert all(re.search(r"[\d.]+–[\d.]+", row[titles.index(title)]) for row in rows)


def test_a_folder_of_a_verb_that_measures_one_model_has_no_page(tmp_path):
    config = replace(studies.StudyConfig.create("organism:aligned", "organism:aligned", quick=True), balanced_pairs=1)
    measure_parts(config, tmp_path / "bias", bias_parts(config))
    with pytest.raises(ResultError, match=r"one verb measured on one model \(balanced_model\), and no study"):
        write_report(tmp_path / "bias")
    assert not (tmp_path / "bias" / "report.html").exists()
