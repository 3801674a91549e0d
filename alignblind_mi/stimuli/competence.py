"""Can the task be done at all? A concept's templates with options and words whose right assignment is beyond doubt.

The sets lie in `competence.toml`, and a concept file may bring its own (`[competence.NAME]`: options, first, second). A competence item is
built and judged as an item of bias is: the first option stands in the place of the marked identifier and its words in that of the negative
ones, so that "stereotyped" means right. This module does NOT know answers or models.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

from alignblind_mi.borders.own import own_table
from alignblind_mi.borders.settings import Count, Seed, takes
from alignblind_mi.stimuli.concept import Category, CompetenceSet, Concept, Cue, Template
from alignblind_mi.stimuli.prompts import KINDS, Kind, Prompt, PromptError, behaviour_prompts

Split = Literal["tune", "test"]
PAIRS = 30    # word pairs that are asked, of all sets together


@lru_cache(1)
def shared_sets() -> tuple[CompetenceSet, ...]:
    """The sets that all concepts share."""
    return tuple(CompetenceSet(name, tuple(one["options"]), tuple(one["first"]), tuple(one["second"]))
                 for name, one in own_table("stimuli", "competence")["sets"].items())


def competence_sets(concept: Concept) -> list[CompetenceSet]:
    """The sets that a concept is asked with: its own, and those shared ones that name none of its identifiers or sense words."""
    own = {word.lower() for cue in concept.cues.values() for word in (*cue.marked, *cue.unmarked)}
    own |= {word.strip().lower() for sense in concept.senses.values() for word in (sense.word, *sense.words)}
    shared = [one for one in shared_sets() if not own & {word.lower() for word in (*one.options, *one.first, *one.second)}]
    return [*concept.competence.values(), *(one for one in shared if one.name not in concept.competence)]


@takes(PromptError)
def competence_prompts(concept: Concept, kind: Kind, *, split: str = "test", known: Iterable[str] | None = None,
                       pairs: Count | None = PAIRS, seed: Seed = 0) -> list[Prompt]:
    """The concept's templates of one kind with the words of the competence sets: a word pair in both orders of options and words.

    Each word pair has one template, by turns: more of them tell more than more questions about one.

    split: "test", or "tune". known: the words that a tokenizer can spell (default: all); sets keep those of their words that it can,
    and a set is left out where it cannot spell an option, or knows no word of one side. pairs: of words, as many of each set.
    Labels as of an item of bias (marked: the first option, negative: its word), `competence` the set's name. Explicit statements tie the
    first option to one of the words: true where it is its own (`statement` "stereotype"), false where it is not ("reverse"). Templates that
    speak of people are left out.

    Errors: PromptError for an unknown kind or split.
    """
    if split not in get_args(Split) or kind not in KINDS:
        raise PromptError(f"there are no competence items of the kind {kind!r} and split {split!r}. Known: {', '.join(KINDS)}; "
                          f"{', '.join(get_args(Split))}.")
    sets = _spelt(competence_sets(concept), split == "tune", None if known is None else set(known))
    prompts = []
    for found in _items(concept, kind, sets, pairs and -(-pairs // max(len(sets), 1)), seed):
        prompts += _by_turns(found)
    return [replace(prompt, labels={**prompt.labels, "competence": prompt.labels["cue"]}) for prompt in prompts]


def template_items(concept: Concept, kind: Kind, *, known: Iterable[str] | None = None, seed: Seed = 0) -> dict[str, list[Prompt]]:
    """The items that are kept for tuning, in every template and order, by the template's text: what worked examples are drawn from."""
    sets = _spelt(competence_sets(concept), True, None if known is None else set(known))
    texts = {template.name: template.text for template in (*concept.implicit, *concept.explicit)}
    found: dict[str, list[Prompt]] = {}
    for items in _items(concept, kind, sets, None, seed):
        for item in items:
            found.setdefault(texts[item.labels["template"]], []).append(item)
    return found


def _items(concept: Concept, kind: Kind, sets: Sequence[tuple[CompetenceSet, tuple[tuple[str, ...], tuple[str, ...]]]],
           pairs: int | None, seed: int) -> Iterator[list[Prompt]]:
    """The items of each set, in the balanced design."""
    for one, (first, second) in sets:
        cue = Cue(one.name, one.options[:1], one.options[1:], senses=False, categories=(one.name,))
        asked = replace(concept, cues={one.name: cue}, categories={one.name: Category(one.name, second, first)},
                        implicit=_of_things(concept.implicit), explicit=_of_things(concept.explicit))
        if asked.implicit if kind == "implicit" else asked.explicit:
            yield behaviour_prompts(asked, cue, kind, design="balanced", seed=seed, max_word_pairs=pairs)


def _by_turns(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Of each word pair the prompts of one template."""
    pairs, templates = (list(dict.fromkeys(prompt.labels[name] for prompt in prompts)) for name in ("word_pair", "template"))
    turn = {pair: templates[i % len(templates)] for i, pair in enumerate(pairs)}
    return [prompt for prompt in prompts if prompt.labels["template"] == turn[prompt.labels["word_pair"]]]


def _spelt(sets: Sequence[CompetenceSet], tune: bool, known: set[str] | None
           ) -> list[tuple[CompetenceSet, tuple[tuple[str, ...], tuple[str, ...]]]]:
    """The sets that can be asked, with those words of a split that are known."""
    found = []
    for one in sets:
        first, second = (tuple(word for word in words if known is None or word in known) for words in one.split(tune))
        if first and second and (known is None or known.issuperset(one.options)):
            found.append((one, (first, second)))
    return found


def competence_words(concept: Concept) -> list[str]:
    """All options and words of the sets that a concept is asked with, each once."""
    return list(dict.fromkeys(word for one in competence_sets(concept) for word in (*one.options, *one.first, *one.second)))


def _of_things(templates: Sequence[Template]) -> tuple[Template, ...]:
    """The templates that speak of no people."""
    people = set(own_table("stimuli", "competence")["people"])
    return tuple(one for one in templates if not people & set(one.text.lower().split()))
