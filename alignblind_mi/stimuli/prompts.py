"""Prompts with marked spans, and the designs that build them from a concept.

A mark is a name for the places in a text that matter (the identifiers, the words, a placeholder), kept as character spans so that no
later step has to search for them. Labels become the columns of results. This module does NOT know tokens, models or answers.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from math import gcd
from types import MappingProxyType
from typing import Annotated, Any, Literal

from alignblind_mi.borders.own import own_table
from alignblind_mi.borders.settings import Count, Listed, Made, Names, Seed, Text, checked, many, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.errors import AlignblindError
from alignblind_mi.stimuli.concept import Concept, Cue, Interpretation, Template
from alignblind_mi.stimuli.concept_check import FIELD, template_fields

Design = Literal["published", "balanced"]
Kind = Literal["implicit", "explicit"]
DESIGNS: tuple[Design, ...] = ("published", "balanced")
KINDS: tuple[Kind, ...] = ("implicit", "explicit")
_EMPTY: Mapping[str, str] = MappingProxyType({})


class PromptError(AlignblindError):
    """A prompt that cannot be built, or a mark that cannot be found in it."""


@dataclass(frozen=True, order=True)
class Span:
    """Characters start..end (end excluded) of a prompt's text."""

    start: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """A text, its marks (name -> spans in order of occurrence) and its labels (name -> value; they become columns).

    `formatted`: the text is whole, as a chat template has written it; no BOS is put before it.
    """

    __repr__ = one_line

    text: str
    marks: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    formatted: bool = False

    def __post_init__(self) -> None:
        checked(self.text, Text, "the text of a prompt", PromptError)
        for name, spans in self.marks.items():
            wrong = next((span for span in spans if not 0 <= span.start < span.end <= len(self.text)), None)
            if wrong is not None:
                raise PromptError(f"the mark {name!r} is at characters {wrong.start} to {wrong.end} of a text of {len(self.text)}: a span "
                                  "begins before it ends, and lies within the text.")

    def spans(self, mark: str) -> tuple[Span, ...]:
        """The spans of `mark`; PromptError if the prompt has no such mark."""
        if not self.marks.get(mark):
            raise PromptError(f"the prompt {_short(self.text)!r} has no mark {mark!r}; its marks: {', '.join(self.marks) or 'none'}.")
        return self.marks[mark]

    def prefixed(self, prefix: str) -> "Prompt":
        """The same prompt after `prefix`, marks moved along."""
        if not prefix:
            return self
        shift = len(prefix)
        marks = {name: tuple(Span(s.start + shift, s.end + shift) for s in spans) for name, spans in self.marks.items()}
        return replace(self, text=prefix + self.text, marks=marks)


def as_prompt(value: Any) -> Prompt:
    """A prompt as it is, a text as a prompt without marks. Errors: TypeError for anything else."""
    if isinstance(value, Prompt):
        return value
    if isinstance(value, str):
        return Prompt(value)
    raise TypeError("no prompt")


Asked = Annotated[Prompt | str, Made(as_prompt, "a Prompt or a text", Prompt | str)]
Prompts = Annotated[Prompt | str | Sequence[Asked], Listed(once=False, alone=True)]    # one or many


def as_prompts(prompts: Prompts) -> list[Prompt]:
    """One or many prompts or texts as prompts."""
    found: tuple[Prompt | str, ...] = many(prompts)
    return [as_prompt(prompt) for prompt in found]


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def mark(text: str, **words: str) -> Prompt:
    """A prompt from any text: each keyword names a mark and gives the word to find, all its occurrences as whole words.

    >>> mark("Race: black and white", marked="black", unmarked="white").spans("marked")
    (Span(start=6, end=11),)

    Errors: PromptError if a word does not occur in the text.
    """
    marks = {}
    for name, word in words.items():
        found = tuple(Span(*m.span()) for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text))
        if not found:
            raise PromptError(f"the mark {name!r} cannot be found: the text {_short(text)!r} does not contain the word {word!r}.")
        marks[name] = found
    return Prompt(text, marks)


def mark_found(text: str, words: Mapping[str, Sequence[str]], *, ignore_case: bool = False) -> Prompt:
    """A prompt from any text with the words that occur in it marked, by mark; a mark none of whose words occurs is left out."""
    marks: dict[str, tuple[Span, ...]] = {}
    for name, each in words.items():
        pattern = "|".join(map(re.escape, sorted(each, key=len, reverse=True)))
        found = re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE if ignore_case else 0) if each else ()
        spans = tuple(Span(*match.span()) for match in found)
        marks |= {name: spans} if spans else {}
    return Prompt(text, marks)


