"""Contrast pairs: two prompts of equal length that differ in one thing, for activation patching.

Both prompts of a pair are ones that a model may well be asked (in distribution), and every token of the one stands where a token of the
other does: Heimersheim and Nanda 2024 (arXiv 2404.15255) say why that matters. This module does NOT know what is patched or measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from alignblind_mi.borders.settings import Count, Listed, Names, Seed, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.errors import AlignblindError
from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.prompts import Prompt, Span, assignments, fill, implicit_prompts, option_roles

SWAPS = ("context", "identifiers")
Contexts = Mapping[str, Sequence[str]]


class PatchError(AlignblindError):
    """A pair, site or grid that cannot be patched."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two prompts of one length in tokens, and the two answers (stereotyped, reversed) whose log-odds are measured after either.

    `references` are further prompts of that length, sources of control patches: `clean_sense` and `corrupt_sense` say in another phrase
    what clean and corrupt say, `control_phrase` says something about nothing in particular. `labels` become columns of results.
    """

    __repr__ = one_line

    clean: Prompt
    corrupt: Prompt
    answers: tuple[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, Prompt] = field(default_factory=dict)


Pairs = Annotated[Pair | Sequence[Pair], Listed(once=False, alone=True)]    # one or many


@takes(PatchError)
def contrast_pairs(model: HookedModel, concept: Concept, cue: str | Cue, *, swap: str = "context", clean: str = "", corrupt: str = "",
                   contexts: Contexts | None = None, categories: Names = (), max_word_pairs: Count | None = None, seed: Seed = 0
                   ) -> list[Pair]:
    """Pairs from the balanced implicit prompts of a cue, checked to be of equal length by the model's own tokenizer.

    `context`: the question after a phrase that settles the sense `clean` (default: the concept's group sense) against the same question
    after a phrase for `corrupt` (default: its other sense); a control may stand for a sense. `contexts` gives phrases by sense, the k-th of
    one paired with the k-th of the other, with {x} and {y} for the options in the question's order or {marked} and {unmarked}; default: the
    concept's steering phrases. `identifiers`: the question with the marked option first against the same with the unmarked one first.

    Marks, beside those of the question: `identifiers` (all mentions in the question); with a context also `context` (the whole phrase),
    `context_marked`, `context_unmarked`, `context_identifiers` and `all_identifiers`.

    Errors: PatchError for an unknown swap, phrases that do not pair up, or a pair of unequal length; ConceptError for an unknown sense.
    """
    if swap not in SWAPS:
        raise PatchError(f"unknown swap {swap!r}. Known: {', '.join(SWAPS)}.")
    prompts = implicit_prompts(concept, cue, seed=seed, categories=categories, max_word_pairs=max_word_pairs)
    if swap == "identifiers":
        pairs = list(_swapped_options(concept, prompts))
    else:
        group, other = concept.both_senses(cue)
        senses = (clean or group.name, corrupt or other.name)
        pairs = list(_swapped_contexts(model, concept, prompts, senses, contexts or {}))
    model.check_known([prompt for pair in pairs for prompt in (pair.clean, pair.corrupt)])
    _check_lengths(model, pairs)
    return pairs


def _swapped_options(concept: Concept, prompts: Sequence[Prompt]) -> Iterator[Pair]:
    """Each question with the marked option first, and its twin with the options the other way round."""
    def key(prompt: Prompt) -> tuple[str, ...]:
        return tuple(prompt.labels[name] for name in ("category", "template", "word_order", "word_pair"))

    twins = {key(prompt): prompt for prompt in prompts if prompt.labels["option_order"] == "unmarked_first"}
    for prompt in prompts:
        if prompt.labels["option_order"] == "marked_first":
            labels = {**prompt.labels, "option_order": "swapped", "swap": "identifiers"}
            yield Pair(_with_identifiers(prompt), _with_identifiers(twins[key(prompt)]), assignments(concept, prompt),
                       labels | {"pair": "|".join(("identifiers", *key(prompt)))})


def _swapped_contexts(model: HookedModel, concept: Concept, prompts: Sequence[Prompt], senses: tuple[str, str], given: Contexts
                      ) -> Iterator[Pair]:
    phrases = {sense: _phrases(concept, sense, given) for sense in (*senses, *concept.controls)}
    clean, corrupt = (phrases[sense] for sense in senses)
    if len(clean) != len(corrupt) or not clean:
        raise PatchError(f"{len(clean)} phrases for {senses[0]!r} and {len(corrupt)} for {senses[1]!r}: give contexts= with as many for "
                         "each, the k-th of one to be compared with the k-th of the other.")
    controls = [phrase for control in concept.controls if control not in senses for phrase in phrases[control]]
    for prompt in prompts:
        for k, both in enumerate(zip(clean, corrupt, strict=True)):
            first, second = (_in_context(prompt, phrase) for phrase in both)
            others = {"clean_sense": clean[k + 1 :] + clean[:k], "corrupt_sense": corrupt[k + 1 :] + corrupt[:k],
                      "control_phrase": controls}
            key = [prompt.labels[name] for name in ("category", "template", "option_order", "word_order", "word_pair")]
            labels = {**prompt.labels, "swap": "context", "clean_sense": senses[0], "corrupt_sense": senses[1],
                      "clean_phrase": both[0].strip(), "corrupt_phrase": both[1].strip(), "pair": "|".join(("context", *both, *key))}
            yield Pair(first, second, assignments(concept, prompt), labels, _references(model, prompt, first, others))


def _phrases(concept: Concept, sense: str, given: Contexts) -> list[str]:
    """The phrases of a sense or control, each ready to stand before a question."""
    found = list(given[sense]) if sense in given else [f"{concept.steering_phrase(sense)}."]
    return [phrase if phrase[-1:].isspace() else f"{phrase} " for phrase in found]


def _references(model: HookedModel, prompt: Prompt, like: Prompt, others: Mapping[str, Sequence[str]]) -> dict[str, Prompt]:
    """For each kind of reference the first phrase that makes a prompt as long as `like`; none where there is none."""
    found: dict[str, Prompt] = {}
    for kind, phrases in others.items():
        prompts = [_in_context(prompt, phrase) for phrase in phrases]
        length, *lengths = (len(item.ids) for item in model.encode([like, *prompts]))
        fitting = [candidate for candidate, n in zip(prompts, lengths, strict=True) if n == length]
        found |= {kind: fitting[0]} if fitting else {}
    return found


def _in_context(prompt: Prompt, phrase: str) -> Prompt:
    """A question after a phrase that names its identifiers."""
    first, second = option_roles(prompt)
    roles = {"x": first, "y": second, "marked": "marked", "unmarked": "unmarked"}
    context = fill(phrase, {name: prompt.labels[role] for name, role in roles.items()}, {n: f"context_{r}" for n, r in roles.items()})
    question = _with_identifiers(prompt.prefixed(context.text))
    mentions = tuple(sorted(span for spans in context.marks.values() for span in spans))
    if not mentions:
        raise PatchError(f"the context {phrase!r} names no identifier: give it {{x}} and {{y}}, or {{marked}} and {{unmarked}}.")
    marks = {**question.marks, **context.marks, "context": (Span(0, len(context.text.rstrip())),), "context_identifiers": mentions,
             "all_identifiers": mentions + question.marks["identifiers"]}
    return replace(question, marks=marks)


def _with_identifiers(prompt: Prompt) -> Prompt:
    return replace(prompt, marks={**prompt.marks, "identifiers": tuple(sorted(prompt.spans("marked") + prompt.spans("unmarked")))})


def _check_lengths(model: HookedModel, pairs: Sequence[Pair]) -> None:
    encoded = model.encode([prompt for pair in pairs for prompt in (pair.clean, pair.corrupt)])
    for clean, corrupt in zip(encoded[::2], encoded[1::2], strict=True):
        if len(clean.ids) != len(corrupt.ids):
            raise PatchError(f"{clean.prompt.text!r} is {len(clean.ids)} tokens and {corrupt.prompt.text!r} is {len(corrupt.ids)} to the "
                             f"tokenizer of {model.spec.name}: position by position they cannot be compared. Give phrases of equal length "
                             "(contexts=), or another cue.")
