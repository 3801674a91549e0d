import json
from operator import itemgetter
from pathlib import Path

import pandas as pd
import pytest
from released_files import as_released, write
from rich.console import Console

from alignblind_mi.errors import ScoreError
from alignblind_mi.pages.scoring import read_answers, render, score
from alignblind_mi.results import Result, save_result
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import behaviour_prompts

FILE = "default_item-weapon_bias_results_chat_deterministic.json"
PUBLISHED = {"chat8b": (545, 15, 0), "nonchat8b": (152, 234, 174), "early_431": (112, 152, 296)}  # protocol of the paper, of 560


def answered(race: Concept, **labels: object) -> pd.DataFrame:
    """Rows of this project: one stereotyped, then reversed, then unusable answer, and so on; judged wrongly on purpose."""
    records = []
    for kind in ("implicit", "explicit"):
        for i, prompt in enumerate(behaviour_prompts(race, "default", kind, max_word_pairs=3, categories=["weapon"])):
            of = prompt.labels
            given = (of["unmarked"], of["marked"]) if i % 3 == 0 else (of["marked"], of["unmarked"])
            text = "5" if kind == "explicit" else f"{of['positive']} {given[0]}, {of['negative']} {given[1]}" if i % 3 < 2 else "..."
            records.append(
                {
                    "model": "m",
                    "treatment": "untreated",
                    **of,
                    "prompt": prompt.text,
                    "answer": text,
                    "outcome": "rejected",
                    "reason": "",
                    "log_odds": 1.0 if kind == "implicit" else float("nan"),
                    **labels,
                }
            )
    return pd.DataFrame.from_records(records)


@pytest.mark.parametrize(
    ("folder", "models"), [("llama3_8b/default", ["chat8b", "nonchat8b"]), ("llama3_8b_instruct_lora_early", ["early_431"])]
)
def test_the_published_rule_gives_the_published_counts(released: Path, folder: str, models: list[str]) -> None:
    records = [r for r in score([released / folder], rule="published", by=["model", "cue"]) if r["kind"] == "implicit"]
    assert {r["model"]: (r["stereotyped"], r["reversed"], r["invalid"]) for r in records} == {model: PUBLISHED[model] for model in models}
    assert all(r["n"] == 560 and r["cue"] == "default" and r["category"] == "all" for r in records)


def test_a_released_file_is_scored_by_category_and_kind(race: Concept, tmp_path: Path) -> None:
    file = write(tmp_path / FILE, as_released(race, "default", " 5", "weapon")[0])
    implicit, explicit = score([file])
    assert [implicit[k] for k in ("model", "cue", "category", "kind", "n", "invalid", "rate", "low", "high")] == [
        "chat",
        "default",
        "weapon",
        "implicit",
        24,
        24,
        None,
        0.0,
        1.0,
    ]
    assert [explicit[k] for k in ("n", "stereotyped", "reversed", "rejected", "invalid", "rate")] == [24, 18, 6, 0, 0, 0.75]
    assert "rejected" not in implicit
    json.dumps([implicit, explicit], allow_nan=False)


def test_results_are_judged_anew_and_grouped_by_what_differs(race: Concept, tmp_path: Path) -> None:
    save_result(Result(answered(race)), tmp_path / "study" / "behaviour.parquet")
    save_result(Result(answered(race, treatment="steered")), tmp_path / "study" / "deep" / "steering.parquet")
    save_result(Result(pd.DataFrame({"p_race": [0.5]})), tmp_path / "study" / "awareness.parquet")
    for name in ("study.json", "provenance.json", "adapters/lora/adapter_config.json", "adapters/lora/other.json", "notes.txt"):
        write(tmp_path / "study" / name, '{"any": "thing"}')
    records = score([tmp_path / "study"])
    assert [(r["treatment"], r["kind"], r["n"]) for r in records] == [
        (t, k, 36) for t in ("untreated", "steered") for k in ("implicit", "explicit")
    ]
    assert (records[0]["stereotyped"], records[0]["reversed"], records[0]["invalid"]) == (12, 12, 12)
    assert (records[0]["rate"], records[0]["worst"], records[0]["best"]) == pytest.approx((0.5, 1 / 3, 2 / 3))
    assert {r["rule"] for r in records} == {"robust"}


def test_any_column_groups_and_pooled_fields_say_all(race: Concept, tmp_path: Path) -> None:
    save_result(Result(answered(race)), tmp_path / "a.parquet")
    save_result(Result(answered(race, model="other")), tmp_path / "b.parquet")
    by_template = score([tmp_path], by=["template", "option_order"])
    assert {(r["model"], r["cue"]) for r in by_template} == {("all", "default")}
    assert sum(r["n"] for r in by_template) == 144
    assert len({(r["template"], r["option_order"]) for r in by_template}) == 12
    assert [r["file"] for r in score([tmp_path], by=["file"])] == ["a.parquet"] * 2 + ["b.parquet"] * 2


def test_a_file_counts_once_however_often_it_is_named(race: Concept, tmp_path: Path) -> None:
    save_result(Result(answered(race)), tmp_path / "a.parquet")
    assert len(read_answers([tmp_path, tmp_path / "a.parquet", tmp_path / "." / "a.parquet"])) == 72


