"""The rule of writing (`results.py`): nothing is deleted or replaced that this project did not write, whichever command writes."""

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from doubles import tiny_llama
from typer.testing import CliRunner

from alignblind_mi import (
    LoraSettings,
    awareness_examples,
    load_concept,
    load_model,
    merge_adapter,
    steering_vectors,
    train_lora,
    unmerge_adapter,
)
from alignblind_mi.__main__ import app
from alignblind_mi.borders.writing import name_problem
from alignblind_mi.errors import AlignblindError, ResultError
from alignblind_mi.models.adapters import scaled_adapter
from alignblind_mi.organism.build import build_organism
from alignblind_mi.results import Result, StudyFolder, check_parts, load_result, save_result
from alignblind_mi.studies.drawn import RECORD, is_drawn, write_drawn

ROWS = pd.DataFrame({"n": [1, 2]})
FEW = LoraSettings(epochs=1, batch_size=64, accumulation=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory, texts) -> Path:
    words = sorted({w for text in texts for w in re.findall(r"\[MASK\]|\w+|[^\w\s]", text)})
    return tiny_llama(tmp_path_factory.mktemp("small") / "model", words, layers=4)


@pytest.fixture(scope="module")
def adapter(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "early"
    train_lora(str(small), awareness_examples(load_concept("race"))[:64], "early", out, settings=FEW)
    return out


def snapshot(folder: Path) -> dict[str, str | bytes]:
    """Everything in a folder: files with their bytes, links with their targets."""
    return {str(path.relative_to(folder)): f"-> {os.readlink(path)}" if path.is_symlink() else path.read_bytes() if path.is_file() else ""    # noqa: PTH115
            for path in sorted(folder.rglob("*"))}


def a_foreign_folder(place: Path) -> None:
    (place / "deep").mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")
    (place / "deep" / "data.csv").write_text("mine, too")


def a_folder_of_another_program(place: Path) -> None:
    """Files with our names and another one's content."""
    place.mkdir()
    for name in ("identity.json", "adapter_config.json", "config.json", "organism.json", "merge.json"):
        (place / name).write_text(json.dumps({"mine": True}))


def a_file(place: Path) -> None:
    place.write_text("mine")


def a_link_to_a_folder(place: Path) -> None:
    a_foreign_folder(place.parent / "elsewhere")
    place.symlink_to(place.parent / "elsewhere")


def a_link_to_nothing(place: Path) -> None:
    place.symlink_to(place.parent / "nowhere")



TAKEN = (a_foreign_folder, a_folder_of_another_program, a_file, a_link_to_a_folder, a_link_to_nothing)
VERBS = {
    **{f"lora --kind {kind}": ["lora", "--kind", kind, "--model", "{model}", "--out", "{out}", "--epochs", "1"]
       for kind in ("aware", "blind", "placebo", "npo", "gradient_ascent")},
    "lora --merge": ["lora", "--model", "{model}", "--out", "{spare}", "--merge", "{out}", "--epochs", "1"],
    "bias": ["bias", "--model", "{model}", "--quick", "--out", "{out}"],
    "awareness": ["awareness", "--model", "{model}", "--quick", "--out", "{out}"],
    "patch": ["patch", "--model", "{model}", "--quick", "--out", "{out}"],
    "steer": ["steer", "--model", "{model}", "--quick", "--out", "{out}"],
    "steer --gguf": ["steer", "--model", "{model}", "--quick", "--method", "pca", "--layers", "1", "--out", "{spare}", "--gguf", "{out}"],
    "study": ["study", "--base", "{model}", "--aligned", "{model}", "--quick", "--out", "{out}"],
    "compare": ["compare", "--base", "{model}", "--aligned", "{model}", "--quick", "--out", "{out}"],
    "calibrate": ["calibrate", "--quick", "--out", "{out}"],
    "organism build": ["organism", "build", "--out", "{out}"],
    "report": ["report", "{out}"],
}


@pytest.mark.parametrize("taken", TAKEN, ids=lambda make: make.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_touches_what_stands_where_it_is_to_write(verb, taken, small, tmp_path):
    place = tmp_path / "user" / "out"
    place.parent.mkdir()
    taken(place)
    before = snapshot(tmp_path)
    command = [word.format(model=small, out=place, spare=tmp_path / "spare") for word in VERBS[verb]]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, AlignblindError), f"{done.exit_code} {done.output} {done.exception!r}"
    assert str(place) in str(done.exception)
    assert snapshot(tmp_path) == before, "and it is found before anything is computed or written"


@pytest.mark.parametrize("beside", [".out.part", ".out.lock"])
@pytest.mark.parametrize("taken", [*TAKEN[:4]], ids=lambda make: make.__name__)
def test_training_leaves_alone_what_stands_beside_its_folder(beside, taken, small, tmp_path):
    taken(tmp_path / beside)
    before = snapshot(tmp_path)
    with pytest.raises(AlignblindError, match=re.escape(beside)):
        train_lora(str(small), awareness_examples(load_concept("race"))[:64], "early", tmp_path / "out", settings=FEW)
    assert snapshot(tmp_path) == before


def test_a_training_of_ours_with_other_settings_goes_and_takes_nothing_else_along(small, tmp_path):
    draft, examples = tmp_path / ".out.part", awareness_examples(load_concept("race"))[:64]
    draft.mkdir()
    ours = {"folder": str(draft), "settings": {}, "versions": {}}
    (draft / "identity.json").write_text(json.dumps(ours))
    (draft / "checkpoint-7").mkdir()
    (draft / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(AlignblindError, match=r"notes\.txt was not written by this command"):
        train_lora(str(small), examples, "early", tmp_path / "out", settings=FEW)
    assert {name: data for name, data in snapshot(tmp_path).items() if name != ".out.lock"} == before
    (draft / "notes.txt").unlink()
    (draft / "checkpoint-8").symlink_to(small)
    with pytest.raises(AlignblindError, match="checkpoint-8"):
        train_lora(str(small), examples, "early", tmp_path / "out", settings=FEW)
    assert (small / "config.json").is_file(), "a link is not followed into deletion"
    (draft / "checkpoint-8").unlink()
    train_lora(str(small), examples, "early", tmp_path / "out", settings=FEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_empty_folder_is_a_place_to_train_in(small, tmp_path):
    (tmp_path / "out").mkdir()
    train_lora(str(small), awareness_examples(load_concept("race"))[:64], "early", tmp_path / "out", settings=FEW)
    assert (tmp_path / "out" / "training.json").is_file()


@pytest.mark.parametrize("write", [merge_adapter, unmerge_adapter], ids=lambda write: write.__name__)
@pytest.mark.parametrize("taken", TAKEN, ids=lambda make: make.__name__)
def test_a_merged_checkpoint_replaces_nothing(write, taken, small, adapter, tmp_path):
    taken(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(AlignblindError, match="nothing was touched"):
        write(str(small), adapter, tmp_path / "out")
    with pytest.raises(AlignblindError, match="nothing was touched"):
        scaled_adapter(adapter, 0.5, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_what_python_writes_goes_by_the_same_rule(race, tmp_path):
    vectors = steering_vectors(load_model("organism:aligned"), race, "default", "race", "mean_difference", layers=[1, 2])
    for name, save in (("v.safetensors", vectors.save), ("v.gguf", vectors.export_gguf),
                       ("v.parquet", lambda path: save_result(Result(ROWS), path))):
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(AlignblindError, match="nothing was touched"):
            save(path)
        assert path.read_text() == "mine"
        path.unlink()
        path.symlink_to(tmp_path / "else")
        with pytest.raises(AlignblindError, match="symbolic link"):
            save(path)
        path.unlink()
        save(path)
        save(path)    # ours is replaced
        save(str(path))
    (tmp_path / "w.json").write_text('{"mine": true}')
    with pytest.raises(ResultError, match=r"w\.json"):
        save_result(Result(ROWS), tmp_path / "w.parquet")
    assert json.loads((tmp_path / "w.json").read_text()) == {"mine": True}
    with pytest.raises(ResultError, match=r"ends in \.parquet"):
        save_result(Result(ROWS), tmp_path / "w.json")
    with pytest.raises(AlignblindError, match="nothing was touched"):
        build_organism(tmp_path)


@pytest.mark.parametrize("way", ["{file}/out", "{folder}/" + "n" * 300, "{folder}/\0"])
def test_a_way_that_leads_nowhere_is_one_sentence_before_the_work(way, small, tmp_path):
    (tmp_path / "file").write_text("mine")
    place = way.format(file=tmp_path / "file", folder=tmp_path)
    for verb in ("lora --kind aware", "lora --merge", "bias", "steer --gguf", "study", "organism build"):
        command = [word.format(model=small, out=place, spare=tmp_path / "spare") for word in VERBS[verb]]
        done = CliRunner().invoke(app, command)
        refused = isinstance(done.exception, AlignblindError) or done.exit_code == 2    # 2: by typer itself
        assert refused, f"{verb} {done.exit_code} {done.output} {done.exception!r}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    with StudyFolder.claim(tmp_path / "s", {"seed": 1}) as begun:
        begun.part("first", lambda: Result(ROWS, {"seed": 1}))
    return tmp_path / "s"


def test_what_was_drawn_is_drawn_anew_and_what_was_not_stays(folder):
    write_drawn(folder, {"report.html": b"one", "tables/a.csv": b"1"})
    write_drawn(folder, {"report.html": b"two"})
    assert (folder / "report.html").read_bytes() == b"two"
    for name in ("report.html", "tables/a.csv", "tables/b.csv"):
        (folder / name).write_bytes(b"mine")
        with pytest.raises(ResultError, match=r"changed since: move it away"):
            write_drawn(folder, {"other.html": b"x", name: b"three"})
        assert (folder / name).read_bytes() == b"mine"
        assert not (folder / "other.html").exists()
        (folder / name).unlink()
    write_drawn(folder, {"report.html": b"two", "tables/a.csv": b"1"})


@pytest.mark.parametrize("link", ["report.html", "tables", RECORD])
def test_no_link_is_followed_when_a_page_is_drawn(link, folder, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "a.csv").write_text("mine")
    (folder / link).symlink_to(tmp_path / "victim" / ("" if link == "tables" else "a.csv"))
    with pytest.raises(ResultError, match=re.escape(link)):
        write_drawn(folder, {"report.html": b"one", "tables/a.csv": b"1"})
    assert (tmp_path / "victim" / "a.csv").read_text() == "mine"


def test_a_folder_of_a_version_that_kept_no_record_is_drawn_anew(folder):
    note = json.loads((folder / "first.json").read_text())
    del note["digest"]
    (folder / "first.json").write_text(json.dumps({**note, "versions": {}, "made": ""}))
    (folder / "report.html").write_text("by the former version")
    write_drawn(folder, {"report.html": b"new"})
    assert (folder / "report.html").read_bytes() == b"new"
    (folder / "tables").mkdir()
    (folder / "tables" / "a.csv").write_text("mine")
    with pytest.raises(ResultError, match="move it away"):
        write_drawn(folder, {"tables/a.csv": b"1"})


def test_a_page_is_current_only_while_its_rows_and_itself_are(folder):
    assert not is_drawn(folder, "report.html")
    write_drawn(folder, {"report.html": b"one"})
    assert is_drawn(folder, "report.html")
    os.utime(folder / "report.html", (4e9, 4e9))    # from the future
    with StudyFolder.claim(folder, {"seed": 1}) as begun:
        begun.part("second", lambda: Result(ROWS, {"seed": 1}))
    assert not is_drawn(folder, "report.html")
    write_drawn(folder, {"report.html": b"one"})
    assert is_drawn(folder, "report.html")
    (folder / "report.html").write_bytes(b"edited")
    assert not is_drawn(folder, "report.html")


def test_a_foreign_folder_is_never_drawn_into(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ResultError, match=r"no study\.json"):
        write_drawn(tmp_path, {"report.html": b"one"})


# ---- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "../x", "x/y", "x\\y", ".x", "x.y", "a b", "-x", "x\0", "x\n", "con", "NUL", "x" * 65, "ä", None, 3])
def test_what_is_no_plain_name(name):
    assert name_problem(name)


@pytest.mark.parametrize("name", ["study", "Study", "plan", "comparison", "../x", "x/y", ".x", "", "x" * 201, "written", "con.x"])
def test_a_part_of_another_name_is_refused_by_the_folder(name, tmp_path):
    folder = StudyFolder.open(tmp_path / "s", {"seed": 1})
    before = snapshot(tmp_path)
    with pytest.raises(ResultError, match="the part"):
        folder.part(name, lambda: Result(ROWS))
    assert snapshot(tmp_path) == before
    with pytest.raises(ResultError, match="is there twice"):
        check_parts(["one", "ONE"])


@pytest.mark.parametrize("table", ["interpretations", "selfie", "cues", "categories", "senses", "controls", "contexts", "instructions"])
def test_names_of_a_concept_file_are_plain(table, tmp_path):
    text = (Path(__file__).parents[1] / "alignblind_mi" / "stimuli" / "concepts" / "race.toml").read_text("utf-8")
    first = re.search(rf"^\[{table}\.(\w+)\]", text, re.MULTILINE)
    assert first is not None
    for bad in ("x/../../victim/package", "a b", "con", "x" * 65):
        (tmp_path / "mine.toml").write_text(text.replace(f"[{table}.{first[1]}]", f'[{table}."{bad}"]'), "utf-8")
        with pytest.raises(AlignblindError, match=rf"\[{table}\] .*the name "):
            load_concept(tmp_path / "mine.toml")


# ---- what was altered --------------------------------------------------------------------------------------------------


def test_half_the_rows_or_an_altered_note_are_no_result(tmp_path):
    path = tmp_path / "part.parquet"
    save_result(Result(ROWS, {"model": "a"}), path)
    whole = path.read_bytes()
    ROWS.head(1).to_parquet(path)
    with pytest.raises(ResultError, match="changed since it was written"):
        load_result(path)
    path.write_bytes(whole)
    load_result(path)
    note = path.with_suffix(".json")
    note.write_text(note.read_text().replace('"a"', '"b"'))
    with pytest.raises(ResultError, match="changed since it was written"):
        load_result(path)


# ---- interrupted -------------------------------------------------------------------------------------------------------


def test_an_interruption_says_what_is_kept_and_how_to_go_on(small, tmp_path, capsys):
    from alignblind_mi import Part, StudyConfig, run_parts

    def interrupted(model, advance):
        raise KeyboardInterrupt

    parts = [Part("first", "base", False, lambda model, advance: ROWS), Part("second", "base", False, interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run_parts(StudyConfig.create(str(small), str(small), quick=True), tmp_path / "s", parts)
    said = f"interrupted: finished parts are kept in {tmp_path / 's'}; the same command, or call, goes on from there."
    assert said in capsys.readouterr().err
    assert (tmp_path / "s" / "first.parquet").is_file()
