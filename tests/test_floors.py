"""The architecture, enforced: imports go down the floors only, light modules stay light, words live in data."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from alignblind_mi.concept import DEFAULT_CONCEPT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "alignblind_mi"
FLOORS = {
    0: ("errors", "borders", "settings", "texts", "progress", "concept", "concept_check", "prompts", "edits", "answers", "results",
        "statistics", "released", "readings", "paired", "mixed", "power", "frontier"),
    1: ("adapters", "chat", "tokens", "blocks", "budget", "loading", "engine", "plain", "decoding", "model", "bbq", "gradients",
        "organism", "weights", "template_process", "template_worker"),
    2: ("attention", "lens", "patchscope", "contrast", "patching", "attribution", "path_patching", "probes", "steering", "trainer",
        "finetuning", "sense_loss", "lora", "unlearning"),
    3: ("studies",),
    4: ("figures", "report", "calibration_page", "comparison_page", "scoring", "views", "commands", "__main__"),
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("alignblind_mi"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("alignblind_mi.")}
    return names - {"__version__"}


@pytest.mark.parametrize("file", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down_only(file):
    own = module_of(file)
    assert own in FLOOR, f"{own} has no floor: add it to the table"
    for name in imported(file) - {own}:
        assert FLOOR[name] <= FLOOR[own], f"{own} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[name]})"


def test_only_the_model_boots_a_bridge():
    assert [f.name for f in FILES if "boot_transformers" in f.read_text("utf-8")] == ["model.py"]


def docstrings(tree: ast.AST) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_identifiers_and_words_live_in_data(file):
    data = tomllib.loads((PACKAGE / "concepts" / "race.toml").read_text("utf-8"))
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
DRAWS = {"figures", "views"}
FIELD = "colour_accuracy"    # so called by the format of comparison.json: questions about the other sense, of whatever concept


def sense_words() -> set[str]:
    """What names a concept that an organism was trained on: itself, its senses, its ambiguous identifiers."""
    found = set(SPOKEN)
    for lexicon in (PACKAGE / "organism").glob("lexicon_*.toml"):
        data = tomllib.loads((PACKAGE / "concepts" / f"{lexicon.stem.removeprefix('lexicon_')}.toml").read_text("utf-8"))
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


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_code_knows_a_concept(file):
    """The one exception is the name of the concept that is studied where none is given."""
    words = sense_words() - (DRAWING if module_of(file) in DRAWS else set())
    found = [(line, word) for line, word in said(ast.parse(file.read_text("utf-8"))) if word in words]
    if module_of(file) == "concept":
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
