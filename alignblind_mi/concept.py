"""Concepts as data: identifiers by role, words, senses and the texts that a study asks about them.

A concept is one TOML file (see `concepts/race.toml`). Everything that names a group, a sense or a word lives there; this module only
reads and checks it. It does NOT know what is measured, nor any model.
"""

import hashlib
import random
import string
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from alignblind_mi.errors import AlignblindError

Role = Literal["marked", "unmarked"]
Valence = Literal["positive", "negative"]
T = TypeVar("T")

DEFAULT_CONCEPT = "race"    # what is studied where nothing else is asked for: the concept of the paper


class ConceptError(AlignblindError):
    """A concept that cannot be found, read or used."""


@dataclass(frozen=True)
class Cue:
    """A way of naming the two groups. Identifier pairs are roles: `marked` is the group that the stereotype is about."""

    name: str
    marked: tuple[str, ...]
    unmarked: tuple[str, ...]
    prefix: str = ""
    pairing: str = "parallel"
    description: str = ""

    def identifiers(self, item: str, seed: int) -> tuple[str, str]:
        """The (marked, unmarked) pair of an item: the only one, or one drawn from `seed` and the item's own name."""
        draw = random.Random(f"{seed}|{self.name}|{item}")
        if self.pairing == "crossed":
            return draw.choice(self.marked), draw.choice(self.unmarked)
        index = draw.randrange(len(self.marked))
        return self.marked[index], self.unmarked[index]


@dataclass(frozen=True)
class Category:
    """A set of positive and negative words; every pair of them is a word pair."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    released_as: str = ""
    description: str = ""

    def word_pairs(self) -> list[tuple[str, str]]:
        """All (positive, negative) pairs, in the order of the file."""
        return [(positive, negative) for positive in self.positive for negative in self.negative]


@dataclass(frozen=True)
class Sense:
    """A reading of an identifier: its answer `word`, the phrase that evokes it, and words that have only this sense.

    `lexicon` holds the words and phrases by which a free text is recognised as being about the sense.
    """

    name: str
    word: str
    steering: str
    words: tuple[str, ...] = ()
    lexicon: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control:
    """A placebo phrase: built like a sense's steering phrase, about nothing in particular."""

    name: str
    steering: str


@dataclass(frozen=True)
class Interpretation:
    """A question about a placeholder whose representation is patched in (a patchscope's target prompt)."""

    name: str
    text: str
    placeholder: str


@dataclass(frozen=True)
class Contexts:
    """Sentences with {x} and {y} that settle one sense: probes learn from `train` and are tested on `test`."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """A question text with fields, and the order of options and words in which the paper asks it."""

    name: str
    text: str
    kind: Literal["implicit", "explicit"]
    first: Role
    word1: Valence
    scale: Literal["", "likert", "agree"] = ""


@dataclass(frozen=True)
class Awareness:
    """Sentences that leave the sense open and restatements that settle it: training data of awareness LoRA.

    `restatements` settle it on the group sense, `others` on the other one (the mirror image: a LoRA that makes a model blind).
    """

    separator: str
    sentences: tuple[str, ...]
    restatements: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """A sentence put before a prompt as a mitigation, or as the placebo of one; it may name {marked} and {unmarked}."""

    name: str
    text: str
    placebo: bool = False


@dataclass(frozen=True)
class Concept:
    """Everything a study needs to know about one concept. `digest` identifies the file's content in provenance."""

    name: str
    cues: Mapping[str, Cue]
    categories: Mapping[str, Category]
    senses: Mapping[str, Sense]
    group_sense: str
    other_sense: str
    controls: Mapping[str, Control]
    interpretations: Mapping[str, Interpretation]
    implicit: tuple[Template, ...]
    explicit: tuple[Template, ...]
    assignment: str
    awareness: Awareness | None = None
    selfie: Mapping[str, Interpretation] = field(default_factory=dict)
    contexts: Mapping[str, Contexts] = field(default_factory=dict)
    instructions: Mapping[str, Instruction] = field(default_factory=dict)
    description: str = ""
    digest: str = field(default="", repr=False)

    def cue(self, name: str) -> Cue:
        """The cue called `name`; ConceptError with the known ones otherwise."""
        return _pick(self.cues, name, f"cue of concept {self.name!r}")

    def interpretation(self, name: str) -> Interpretation:
        """The interpretation prompt called `name`; ConceptError with the known ones otherwise."""
        return _pick(self.interpretations, name, f"interpretation prompt of concept {self.name!r}")

    def selfie_prompt(self, name: str) -> Interpretation:
        """The open-ended interpretation prompt called `name`; ConceptError with the known ones otherwise."""
        return _pick(self.selfie, name, f"SelfIE prompt of concept {self.name!r}")

    def steering_phrase(self, name: str) -> str:
        """The steering phrase of a sense or control; ConceptError with the known ones otherwise."""
        phrases = {entry.name: entry.steering for table in (self.senses, self.controls) for entry in _entries(table)}
        return _pick(phrases, name, f"sense or control of concept {self.name!r}")


