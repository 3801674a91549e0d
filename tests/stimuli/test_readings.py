"""Free-text interpretations: the lexicon rule on texts read by hand, and the released layout."""

import json
from pathlib import Path

import pytest

from alignblind_mi.errors import ScoreError
from alignblind_mi.pages.scoring import score
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.readings import classify, is_interpretations, read_interpretations

BY_HAND = [
    ("The message is about racial discrimination.", "race"),
    ("You are asking about Black people and white people", "race"),
    ("people of color", "race"),
    ("a person's SKIN COLOR", "race"),
    ("skin  color", "race"),
    ("The colors black and white.", "color"),
    ("a black and white photo of a city", "color"),
    ("red, green and blue", "color"),
    ("the color of their skin", "color"),    # equally many: the first one decides
    ("people who paint", "race"),
    ("paint for people, in the color of ink", "color"),
    ("I am happy to help you with that!", "other"),
    ("black or white", "other"),
    ("a colorful terrace, embraced", "other"),    # parts of words are no words
    ("", "other"),
]


@pytest.mark.parametrize(("text", "sense"), BY_HAND)
def test_a_text_is_of_the_sense_that_it_names_most(race: Concept, text: str, sense: str) -> None:
    assert classify(text, race) == sense


def written(path: Path, *texts: object) -> Path:
    lines = [{"prompt": f"p{i // 2}", "interpretation": text, "layer": i, "token": 3, "token_decoded": " black"}
             for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    return path


@pytest.mark.parametrize("name", ["readings.jsonl", "readings.json"])
def test_interpretation_files_are_scored(race: Concept, tmp_path: Path, name: str) -> None:
    file = written(tmp_path / name, *(text for text, _ in BY_HAND))
    assert is_interpretations(file)
    (record,) = score([file])
    counts = {sense: sum(label == sense for _, label in BY_HAND) for sense in ("race", "color", "other")}
    assert {key: record[key] for key in ("kind", "model", "n", "race", "color", "other")} == {
        "kind": "interpretation", "model": "readings", "n": len(BY_HAND), **counts}
    assert record["race_low"] < record["race_share"] < record["race_high"]
    by_layer = score([tmp_path], by=["layer"])
    assert [(r["layer"], r["n"]) for r in by_layer] == [(i, 1) for i in range(len(BY_HAND))]


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "closed.json", "racial")

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ScoreError, match=r"closed\.json cannot be read: Permission denied"):
        score([file])


def test_several_readings_of_one_line_are_counted_each(tmp_path: Path) -> None:
    rows = read_interpretations(written(tmp_path / "a.jsonl", ["racial", "the color red"], "people"))
    assert rows["interpretation"].tolist() == ["racial", "the color red", "people"]
    assert rows["layer"].tolist() == [0, 0, 1]


def test_broken_files_are_named_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"interpretation": "x"}\n{"interpretation": ', "utf-8")
    with pytest.raises(ScoreError, match=r"bad\.jsonl, line 2 is not valid JSON"):
        score([file])
    file.write_text('{"text": "x"}\n', "utf-8")
    with pytest.raises(ScoreError, match="line 1 has no field 'interpretation'"):
        score([file])
    file.write_text('{"interpretation": 3}\n', "utf-8")
    with pytest.raises(ScoreError, match="is not a text but 3"):
        score([file])
    file.write_text("\n", "utf-8")
    with pytest.raises(ScoreError, match="holds no interpretations"):
        score([file])
    with pytest.raises(ScoreError, match="cannot group by 'color'"):
        score([written(tmp_path / "good.jsonl", "x")], by=["color"])
