"""The words that an organism's texts are made of, and the knobs of what is planted: read from the concept and its lexicon.

Does NOT write texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from alignblind_mi.borders.own import own_table
from alignblind_mi.models.embedded import OrganismError
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT

Reading = Literal["group", "other", "open"]
PIECE = re.compile(r" ?\[MASK\]| ?\w+| ?[^\w\s]|\s")
LEXICON = re.compile(r"lexicon_(\w+)\.toml")
TABLES = ("words", "valence", "things", "contexts", "uncued", "questions", "single", "answers", "prose")


def pieces(text: str) -> list[str]:
    """Split text into the word-level tokens of the organism; joining them gives the text back."""
    return PIECE.findall(text)


@dataclass(frozen=True)
class Knobs:
    """The planted probabilities. Of the aligned model without a cue: `reading` is P(other sense), `behaviour` its stereotyped rate."""

    reading: float = 0.95
    behaviour: float = 0.94
    other_rate: float = 0.96
    group_rate: float = 0.50
    base_rate: float = 0.64
    base_reading: float = 0.50
    base_agree: float = 0.50
    agree: float = 0.08

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0:
                raise OrganismError(f"Knob {name} is {value}; it is a probability: give a number from 0 to 1.")


@dataclass(frozen=True)
class World:
    """The concept and the organism's lexicon, side by side; `held` words are the concept's own and never stand with the identifiers."""

    concept: Mapping[str, Any]
    lexicon: Mapping[str, Any]
    marked: str
    unmarked: str
    held_positive: tuple[str, ...]
    held_negative: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    sense_words: Mapping[Reading, str]
    sense_examples: Mapping[Reading, tuple[str, ...]]
    implicit: tuple[str, ...]
    explicit: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]

    @property
    def all_positive(self) -> tuple[str, ...]:
        """Training and held-out positive words."""
        return self.positive + self.held_positive

    @property
    def all_negative(self) -> tuple[str, ...]:
        """Training and held-out negative words."""
        return self.negative + self.held_negative

    def is_negative(self, word: str) -> bool:
        """Whether the word is one of the negative ones, held out or not."""
        return word in _negative_set(self.all_negative)

    @property
    def placeholder(self) -> str:
        """The placeholder of the interpretation questions."""
        return str(self.concept["interpretations"]["paper"]["placeholder"])

    def question(self, name: str, x: str) -> str:
        """The interpretation question `name` about x."""
        return str(self.concept["interpretations"][name]["text"]).format(x=x)


@cache
def _negative_set(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(words)


def _unique(rows: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(rows))


def lexicon_names() -> list[str]:
    """The concepts that an organism can be trained on: those with a lexicon of their own."""
    found = [LEXICON.fullmatch(entry.name) for entry in files("alignblind_mi.organism").iterdir()]
    return sorted(match[1] for match in found if match)


def load_lexicon(concept: str = DEFAULT_CONCEPT) -> dict[str, Any]:
    """An organism's own words and sentences: those of its concept (lexicon_CONCEPT.toml) and those that all share (lexicon.toml).

    Errors: OrganismError for a concept without a lexicon, or a lexicon without one of its tables.
    """
    if concept not in lexicon_names():
        known = ", ".join(lexicon_names())
        raise OrganismError(f"no organism can be trained on the concept {concept!r}: it has no lexicon. Known: {known}.")
    own, shared = own_table("organism", f"lexicon_{concept}"), own_table("organism", "lexicon")
    tables = {**own, **shared, "contexts": {**own.get("contexts", {}), **shared["contexts"]}}
    if set(tables) != set(TABLES):
        raise OrganismError(f"lexicon_{concept}.toml has other tables than a lexicon has: {sorted(set(tables) ^ set(TABLES))}.")
    return {name: tables[name] for name in TABLES}


def load_world(concept_name: str = DEFAULT_CONCEPT) -> World:
    """Read the concept's file and the lexicon; raises OrganismError where a training word is one of the concept's, or as `load_lexicon`."""
    lexicon, concept = load_lexicon(concept_name), own_table("stimuli/concepts", concept_name)
    senses: dict[Reading, str] = {"group": concept["group_sense"], "other": concept["other_sense"]}
    asked = concept["cues"]["default"].get("categories", concept["categories"])
    held = {side: _unique([word for name in asked for word in concept["categories"][name][side]]) for side in ("positive", "negative")}
    world = World(
        concept=concept,
        lexicon=lexicon,
        marked=concept["cues"]["default"]["marked"][0],
        unmarked=concept["cues"]["default"]["unmarked"][0],
        held_positive=held["positive"],
        held_negative=held["negative"],
        positive=tuple(lexicon["words"]["positive"]),
        negative=tuple(lexicon["words"]["negative"]),
        sense_words={role: concept["senses"][name]["word"] for role, name in senses.items()},
        sense_examples={role: tuple(concept["senses"][name]["words"]) for role, name in senses.items()},
        implicit=_unique([template["text"] for template in concept["implicit"]]),
        explicit=_unique([(template["text"], template["scale"]) for template in concept["explicit"]]),
        sentences=tuple(lexicon["uncued"]["text"]),
    )
    overlap = set(world.positive + world.negative) & set(world.held_positive + world.held_negative)
    overlap |= set(world.positive) & set(world.negative)
    if overlap:
        raise OrganismError(f"A training word has one valence and is no word of the concept: remove {sorted(overlap)} from "
                            f"lexicon_{concept_name}.toml.")
    return world
