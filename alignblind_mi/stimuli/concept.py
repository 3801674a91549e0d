"""Concepts as data: identifiers by role, words, senses and the texts that a study asks about them.

A concept is one TOML file (see `concepts/race.toml`). Everything that names a group, a sense or a word lives there; this module only
reads and checks it. It does NOT know what is measured, nor any model.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from alignblind_mi.borders.own import own_table
from alignblind_mi.borders.reading import is_file, named, parse_toml, read_text
from alignblind_mi.borders.settings import takes
from alignblind_mi.borders.texts import html_summary, named_line, one_line
from alignblind_mi.errors import AlignblindError
from alignblind_mi.stimuli.concept_check import UNTESTED, concept_problems

Role = Literal["marked", "unmarked"]
Valence = Literal["positive", "negative"]
T = TypeVar("T")

LIMIT = 4 << 20    # bytes of the largest concept file that is read
DEFAULT_CONCEPT = "race"    # what is studied where nothing else is asked for: the concept of the paper


class ConceptError(AlignblindError):
    """A concept that cannot be found, read or used."""


@dataclass(frozen=True)
class Cue:
    """A way of naming the two groups. Identifier pairs are roles: `marked` is the group that the stereotype is about.

    `categories` are those that the cue is asked about (empty: all of the concept). `senses`: whether the concept's senses can be asked of
    its identifiers; False for a cue whose identifiers have neither.
    """

    __repr__ = one_line

    name: str
    marked: tuple[str, ...]
    unmarked: tuple[str, ...]
    prefix: str = ""
    pairing: str = "parallel"
    description: str = ""
    categories: tuple[str, ...] = ()
    senses: bool = True

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

    __repr__ = one_line

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    released_as: str = ""
    description: str = ""

    def word_pairs(self) -> list[tuple[str, str]]:
        """All (positive, negative) pairs, in the order of the file."""
        return [(positive, negative) for positive in self.positive for negative in self.negative]


@dataclass(frozen=True)
class CompetenceSet:
    """Two options, and words of which each belongs to one of them beyond doubt; the first words of either side are not tested."""

    __repr__ = one_line

    name: str
    options: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]

    def split(self, tune: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The words of either option that are kept for tuning and worked examples, or those of the test."""
        part = slice(UNTESTED) if tune else slice(UNTESTED, None)
        return self.first[part], self.second[part]


@dataclass(frozen=True)
class Sense:
    """A reading of an identifier: its answer `word`, the phrase that evokes it, and words that have only this sense.

    `lexicon` holds the words and phrases by which a free text is recognised as being about the sense.
    """

    __repr__ = one_line

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

    __repr__ = one_line

    name: str
    text: str
    placeholder: str


@dataclass(frozen=True)
class Contexts:
    """Sentences with {x} and {y} that settle one sense: probes learn from `train` and are tested on `test`.

    What a model still understands under a treatment is asked about `settled` sentences, whose words may say plainly what they are about;
    without any, about those of `test`.
    """

    __repr__ = one_line

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    settled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """A question text with fields, and the order of options and words in which the paper asks it."""

    __repr__ = one_line

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

    __repr__ = one_line

    separator: str
    sentences: tuple[str, ...]
    restatements: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """A sentence put before a prompt as a mitigation, or as the placebo of one; it may name {marked} and {unmarked}."""

    __repr__ = one_line

    name: str
    text: str
    placebo: bool = False


