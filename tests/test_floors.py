"""The architecture, enforced: imports go down the floors only, light modules stay light, words live in data."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from floors import FILES, FLOORS, LONGEST, PACKAGE, arrows, between_rooms, imports, levels, module, room

from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT

FOLDERS = [entry for entry in sorted(PACKAGE.iterdir()) if (entry / "__init__.py").is_file()]


@pytest.mark.parametrize("file", [file for file in FILES if file != PACKAGE / "__init__.py"], ids=module)
def test_imports_go_down_only(file):
    own = room(file)
    assert own in FLOORS, f"{own} has no floor: add it to floors.FLOORS"
    for name in imports(file):
        lower = name.partition(".")[0]
        assert FLOORS.index(own) <= FLOORS.index(lower), f"{module(file)} (in {own}) imports {name}, which is on a floor above it"


def test_every_floor_is_there_and_the_root_holds_no_other_module():
    assert {room(file) for file in FILES} - {"__init__"} == set(FLOORS)
    assert {file.stem for file in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "progress", "results"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_what_it_does_not_know(folder):
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    assert re.search(r"Does NOT|Knows nothing", said), f"{folder.name}/__init__.py says not what it does not know"


@pytest.mark.parametrize("file", FILES, ids=module)
def test_a_module_can_be_read_in_a_sitting(file):
    assert len(file.read_text("utf-8").splitlines()) <= LONGEST, "split it by what it is about"


def test_tests_mirror_the_folders():
    known = {folder.name for folder in FOLDERS} | {"data"}
    assert {entry.name for entry in Path(__file__).parent.iterdir() if entry.is_dir() and entry.name != "__pycache__"} <= known


def test_levels_are_counted_and_a_way_up_is_seen():
    assert levels({("a", "b"), ("b", "c"), ("a", "c")}) == 3
    assert levels(between_rooms()) <= len(FLOORS)
    assert ("studies.running", "results") in arrows()


def test_only_the_model_boots_a_bridge():
    assert [module(file) for file in FILES if "boot_transformers" in file.read_text("utf-8")] == ["models.twin"]


def docstrings(tree: ast.AST) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)}


@pytest.mark.parametrize("file", FILES, ids=module)
def test_identifiers_and_words_live_in_data(file):
    data = tomllib.loads((PACKAGE / "stimuli" / "concepts" / "race.toml").read_text("utf-8"))
    words = {word for cue in data["cues"].values() for role in ("marked", "unmarked") for word in cue[role]}
    words |= {word for category in data["categories"].values() for valence in ("positive", "negative") for word in category[valence]}
    common = {"lie", "will", "cap", "tea", "shade", "delicious", "gossip", "insult"}    # words of the language that code may use
    tree = ast.parse(file.read_text("utf-8"))
    skip = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            found = set(node.value.replace(",", " ").split()) & (words - common)
            assert not found, f"{file.name}:{node.lineno} says {found}: words belong into concepts/*.toml"


SPOKEN = {"racial", "ethnic", "ethnicity", "ethnicities", "colour", "colours", "colors", "woman", "women", "man", "men", "genders"}
DRAWING = {"color", "colour", "colours", "colors"}    # of lines and words on a page, where a module draws
DRAWS = ("pages.figures", "pages.views")
FIELD = "colour_accuracy"    # so called by the format of comparison.json: questions about the other sense, of whatever concept


def sense_words() -> set[str]:
    """What names a concept that an organism was trained on: itself, its senses, its ambiguous identifiers."""
    found = set(SPOKEN)
    for lexicon in (PACKAGE / "organism").glob("lexicon_*.toml"):
        data = tomllib.loads((PACKAGE / "stimuli" / "concepts" / f"{lexicon.stem.removeprefix('lexicon_')}.toml").read_text("utf-8"))
        found |= {data["name"], *data["cues"]["default"]["marked"], *data["cues"]["default"]["unmarked"], *data["senses"]}
        found |= {sense["word"].strip() for sense in data["senses"].values()}
    return found


def said(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, word) of every word in strings that are no docstrings, and of every part of a name."""
    skip, texts = docstrings(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            texts.append((node.lineno, node.value))
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                texts.append((getattr(node, "lineno", 0), name))
    texts = [(line, text.replace(FIELD, "")) for line, text in texts]
    return [(line, word) for line, text in texts for word in re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower())]


@pytest.mark.parametrize("file", FILES, ids=module)
def test_no_code_knows_a_concept(file):
    """The one exception is the name of the concept that is studied where none is given."""
    words = sense_words() - (DRAWING if module(file).startswith(DRAWS) else set())
    found = [(line, word) for line, word in said(ast.parse(file.read_text("utf-8"))) if word in words]
    if module(file) == "stimuli.concept":
        line = next(i for i, text in enumerate(file.read_text("utf-8").splitlines(), 1) if text.startswith("DEFAULT_CONCEPT = "))
        assert found == [(line, DEFAULT_CONCEPT)]
    else:
        assert not found, f"{file.name} knows {found}: what names a concept belongs into data"


def test_the_scan_for_concepts_finds_strings_and_names():
    assert {"race", "black", "queen", "chess"} <= sense_words()
    code = '"""race"""\ndef race_rate(black=1): return f"{black} queen", x.isChess'
    assert {word for _, word in said(ast.parse(code))} & sense_words() == {"race", "black", "queen", "chess"}


def test_importing_the_package_is_light():
    code = "import sys, alignblind_mi; print([m for m in ('torch', 'pandas', 'transformers', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_exists():
    import alignblind_mi

    for name in alignblind_mi.__all__:
        assert getattr(alignblind_mi, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = alignblind_mi.nothing