def _entries(table: Mapping[str, Sense] | Mapping[str, Control]) -> list[Sense | Control]:
    return list(table.values())


def _pick(known: Mapping[str, T], name: str, what: str) -> T:
    if name not in known:
        raise ConceptError(f"unknown {what}: {name!r}. Known: {', '.join(known)}.")
    return known[name]


def concept_names() -> list[str]:
    """Names of the concepts that come with the package."""
    folder = resources.files("alignblind_mi") / "concepts"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_concept(source: str | Path) -> Concept:
    """Read a concept by the name of a built-in one or from a TOML file.

    Errors: ConceptError if it is unknown, not TOML, or if a field is missing, misspelt or inconsistent (the message names it).
    """
    text, where = _read(source)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConceptError(f"{where} is not valid TOML: {error}.") from error
    try:
        concept = _build(data, digest=hashlib.sha256(text.encode()).hexdigest()[:16])
    except KeyError as error:
        raise ConceptError(f"{where}: the field {error} is missing. Compare with the built-in concept {DEFAULT_CONCEPT!r}.") from error
    except (TypeError, AttributeError) as error:
        raise ConceptError(f"{where}: a field is misspelt or has the wrong form ({error}).") from error
    problems = _problems(concept)
    if problems:
        raise ConceptError(f"{where}: " + "; ".join(problems) + ".")
    return concept


def _read(source: str | Path) -> tuple[str, str]:
    if str(source) in concept_names():
        return (resources.files("alignblind_mi") / "concepts" / f"{source}.toml").read_text("utf-8"), f"concept {source!r}"
    path = Path(source)
    if path.suffix == ".toml" and path.is_file():
        return path.read_text("utf-8"), f"concept file {path}"
    raise ConceptError(f"unknown concept {str(source)!r}. Known: {', '.join(concept_names())}; or give the path of a .toml file.")


def _build(data: dict[str, Any], digest: str) -> Concept:
    return Concept(
        name=data["name"],
        description=data.get("description", ""),
        group_sense=data["group_sense"],
        other_sense=data["other_sense"],
        cues=_table(Cue, data["cues"]),
        categories=_table(Category, data["categories"]),
        senses=_table(Sense, data["senses"]),
        controls=_table(Control, data.get("controls", {})),
        interpretations=_table(Interpretation, data["interpretations"]),
        implicit=tuple(_template("implicit", entry) for entry in data["implicit"]),
        explicit=tuple(_template("explicit", entry) for entry in data["explicit"]),
        assignment=data["assignment"],
        awareness=Awareness(**_tuples(data["awareness"])) if "awareness" in data else None,
        selfie=_table(Interpretation, data.get("selfie", {})),
        contexts=_table(Contexts, data.get("contexts", {})),
        instructions=_table(Instruction, data.get("instructions", {})),
        digest=digest,
    )


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _table(kind: Callable[..., T], table: dict[str, dict[str, Any]]) -> dict[str, T]:
    return {name: kind(name=name, **_tuples(entry)) for name, entry in table.items()}