def test_what_cannot_be_scored_is_one_clear_error(race: Concept, tmp_path: Path) -> None:
    save_result(Result(answered(race)), tmp_path / "a.parquet")
    save_result(Result(pd.DataFrame({"p": [0.5]})), tmp_path / "rest" / "readings.parquet")
    save_result(Result(pd.DataFrame({"answer": ["x"]})), tmp_path / "foreign" / "a.parquet")
    write(tmp_path / "list" / "data.json", "[]")
    write(tmp_path / "broken" / "a.parquet", "no parquet")
    write(tmp_path / "a.csv", "x")
    write(tmp_path / "nothing.json", "{}")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "holds no answers"),
        (tmp_path / "rest", "holds no answers"),
        (tmp_path / "rest" / "readings.parquet", "no column 'answer'"),
        (tmp_path / "a.csv", "neither .json"),
        (tmp_path / "list", "data.json holds a JSON list"),
        (tmp_path / "nothing.json", "holds an empty object"),
        (tmp_path / "foreign", "lacks the column"),
        (tmp_path / "broken", "is damaged"),
    ):
        with pytest.raises(ScoreError, match=said):
            score([path])
    with pytest.raises(ScoreError, match=r"'colour'.*Allowed: .*template"):
        score([tmp_path / "a.parquet"], by=["colour"])
    with pytest.raises(ScoreError, match="'answer'"):
        score([tmp_path / "a.parquet"], by=["answer"])
    with pytest.raises(ScoreError, match=r"'strict'.*robust, published"):
        score([tmp_path / "a.parquet"], rule="strict")
    with pytest.raises(ScoreError, match="nothing to score"):
        score([])


def test_render_shows_what_differs_and_every_number(race: Concept, tmp_path: Path) -> None:
    save_result(Result(answered(race)), tmp_path / "a.parquet")
    console = Console(record=True, width=160)
    render(score([tmp_path]), console)
    shown = console.export_text()
    assert "robust rule, model m, cue default, category weapon" in shown
    for part in ("implicit", "explicit", "12 (33 %)", "50.0", "33.3–66.7"):
        assert part in shown
    render([], console)
    assert "No answers" in console.export_text()


def results(folder: Path, race: Concept, **labels: object) -> Path:
    """A results folder with the rows and every record that a comparison and its page leave there."""
    save_result(Result(answered(race, **labels)), folder / "aligned_rival_answers.parquet")
    readings = pd.DataFrame({"model": "m", "treatment": "rival", "instrument": ["patchscope", "selfie", "selfie"], "control": "",
                             "interpretation": "paper", "context": ["c", "c", "d"], "text": [None, "a person of that race", "a colour"],
                             "reading": [None, "race", "color"]})
    save_result(Result(readings), folder / "aligned_rival_readings.parquet")
    for name in ("study", "plan", "written"):
        write(folder / f"{name}.json", '{"comparison": {"rows": 1}}')
    write(folder / "comparison.json", '[{"treatment": "rival", "implicit": 0.5}]')
    return folder


def test_a_record_of_this_project_stands_for_its_rows(race: Concept, tmp_path: Path) -> None:
    folder = results(tmp_path / "compared", race)
    expected = score([folder])
    assert [(r["kind"], r["n"]) for r in expected] == [("implicit", 36), ("explicit", 36), ("interpretation", 2)]
    for name in ("comparison", "study", "plan", "written"):
        assert score([folder / f"{name}.json"]) == expected, name
    assert score([folder / "aligned_rival_answers.json"]) == expected[:2]
    assert score([folder, folder / "comparison.json", folder / "aligned_rival_answers.json"]) == expected


def test_readings_without_texts_are_no_interpretations(race: Concept, tmp_path: Path) -> None:
    record = score([results(tmp_path / "compared", race)])[-1]
    assert (record["n"], record["race"], record["color"], record["other"]) == (2, 1, 1, 0)


def test_several_results_folders_are_told_apart(race: Concept, tmp_path: Path) -> None:
    results(tmp_path / "all" / "one", race)
    results(tmp_path / "all" / "deep" / "two", race)
    both = score([tmp_path / "all"])
    assert [(r["folder"], r["n"]) for r in both] == [
        (name, n) for numbers in ((36, 36), (2,)) for name in ("deep/two", "one") for n in numbers
    ]
    paths = [tmp_path / "all" / "one" / "comparison.json", tmp_path / "all" / "deep" / "two"]
    key = itemgetter("folder", "kind")
    assert sorted(score(paths), key=key) == sorted(both, key=key)
    assert [r["folder"] for r in score([tmp_path / "all" / "one"], by=["folder"])] == ["one"] * 3
    assert "folder" not in score([tmp_path / "all" / "one"])[0]
    console = Console(record=True, width=160)
    render(both, console)
    assert "deep/two" in console.export_text()


def test_answers_of_several_concepts_are_told_apart(race: Concept, tmp_path: Path) -> None:
    for name in ("race", "elsewhere"):
        save_result(Result(answered(race, concept=name)), tmp_path / f"{name}.parquet")
    assert [(r["concept"], r["n"]) for r in score([tmp_path]) if r["kind"] == "implicit"] == [("elsewhere", 36), ("race", 36)]


def test_names_of_records_are_answers_where_there_are_no_results(race: Concept, tmp_path: Path) -> None:
    data = as_released(race, "default", " 5", "weapon")[0]
    for name in ("plan.json", "study.json", "comparison.json"):
        assert score([write(tmp_path / name, data)])[0]["n"] == 24