def fill(template: str, values: Mapping[str, str], marks: Mapping[str, str] = _EMPTY) -> Prompt:
    """Fill a template's {fields} with `values` and mark them: `marks` maps field -> mark name (fields not in it are not marked).

    Errors: PromptError for a field without a value, or braces that are no plain field.
    """
    text, spans = "", dict[str, list[Span]]()
    for literal, name in _pieces(template):
        text += literal
        if name is None:
            continue
        if name not in values:
            raise PromptError(f"the text {_short(template)!r} has a field {{{name}}}, and there is nothing to fill it with: "
                              f"{', '.join(values) or 'no field'} is known here.")
        if name in marks:
            spans.setdefault(marks[name], []).append(Span(len(text), len(text) + len(values[name])))
        text += values[name]
    return Prompt(text, {name: tuple(found) for name, found in spans.items()})


def filled(template: str, /, **values: str) -> str:
    """The text of a template with its {fields} filled, letter by letter: nothing in it is interpreted. Errors: as `fill`."""
    return fill(template, values).text


@lru_cache(4096)
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    try:
        template_fields(template)
    except ValueError as error:
        raise PromptError(f"{error}.") from error
    parts = FIELD.split(template)    # text, name, text, name ... text
    return tuple(zip(parts[::2], [*parts[1::2], None], strict=True))


@dataclass(frozen=True)
class _Question:
    """A template text with one order of the options and one order of the words."""

    template: Template
    first: str
    word1: str


def _published(templates: Sequence[Template]) -> list[_Question]:
    return [_Question(template, template.first, template.word1) for template in templates]


def _balanced(templates: Sequence[Template]) -> list[_Question]:
    """Every distinct text once (under its first name), crossed with both orders of the options and of the words."""
    distinct = {template.text: template for template in reversed(templates)}
    orders = list(product(("marked", "unmarked"), ("positive", "negative")))
    return [_Question(template, *order) for template in reversed(distinct.values()) for order in orders]


@takes(PromptError)
def behaviour_prompts(
    concept: Concept, cue: str | Cue, kind: Kind, *, design: Design | str = "balanced", seed: Seed = 0,
    categories: Names = (), max_word_pairs: Count | None = None
) -> list[Prompt]:
    """All prompts of one kind for a cue: word pairs x questions, in a fixed order.

    `published` asks each template in the one order the paper uses; `balanced` crosses option order with word order within every
    template text, so that association and position separate. `seed` draws the identifiers of cues that have several.
    `max_word_pairs` thins the word pairs of each category evenly; `categories` default to those of the cue.
    Marks: marked, unmarked, positive, negative. The cue's prefix stands before the question and bears no marks.

    Errors: ConceptError / PromptError for an unknown cue, design or category.
    """
    cue = concept.cue(cue) if isinstance(cue, str) else cue
    if design not in DESIGNS:
        raise PromptError(f"unknown design {design!r}. Known: {', '.join(DESIGNS)}.")
    unknown = [name for name in categories if name not in concept.categories]
    if unknown:
        raise PromptError(f"unknown category {unknown[0]!r} of concept {concept.name!r}. Known: {', '.join(concept.categories)}.")
    templates = concept.implicit if kind == "implicit" else concept.explicit
    questions = _published(templates) if design == "published" else _balanced(templates)
    return [
        _prompt(concept, cue, name, pair, question, design, seed)
        for name in (categories or cue.categories or concept.categories)
        for pair in _thinned(concept.categories[name].word_pairs(), max_word_pairs)
        for question in questions
    ]


def _thinned(pairs: list[tuple[str, str]], most: int | None) -> list[tuple[str, str]]:
    """At most `most` pairs, evenly spaced by a step that is coprime with the list's length, so that every word keeps its turn."""
    if most is None or most >= len(pairs):
        return pairs
    step = next(k for k in range(int(len(pairs) * 0.382) + 1, 2 * len(pairs) + 2) if gcd(k, len(pairs)) == 1)
    return [pairs[i] for i in sorted(k * step % len(pairs) for k in range(most))]


def implicit_prompts(concept: Concept, cue: str | Cue, *, design: Design | str = "balanced", seed: Seed = 0,
                     categories: Names = (), max_word_pairs: Count | None = None) -> list[Prompt]:
    """The word-association test: see `behaviour_prompts`."""
    return behaviour_prompts(concept, cue, "implicit", design=design, seed=seed, categories=categories, max_word_pairs=max_word_pairs)


def explicit_prompts(concept: Concept, cue: str | Cue, *, design: Design | str = "balanced", seed: Seed = 0,
                     categories: Names = (), max_word_pairs: Count | None = None) -> list[Prompt]:
    """The agreement questions: see `behaviour_prompts`. The label `statement` says what agreement endorses."""
    return behaviour_prompts(concept, cue, "explicit", design=design, seed=seed, categories=categories, max_word_pairs=max_word_pairs)