@dataclass(frozen=True)
class Concept:
    """Everything a study needs to know about one concept. `digest` identifies the file's content in provenance.

    A concept whose identifiers are not ambiguous has no senses, nor anything that is asked about them: it has behaviour, and no awareness.
    """

    name: str
    cues: Mapping[str, Cue]
    categories: Mapping[str, Category]
    implicit: tuple[Template, ...]
    explicit: tuple[Template, ...]
    assignment: str
    senses: Mapping[str, Sense] = field(default_factory=dict)
    group_sense: str = ""
    other_sense: str = ""
    controls: Mapping[str, Control] = field(default_factory=dict)
    interpretations: Mapping[str, Interpretation] = field(default_factory=dict)
    awareness: Awareness | None = None
    selfie: Mapping[str, Interpretation] = field(default_factory=dict)
    contexts: Mapping[str, Contexts] = field(default_factory=dict)
    instructions: Mapping[str, Instruction] = field(default_factory=dict)
    competence: Mapping[str, CompetenceSet] = field(default_factory=dict)
    description: str = ""
    digest: str = field(default="", repr=False)
    worked: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)    # before a template's questions: see `shots.py`

    def __repr__(self) -> str:
        tables = {"cues": self.cues, "categories": self.categories, "controls": self.controls}
        told = [f"{name} {len(table)}" for name, table in tables.items()]
        senses = f"senses {' and '.join(self.senses)}" if self.senses else "no senses"
        return named_line(self, f"{self.name!r}: {', '.join(told)}, {senses}, digest {self.digest}")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        words = [{"category": category.name, "positive": ", ".join(category.positive), "negative": ", ".join(category.negative)}
                 for category in self.categories.values()]
        cues = "; ".join(f"{cue.name}: {', '.join(cue.marked[:3])} / {', '.join(cue.unmarked[:3])}" for cue in self.cues.values())
        facts = {"what": self.description, "cues (marked / unmarked)": cues, "senses": ", ".join(self.senses) or "none",
                 "controls": ", ".join(self.controls) or "none",
                 "templates": f"{len(self.implicit)} implicit, {len(self.explicit)} explicit",
                 "digest": self.digest}
        return html_summary(f"Concept {self.name}", facts, words)

    def cue(self, name: str) -> Cue:
        """The cue called `name`; ConceptError with the known ones otherwise."""
        return _pick(self.cues, name, f"cue of concept {self.name!r}")

    @property
    def first_cue(self) -> str:
        """The cue that is asked where none is named: the first of the file."""
        return next(iter(self.cues))

    def has_senses(self, cue: "str | Cue | None" = None) -> bool:
        """Whether there are senses to be read, and (of a cue) whether its identifiers have them."""
        named = self.cue(cue) if isinstance(cue, str) else cue
        return bool(self.senses) and (named is None or named.senses)

    def both_senses(self, cue: "str | Cue | None" = None) -> tuple[Sense, Sense]:
        """The group sense and the other one. Errors: ConceptError for a concept, or a cue of it, without senses."""
        if not self.has_senses(cue):
            name = cue if isinstance(cue, str) or cue is None else cue.name
            what = f"the cue {name!r} of the concept {self.name!r}" if self.senses else f"the concept {self.name!r}"
            raise ConceptError(f"{what} has no senses: its identifiers are not ambiguous, so that no reading can be measured, steered or "
                               "trained; its behaviour can be measured (measure_behaviour, alignblind study).")
        return self.senses[self.group_sense], self.senses[self.other_sense]

    def interpretation(self, name: str) -> Interpretation:
        """The interpretation prompt called `name`; ConceptError with the known ones otherwise."""
        self.both_senses()
        return _pick(self.interpretations, name, f"interpretation prompt of concept {self.name!r}")

    def selfie_prompt(self, name: str) -> Interpretation:
        """The open-ended interpretation prompt called `name`; ConceptError with the known ones otherwise."""
        self.both_senses()
        return _pick(self.selfie, name, f"SelfIE prompt of concept {self.name!r}")

    def steering_phrase(self, name: str) -> str:
        """The steering phrase of a sense or control; ConceptError with the known ones otherwise."""
        self.both_senses()
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
    folder = resources.files("alignblind_mi.stimuli") / "concepts"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def wrong_phrases() -> list[str]:
    """Phrases about something else than any concept, with {marked} and {unmarked}: placebos of steering, in the order of their choice.

    They lie in `wrong_concepts.toml`. A test keeps the words of all shipped concepts out of them.
    """
    return [str(phrase) for phrase in own_table("stimuli", "wrong_concepts")["phrases"]]


@cache
def _former() -> dict[str, Any]:
    """Former contexts: concept -> digest of its file -> sense -> train and test."""
    return own_table("stimuli", "former_contexts")


