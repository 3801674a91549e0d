import json

import pandas as pd
import pytest

from alignblind_mi.borders.writing import write_text
from alignblind_mi.errors import ResultError
from alignblind_mi.results import Result, StudyFolder, load_result, save_result, versions

ROWS = pd.DataFrame({"n": [1, 2], "word": ["a", None], "x": [0.5, float("nan")]})


def test_a_result_comes_back_as_it_was(tmp_path):
    save_result(Result(ROWS, {"seed": 1}), tmp_path / "part.parquet")
    back = load_result(tmp_path / "part.parquet")
    pd.testing.assert_frame_equal(back.rows, ROWS)
    assert back.provenance == {"seed": 1}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["part.json", "part.parquet"]


def test_versions_name_what_numbers_depend_on():
    assert {"python", "torch", "transformers", "transformer-lens", "peft", "alignblind-mi"} <= set(versions())


@pytest.mark.parametrize("damage", ["cut", "no note", "foreign note", "no rows"])
def test_damaged_results_are_named(damage, tmp_path):
    file = tmp_path / "part.parquet"
    save_result(Result(ROWS, {}), file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:40])
    elif damage == "no note":
        file.with_suffix(".json").unlink()
    elif damage == "foreign note":
        file.with_suffix(".json").write_text("{")
    else:
        file.unlink()
    with pytest.raises(ResultError, match="part"):
        load_result(file)


def test_a_finished_part_is_not_computed_again(tmp_path):
    folder = StudyFolder.open(tmp_path / "s", {"seed": 1})
    calls = []

    def compute() -> Result:
        calls.append(1)
        return Result(ROWS, {})

    assert not folder.has("part")
    for _ in range(2):
        pd.testing.assert_frame_equal(StudyFolder.open(tmp_path / "s", {"seed": 1}).part("part", compute).rows, ROWS)
    assert calls == [1]


def test_a_part_that_fails_leaves_nothing_behind(tmp_path):
    folder = StudyFolder.open(tmp_path / "s", {"seed": 1})

    def fail() -> Result:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        folder.part("part", fail)
    assert [f.name for f in (tmp_path / "s").iterdir()] == ["study.json"]


def test_another_configuration_is_refused_and_nothing_touched(tmp_path):
    StudyFolder.open(tmp_path / "s", {"seed": 1, "cue": "default"})
    before = (tmp_path / "s" / "study.json").read_bytes()
    with pytest.raises(ResultError, match="seed is 1 there and 2 here"):
        StudyFolder.open(tmp_path / "s", {"seed": 2, "cue": "default"})
    assert (tmp_path / "s" / "study.json").read_bytes() == before


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match="holds no study"):
        StudyFolder.open(tmp_path, {})
    with pytest.raises(ResultError, match="not a folder"):
        StudyFolder.open(tmp_path / "notes.txt", {})
    (tmp_path / "study.json").write_text("[1, ")
    with pytest.raises(ResultError, match="damaged"):
        StudyFolder.open(tmp_path, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text(file, json.dumps(1))

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(ResultError, match="No space left"):
        write_text(file, json.dumps(2))
    assert file.read_text() == "1"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