def _template(kind: Literal["implicit", "explicit"], entry: dict[str, Any]) -> Template:
    order = entry["published"]
    return Template(entry["name"], entry["text"], kind, order["first"], order["word1"], entry.get("scale", ""))


_FIELDS = {"first", "second", "word1", "word2", "positive", "negative", "marked", "unmarked"}
_REQUIRED = {"implicit": {"first", "second", "word1", "word2"}, "explicit": {"first", "second", "positive", "negative"}}


def template_fields(text: str) -> set[str]:
    """Names of the {fields} in a template text."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _problems(concept: Concept) -> list[str]:
    """What is inconsistent in a concept, in sentences; empty when it is sound."""
    found = [f"{role} {name!r} is not among the senses" for role, name in (
        ("group_sense", concept.group_sense), ("other_sense", concept.other_sense)) if name not in concept.senses]
    for cue in concept.cues.values():
        if not cue.marked or not cue.unmarked:
            found.append(f"cue {cue.name!r} has no identifiers for one of the roles")
        if cue.pairing not in ("parallel", "crossed"):
            found.append(f"cue {cue.name!r}: pairing must be 'parallel' or 'crossed', not {cue.pairing!r}")
        elif cue.pairing == "parallel" and len(cue.marked) != len(cue.unmarked):
            found.append(f"cue {cue.name!r} pairs {len(cue.marked)} marked with {len(cue.unmarked)} unmarked identifiers")
    for category in concept.categories.values():
        if set(category.positive) & set(category.negative):
            found.append(f"category {category.name!r} has words that are both positive and negative")
    for template in (*concept.implicit, *concept.explicit):
        fields = template_fields(template.text)
        if fields - _FIELDS:
            found.append(f"template {template.name!r} has unknown fields {sorted(fields - _FIELDS)}; known: {sorted(_FIELDS)}")
        if _REQUIRED[template.kind] - fields:
            found.append(f"template {template.name!r} lacks the fields {sorted(_REQUIRED[template.kind] - fields)}")
        if template.first not in ("marked", "unmarked") or template.word1 not in ("positive", "negative"):
            found.append(f"template {template.name!r}: published.first must be a role and published.word1 a valence")
    if template_fields(concept.assignment) != {"word1", "option1", "word2", "option2"}:
        found.append(f"the assignment {concept.assignment!r} must have the fields {{word1}}, {{option1}}, {{word2}} and {{option2}}")
    for question in (*concept.interpretations.values(), *concept.selfie.values()):
        if template_fields(question.text) != {"x"}:
            found.append(f"interpretation {question.name!r} must have the one field {{x}}")
    for contexts in concept.contexts.values():
        found += _context_problems(contexts, concept)
    for entry in concept.instructions.values():
        if not template_fields(entry.text) <= {"marked", "unmarked"}:
            found.append(f"instruction {entry.name!r} may have the fields {{marked}} and {{unmarked}} only")
    if concept.awareness is not None:
        texts = (*concept.awareness.sentences, *concept.awareness.restatements, *concept.awareness.others)
        found += [f"awareness sentence {text!r} may have the fields {{x}} and {{y}} only" for text in texts
                  if not template_fields(text) <= {"x", "y"}]
    for phrase in [entry.steering for table in (concept.senses, concept.controls) for entry in _entries(table)]:
        if template_fields(phrase) != {"marked", "unmarked"}:
            found.append(f"steering phrase {phrase!r} must have the fields {{marked}} and {{unmarked}}")
    return found


def _context_problems(contexts: Contexts, concept: Concept) -> list[str]:
    found = [] if contexts.name in concept.senses else [f"contexts {contexts.name!r} are of no sense; senses: {', '.join(concept.senses)}"]
    wrong = [text for text in (*contexts.train, *contexts.test) if template_fields(text) != {"x", "y"}]
    found += [f"context sentence {text!r} must have the fields {{x}} and {{y}}" for text in wrong]
    found += [f"contexts {contexts.name!r} have no {split} sentences" for split in ("train", "test") if not getattr(contexts, split)]
    shared = sorted(set(contexts.train) & set(contexts.test))
    return found + [f"context sentence {text!r} is in both train and test" for text in shared]
