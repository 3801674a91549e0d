"""`alignblind concept`: every field of a file can be broken in every way, and the message names it; all problems are named at once."""

import copy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.stimuli.concept import ConceptError, concept_names, load_concept
from alignblind_mi.stimuli.concept_check import concept_problems

CONCEPTS = Path(__file__).parents[2] / "alignblind_mi" / "stimuli" / "concepts"
RACE = tomllib.loads((CONCEPTS / "race.toml").read_text("utf-8"))
OPTIONAL = {"description", "settled", "prefix", "pairing", "released_as", "words", "lexicon", "scale", "placebo", "others", "selfie",
            "contexts", "instructions", "awareness", "controls"}
Path_ = tuple[str | int, ...]


def fields(data: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Every field of a file that has a name of the format's (not one of the author's), by its path."""
    for key, value in data.items():
        if not (len(at) == 1 and isinstance(value, dict) and at[0] != "awareness"):    # the author's own names
            yield (*at, key)
        if isinstance(value, dict):
            yield from fields(value, (*at, key))
        elif value and isinstance(value[0] if isinstance(value, list) else None, dict):
            for i, entry in enumerate(value):
                yield from fields(entry, (*at, key, i))


FIELDS = list(fields(RACE))


def parent(data: Any, path: Path_) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def place(path: Path_) -> list[str]:
    """What a message about a field must contain to say where it is."""
    names = [str(key) for key in path[:-1] if isinstance(key, str)]
    if len(path) > 1 and isinstance(path[1], int):
        names.append(RACE[path[0]][path[1]]["name"] if path[-1] != "name" else f"number {path[1] + 1}")
    return names


def named(problems: list[str], path: Path_, said: str) -> bool:
    return any(said in problem and all(name in problem for name in place(path)) for problem in problems)


def test_the_fields_are_those_of_the_file():
    assert ("cues", "names", "pairing") in FIELDS
    assert ("implicit", 0, "published", "first") in FIELDS
    assert ("awareness", "sentences") in FIELDS
    assert ("cues", "names") not in FIELDS
    assert len(FIELDS) > 90
    assert concept_problems(RACE) == []


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_can_be_broken_and_is_named(path):
    data = copy.deepcopy(RACE)
    table = parent(data, path)
    table[f"{path[-1]}x"] = table.pop(path[-1])
    problems = concept_problems(data)
    assert named(problems, path, f"{path[-1]}x: this field is unknown or misspelt; did you mean '{path[-1]}'"), problems

    data = copy.deepcopy(RACE)
    parent(data, path)[path[-1]] = 5
    problems = concept_problems(data)
    assert named(problems, path, f"{path[-1]}: must be "), problems

    data = copy.deepcopy(RACE)
    del parent(data, path)[path[-1]]
    problems = concept_problems(data)
    if path[-1] not in OPTIONAL:
        assert problems, "a field that must be there is missed by nobody"
        assert any(str(path[-1]) in problem for problem in problems), problems


BROKEN: list[tuple[Path_, Any, str]] = [
    (("name",), "my race", r"name: 'my race' must be one word"),
    (("cues", "default", "marked"), [], r"[cues.default] marked: is empty"),
    (("cues", "default", "marked"), [" black"], r"[cues.default] marked: ' black' is empty or has blanks at its ends"),
    (("cues", "default", "marked"), ["off white"], r"[cues.default]: 'white' and 'off white' are asked together, and the one contains"),
    (("cues", "default", "marked"), ["Joyful"], r"[cues.default]: the identifier 'Joyful' is also a word of [categories.negativity]"),
    (("cues", "default", "categories"), ["guild"], r"[cues.default] categories: 'guild' is not among the categories"),
    (("cues", "names", "marked"), ["Ann", "ann"], r"[cues.names] marked: 'ann' stands there twice"),
    (("cues", "dialects", "pairing"), "both", r"[cues.dialects] pairing: must be 'parallel' or 'crossed', not 'both'"),
    (("cues", "dialects", "marked"), ["cap"], r"[cues.dialects]: pairs 1 marked with 6 unmarked identifiers"),
    (("categories", "weapon", "positive"), ["wallet", "wallet"], r"[categories.weapon] positive: 'wallet' stands there twice"),
    (("categories", "weapon", "positive"), ["Sword"], r"[categories.weapon]: 'Sword' is both positive and negative"),
    (("implicit", 0, "text"), "{first} {second} {word1}", r"[[implicit]] 'implicit_random0' text: lacks the fields ['word2']"),
    (("implicit", 1, "text"), "{first", r"[[implicit]] 'implicit_random1' text: the braces of '{first' do not pair up"),
    (("explicit", 0, "scale"), "stars", r"[[explicit]] 'explicit_random0' scale: must be 'likert' or 'agree', not 'stars'"),
    (("explicit", 0, "name"), "implicit_random0", r"'implicit_random0' stands there twice"),
    (("explicit", 0, "published", "first"), "black", r"[[explicit]] 'explicit_random0' published.first: must be 'marked' or 'unmarked'"),
    (("explicit", 0, "published", "word1"), "good", r"[[explicit]] 'explicit_random0' published.word1: must be 'positive' or 'negative'"),
    (("assignment",), "{word1} {option1}", r"assignment: '{word1} {option1}' must have the fields {word1}, {option1}"),
    (("other_sense",), "race", r"other_sense: 'race' is the group sense as well"),
    (("other_sense",), "paint", r"other_sense: 'paint' is not among the senses (race, color)"),
    (("senses", "color", "word"), " race", r"[senses.color] word: ' race' is of another sense as well (race)"),
    (("senses", "color", "lexicon"), ["racial"], r"[senses.color] lexicon: 'racial' is of another sense as well (race)"),
    (("senses", "color", "steering"), "Color: {marked}", r"[senses.color] steering: 'Color: {marked}' must have the fields {marked} and"),
    (("controls", "random", "steering"), "Random", r"[controls.random] steering: 'Random' must have the fields {marked} and {unmarked}"),
    (("interpretations", "paper", "text"), "Is {x} race?", r"[interpretations.paper] text: 'Is {x} race?' does not name the sense word"),
    (("interpretations", "about", "text"), "race or color?", r"[interpretations.about] text: 'race or color?' must have the one field {x}"),
    (("selfie", "paper", "text"), "{x} {y}", r"[selfie.paper] text: '{x} {y}' must have the one field {x}"),
    (("contexts", "race", "train"), ["Some are {x}."], r"[contexts.race] train: 'Some are {x}.' must have the fields {x} and {y}"),
    (("contexts", "race", "train"), ["Some are {x}, some {y}."], r"[contexts.race] train: at least 6 sentences are needed, not 1"),
    (("contexts", "race", "test"), RACE["contexts"]["race"]["train"], f"[contexts.race]: {RACE['contexts']['race']['train'][0]!r}"),
    (("instructions", "fair", "text"), "Be fair to {x}. ", r"[instructions.fair] text: 'Be fair to {x}. ' may have the fields"),
    (("awareness", "sentences"), ["It is {x}."], r"[awareness] sentences: 'It is {x}.' must have the fields {x} and {y}"),
    (("awareness", "restatements"), ["It is race."], r"[awareness] restatements: 'It is race.' must have the field {x} or {y}"),
]


@pytest.mark.parametrize(("path", "value", "said"), BROKEN, ids=[said for _, _, said in BROKEN])
def test_what_does_not_fit_is_named_with_its_place(path, value, said):
    data = copy.deepcopy(RACE)
    parent(data, path)[path[-1]] = value
    assert any(problem.startswith(said) or said in problem for problem in concept_problems(data)), concept_problems(data)


def test_senses_and_what_is_asked_about_them_belong_together():
    data = {name: value for name, value in RACE.items() if name not in ("senses", "group_sense", "other_sense")}
    problems = concept_problems(data)
    assert [problem.split("]")[0] for problem in problems] == ["[controls", "[interpretations", "[selfie", "[contexts", "[awareness"]
    bare = {name: data[name] for name in ("name", "assignment", "cues", "categories", "implicit", "explicit")}
    assert concept_problems(bare) == []
    lacking = {name: value for name, value in RACE.items() if name not in ("group_sense", "interpretations")}
    assert {problem.split(":")[0] for problem in concept_problems(lacking)} == {"group_sense", "[interpretations.paper]"}


def test_a_name_with_a_line_break_is_said_in_one_line():
    data = copy.deepcopy(RACE)
    for wrong in ({"a\nb": None}, {"a\nb": "x" * 100_000}):    # unknown, and too large to be looked at further
        data["explicit"][2]["published"] = wrong
        assert all("\n" not in problem for problem in concept_problems(data))
        assert any(r"a\nb" in problem for problem in concept_problems(data))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_stands_in_a_file_is_a_sentence_never_an_error(data):
    text = st.text(max_size=8) | st.sampled_from(["{x}", "{", "{}", "{x[0]}"])
    anything = st.recursive(st.none() | st.booleans() | st.integers() | text, max_leaves=5, extend=lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)))
    broken = copy.deepcopy(RACE)
    for path in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True)):
        try:
            parent(broken, path)[path[-1]] = data.draw(anything)
        except (KeyError, TypeError, IndexError):
            continue    # a table above it was replaced
    problems = concept_problems(broken)
    assert all(isinstance(problem, str) and ":" in problem and "\n" not in problem for problem in problems)


# ---- the command ---------------------------------------------------------------------------------------------------------


def alignblind(*arguments: object) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_all_problems_are_named_at_once(tmp_path):
    text = (CONCEPTS / "race.toml").read_text("utf-8")
    for change in (('marked = ["black"]', 'maked = ["black"]'), ('"joyful", "superb"', '"joyful", "tragic"'), ("{frist}", "{frist}"),
                   ("What does {x} refer", "What does {y} refer"), ('word = " race"', "word = 3")):
        text = text.replace(*change, 1)
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    code, said = alignblind("concept", "check", file)
    assert code == 2
    lines = said.splitlines()
    assert lines[0] == f"concept file {file} has {len(lines) - 1} problems:"
    for part in ("[cues.default] maked: this field is unknown or misspelt; did you mean 'marked'?", "[cues.default] marked: the field",
                 "[categories.negativity]: 'tragic' is both positive and negative.", "[interpretations.paper] text: ",
                 "[senses.race] word: must be a text in quotes, not 3."):
        assert sum(part in line for line in lines) == 1, part
    with pytest.raises(ConceptError) as caught:
        load_concept(file)
    assert all(line.strip()[:-1] in str(caught.value) for line in lines[1:])


def test_the_template_passes_the_check_and_says_what_it_has(tmp_path):
    code, text = alignblind("concept", "template")
    assert code == 0
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    code, said = alignblind("concept", "check", file)
    assert code == 0, said
    assert "is sound" in said
    row = next(line for line in said.splitlines() if line.split()[:1] == ["default"])
    assert row.split()[-7:] == ["13", "26", "104", "behaviour,", "awareness,", "steering,", "LoRA"]
    assert "awareness: 12 training pairs for LoRA" in said
    assert "there is no" not in said


def test_a_concept_without_senses_is_sound(tmp_path):
    code, said = alignblind("concept", "check", "religion")
    assert code == 0
    assert "senses: none, so a study measures behaviour alone" in said
    assert next(line for line in said.splitlines() if line.split()[:1] == ["islam"]).split()[-4:] == ["16", "128", "384", "behaviour"]
    code, said = alignblind("concept", "list")
    assert code == 0
    assert {"age", "health", "race", "race_iat", "religion"} <= {line.split(":")[0] for line in said.splitlines()}


def test_what_a_tokenizer_splits_or_does_not_know(tiny_folder, llama3_folder):
    code, said = alignblind("concept", "check", "race", "--model", "organism:aligned")
    assert code == 2
    assert "identifiers unknown, which this model cannot be asked about: 'Black', 'White', 'Alonzo'" in said
    assert "all 2 sense words known, one token each" in said
    code, said = alignblind("concept", "check", "race", "--model", tiny_folder)
    assert code == 0, said
    assert "unknown" not in said
    code, said = alignblind("concept", "check", "age", "--model", llama3_folder)
    assert code == 2
    assert "identifiers of several tokens: 'old' (" in said
    assert "sense words of several tokens: 'things' (" in said


def test_bad_input_is_one_sentence(tmp_path):
    from alignblind_mi.models.spec import ModelError

    (tmp_path / "broken.toml").write_text("name = ", "utf-8")
    for arguments, kind, said in ((("nothing",), ConceptError, "unknown concept 'nothing'"),
                                  ((tmp_path / "broken.toml",), ConceptError, "is not valid TOML"),
                                  (("race", "--model", tmp_path / "no"), ModelError, "cannot be found")):
        done = CliRunner().invoke(app, ["concept", "check", *map(str, arguments)])
        assert isinstance(done.exception, kind)
        assert said in str(done.exception)


def test_a_concept_is_shown_as_the_file_it_is(tmp_path):
    for name in concept_names():
        code, text = alignblind("concept", "show", name)
        assert code == 0
        (tmp_path / "mine.toml").write_text(text, "utf-8")
        assert load_concept(tmp_path / "mine.toml") == load_concept(name)
        assert alignblind("concept", "show", str(tmp_path / "mine.toml")) == (0, text)