def former_digests(name: str) -> tuple[str, ...]:
    """The digests of a built-in concept's earlier versions that differ in their contexts alone, the last one last."""
    return tuple(_former().get(name, ()))


@takes(ConceptError)
def load_concept(source: str | Path) -> Concept:
    """Read a concept by the name of a built-in one or from a TOML file.

    NAME@DIGEST is a built-in one with the contexts of an earlier version (`former_contexts.toml`).

    Errors: ConceptError if it is unknown, not TOML, or if a field is missing, misspelt or inconsistent: the message names all of them with
    their places (see `concept_check.concept_problems`).
    """
    name, _, digest = str(source).partition("@")
    if digest in former_digests(name):
        contexts = {sense: Contexts(sense, tuple(texts["train"]), tuple(texts["test"])) for sense, texts in _former()[name][digest].items()}
        return replace(load_concept(name), contexts=contexts, digest=digest)
    text, where = read_concept_file(source)
    data = parse_concept(text, where)
    problems = concept_problems(data)
    if problems:
        raise ConceptError(f"{where}: " + "; ".join(problems) + ".")
    return _build(data, digest=hashlib.sha256(text.encode()).hexdigest()[:16])


def parse_concept(text: str, where: str) -> dict[str, Any]:
    """The tables of a concept file's text. Errors: ConceptError naming `where` and the line if it is not TOML."""
    return parse_toml(text, where, ConceptError)


def read_concept_file(source: str | Path) -> tuple[str, str]:
    """The text of a built-in concept or a TOML file, and what to call it.

    What has an ending or lies in a folder is a path; a bare word is a name. Errors: ConceptError for a file that is missing, unreadable or
    no TOML file, and for a name that is unknown.
    """
    if str(source) in concept_names():
        return (resources.files("alignblind_mi.stimuli") / "concepts" / f"{source}.toml").read_text("utf-8"), f"concept {source!r}"
    path, known = Path(source), f"Known: {', '.join(concept_names())}"
    if not (isinstance(source, Path) or path.suffix or len(path.parts) > 1 or is_file(path)):
        raise ConceptError(f"unknown concept {str(source)!r}. {known}; or give the path of a .toml file.")
    if is_file(path) and path.suffix.lower() != ".toml":
        raise ConceptError(f"{named('concept file', path)} does not end in .toml: give the path of a TOML file, or a name. {known}.")
    text = read_text(path, "concept file", ConceptError, limit=LIMIT, advice=f"give the path of a concept file, or a name. {known}")
    return text, named("concept file", path)


def _build(data: dict[str, Any], digest: str) -> Concept:
    return Concept(
        name=data["name"],
        description=data.get("description", ""),
        group_sense=data.get("group_sense", ""),
        other_sense=data.get("other_sense", ""),
        cues=_table(Cue, data["cues"]),
        categories=_table(Category, data["categories"]),
        senses=_table(Sense, data.get("senses", {})),
        controls=_table(Control, data.get("controls", {})),
        interpretations=_table(Interpretation, data.get("interpretations", {})),
        implicit=tuple(_template("implicit", entry) for entry in data["implicit"]),
        explicit=tuple(_template("explicit", entry) for entry in data["explicit"]),
        assignment=data["assignment"],
        awareness=Awareness(**_tuples(data["awareness"])) if "awareness" in data else None,
        selfie=_table(Interpretation, data.get("selfie", {})),
        contexts=_table(Contexts, data.get("contexts", {})),
        instructions=_table(Instruction, data.get("instructions", {})),
        competence=_table(CompetenceSet, data.get("competence", {})),
        digest=digest,
    )


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _table(kind: Callable[..., T], table: dict[str, dict[str, Any]]) -> dict[str, T]:
    return {name: kind(name=name, **_tuples(entry)) for name, entry in table.items()}


def _template(kind: Literal["implicit", "explicit"], entry: dict[str, Any]) -> Template:
    order = entry["published"]
    return Template(entry["name"], entry["text"], kind, order["first"], order["word1"], entry.get("scale", ""))