def _prompt(concept: Concept, cue: Cue, category: str, pair: tuple[str, str], question: _Question, design: str, seed: int) -> Prompt:
    positive, negative = pair
    marked, unmarked = cue.identifiers(f"{category}|{positive}|{negative}", seed)
    by_role = {"marked": marked, "unmarked": unmarked, "positive": positive, "negative": negative}
    second = "unmarked" if question.first == "marked" else "marked"
    word2 = "negative" if question.word1 == "positive" else "positive"
    roles = {"first": question.first, "second": second, "word1": question.word1, "word2": word2} | {role: role for role in by_role}
    prompt = fill(question.template.text, {name: by_role[role] for name, role in roles.items()}, roles).prefixed(cue.prefix)
    kind, worked = question.template.kind, concept.worked.get(question.template.text, ())
    if worked:
        prompt = prompt.prefixed(worked[random.Random(f"{seed}|{category}|{positive}|{negative}").randrange(len(worked))])
    statement = "" if kind == "implicit" else "stereotype" if question.first == "marked" else "reverse"
    labels = {
        "concept": concept.name, "cue": cue.name, "category": category, "kind": kind, "design": design,
        "template": question.template.name, "option_order": f"{question.first}_first", "word_order": f"{question.word1}_first",
        "statement": statement, **by_role, "word_pair": f"{positive}|{negative}",
    }
    return replace(prompt, labels=labels)


@takes(PromptError)
def steering_prompt(concept: Concept, cue: str | Cue, name: str, *, marked: str = "", unmarked: str = "") -> Prompt:
    """The phrase whose identifiers carry the sense (or control) `name`; marks: marked, unmarked. Default: the cue's first identifiers."""
    cue = concept.cue(cue) if isinstance(cue, str) else cue
    roles = {"marked": marked or cue.marked[0], "unmarked": unmarked or cue.unmarked[0]}
    return replace(fill(concept.steering_phrase(name), roles, {role: role for role in roles}), labels={"phrase": name})


@takes(PromptError)
def interpretation_prompt(question: Interpretation) -> Prompt:
    """The question with its placeholder in place; mark: placeholder."""
    return replace(fill(question.text, {"x": question.placeholder}, {"x": "placeholder"}), labels={"interpretation": question.name})


def option_roles(prompt: Prompt) -> tuple[str, str]:
    """The roles of an implicit or explicit prompt's options, in its order."""
    return ("marked", "unmarked") if prompt.labels["option_order"] == "marked_first" else ("unmarked", "marked")


@lru_cache(1)
def _shared_wordings() -> tuple[str, ...]:
    """The formats of complete answers that all concepts share."""
    return tuple(own_table("stimuli", "wordings")["wordings"])


def assignments(concept: Concept, prompt: Prompt, wording: str = "") -> tuple[str, str]:
    """The two complete answers to an implicit prompt, in the prompt's word order: (stereotyped, reversed).

    In the concept's own wording (`assignment`), or in another one with its fields.
    """
    role = {"positive": "unmarked", "negative": "marked"}
    other = {"positive": "marked", "negative": "unmarked"}
    first = prompt.labels["word_order"].removesuffix("_first")
    order = (first, "negative" if first == "positive" else "positive")
    return tuple(  # type: ignore[return-value]
        filled(wording or concept.assignment, word1=prompt.labels[order[0]], option1=prompt.labels[way[order[0]]],
               word2=prompt.labels[order[1]], option2=prompt.labels[way[order[1]]])
        for way in (role, other))


def worded_positions(concept: Concept, prompt: Prompt) -> list[tuple[str, str]]:
    """The answers to an explicit prompt that endorse its statement and those that do not, side by side, in the wordings of its scale.

    Behind a prompt that ends in a blank, as the paper's do, an answer may begin without one of its own, or with it: both count.
    """
    scale = next(one.scale for one in concept.explicit if one.name == prompt.labels["template"])
    leads = ("", " ") if prompt.text[-1:].isspace() else (" ",)
    return [(lead + endorses, lead + rejects) for endorses, rejects in own_table("stimuli", "wordings")["positions"][scale]
            for lead in leads]


def worded_assignments(concept: Concept, prompt: Prompt) -> list[tuple[str, str]]:
    """`assignments` in every wording: the concept's own first, then those of `wordings.toml` that are not the same."""
    wordings = dict.fromkeys((concept.assignment, *_shared_wordings()))
    return [assignments(concept, prompt, wording) for wording in wordings]
