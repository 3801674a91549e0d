"""Where readings are taken from: the identifiers of the implicit prompts, and the controls that every instrument is held against.

All instruments read the same residual streams under the same item identity, so that their rows can be laid side by side. Controls, by name
in the column `control` (empty for the reading itself):

`random`        a random vector of the same norm, for every source and layer;
`wrong_token`   the token before the identifier, in the same prompt;
`anchor_group`, `anchor_other`   unambiguous words of either sense in the identifiers' place;
`text`          the source's text alone, asked in plain words without any patch (instruments that ask a question; layer -1).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignblind_mi.borders.settings import AnyLayers, Count, Mentions, Names, Seed, many, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.models.edits import Site, Stream, random_like
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.tokens import unknown_words
from alignblind_mi.stimuli.concept import Concept, ConceptError, Cue
from alignblind_mi.stimuli.prompts import Prompt, PromptError, Span, fill, filled, implicit_prompts, option_roles
from alignblind_mi.stimuli.protocol import PROTOCOLS, ProtocolName

CONTROLS = ("random", "wrong_token", "anchor_group", "anchor_other", "text")
NEGATIVE_CONTROLS = ("random", "wrong_token")    # what an identifier's reading must differ from
TEXT_LAYER = -1
LEAST_SENTENCES = 4    # of each sense that an instrument is tried on
_BEFORE = "before_identifier"
_WORD_LABELS = ("category", "positive", "negative", "word_pair", "word_order")


class UntriedError(ModelError):
    """Too few sentences whose words the tokenizer knows: instruments cannot be tried on this model."""


@dataclass(frozen=True)
class Source:
    """An identifier token of a bias prompt (or a control in its place): `mention` counts its occurrences from 0."""

    __repr__ = one_line

    prompt: Prompt
    role: str
    mention: int
    control: str = ""

    @property
    def span(self) -> Span:
        """Where the identifier stands. Errors: PromptError for a mention that the prompt has not."""
        spans = self.prompt.spans(self.role)
        if not -len(spans) <= self.mention < len(spans):
            raise PromptError(f"mention {self.mention} does not exist: the prompts name each identifier {len(spans)} times, counted from 0 "
                              "(or from -1 at the end).")
        return spans[self.mention]

    def seen(self) -> str:
        """All the text that a causal model has read at this token: sources that share it are one reading."""
        return self.prompt.text[: self.span.end]

    def labels(self) -> dict[str, object]:
        """The columns that identify a reading; word labels are empty where the words have not been read yet."""
        labels: dict[str, object] = dict(self.prompt.labels)
        words = [self.prompt.marks[name][0].start for name in ("positive", "negative") if self.prompt.marks.get(name)]
        if len(words) < 2 or self.span.start < max(words):
            labels |= dict.fromkeys(_WORD_LABELS, "")
        context = "|".join(str(labels[name]) for name in ("template", "option_order", "word_order", "word_pair"))
        return {**labels, "mark": self.role, "identifier": self.prompt.labels[self.role], "mention": self.mention, "context": context,
                "control": self.control}

    def site(self, layer: int, stream: Stream = "resid_post") -> Site:
        """The place of a layer that is read."""
        if self.control == "wrong_token":
            return Site(layer, _BEFORE, stream)
        return Site(layer, self.role, stream, occurrence=self.mention)


@dataclass(frozen=True, eq=False)
class Recorded:
    """Residual streams of sources at `layers` of a stream, under the model's treatment. Random controls have been made from the sources'
    own."""

    __repr__ = one_line

    model: HookedModel
    sources: list[Source]
    layers: list[int]
    resid: Float[Tensor, "source layer d_model"]
    stream: Stream = "resid_post"


@takes(ConceptError)
def reading_sources(concept: Concept, cue: str | Cue, *, mentions: Mentions | None = None, max_word_pairs: Count | None = 20,
                    protocol: ProtocolName = "best", seed: Seed = 0) -> list[Source]:
    """One source per distinct context, of the design and the mentions (default: the first, or all) of a protocol.

    At the first mention a causal model has seen the question's beginning only, so prompts that share it are one source. Later mentions
    follow the words; `max_word_pairs` per category bounds them.
    """
    how = PROTOCOLS[protocol]
    prompts = [prompt.prefixed(how.lead) for prompt in implicit_prompts(
        concept, cue, design="published" if how.as_published else "balanced", seed=seed, max_word_pairs=max_word_pairs)]
    first = 1 if not how.every_mention else None
    return _distinct(Source(prompt, role, mention) for prompt in prompts for role in ("marked", "unmarked")
                     for mention in (range(len(prompt.spans(role)))[:first] if mentions is None else many(mentions)))


def _distinct(sources: Iterator[Source]) -> list[Source]:
    chosen: dict[str, Source] = {}
    for source in sources:
        chosen.setdefault(source.seen(), source)
    return list(chosen.values())


@takes(ConceptError)
def control_sources(concept: Concept, sources: Sequence[Source], controls: Names, *, seed: Seed = 0) -> list[Source]:
    """The sources of the controls that are asked for, as many of each as there are sources (`random` and `text` share their prompts).

    Errors: ConceptError for an unknown control, or an anchor of a sense without unambiguous words.
    """
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise ConceptError(f"unknown control {unknown[0]!r}. Known: {', '.join(CONTROLS)}.")
    out: list[Source] = []
    for name in controls:
        if name.startswith("anchor"):
            group, other = concept.both_senses()
            out += _anchors(concept, group.name if name == "anchor_group" else other.name, name, sources, seed)
        elif name == "wrong_token":
            out += [_before(source) for source in sources]
        else:
            out += [replace(source, control=name) for source in sources]
    return out


def possible_controls(concept: Concept) -> list[str]:
    """The controls that a concept has what is needed for: an anchor needs two unambiguous words of its sense."""
    anchors = dict(zip(("anchor_group", "anchor_other"), concept.both_senses(), strict=True))
    return [name for name in CONTROLS if name not in anchors or len(anchors[name].words) >= 2]


def _before(source: Source) -> Source:
    """The word before an identifier, marked."""
    end = len(source.prompt.text[: source.span.start].rstrip())
    if not end:
        raise ConceptError(f"nothing stands before the identifier in {source.prompt.text!r}: the control 'wrong_token' has no word.")
    start = max(source.prompt.text.rfind(" ", 0, end), source.prompt.text.rfind("\n", 0, end)) + 1
    prompt = replace(source.prompt, marks={**source.prompt.marks, _BEFORE: (Span(start, end),)})
    return replace(source, prompt=prompt, control="wrong_token")


def _anchors(concept: Concept, sense: str, control: str, sources: Sequence[Source], seed: int) -> list[Source]:
    """The sources' prompts with two unambiguous words of a sense for the identifiers; which two is drawn for each context."""
    words = concept.senses[sense].words
    if len(words) < 2:
        raise ConceptError(f"the sense {sense!r} of {concept.name!r} has {len(words)} unambiguous words; an anchor needs two.")
    out = []
    for i, source in enumerate(sources):
        marked, unmarked = random.Random(f"{seed}|{sense}|{i}").sample(words, 2)
        out.append(replace(source, prompt=_renamed(source.prompt, {"marked": marked, "unmarked": unmarked}), control=control))
    return out


def _renamed(prompt: Prompt, names: dict[str, str]) -> Prompt:
    """The prompt with other words at some of its marks, all marks moved along."""
    spans = sorted((span, mark) for mark in prompt.marks for span in prompt.marks[mark])
    edges = [0, *(edge for span, _ in spans for edge in (span.start, span.end)), len(prompt.text)]
    text, marks = "", dict[str, tuple[Span, ...]]()
    for i, (start, end) in enumerate(pairwise(edges)):
        if i % 2 == 0:
            text += prompt.text[start:end]
            continue
        mark = spans[i // 2][1]
        word = names.get(mark, prompt.text[start:end])
        marks[mark] = (*marks.get(mark, ()), Span(len(text), len(text) + len(word)))
        text += word
    return replace(prompt, text=text, marks=marks, labels={**prompt.labels, **names})


@takes(ConceptError)
def record_sources(model: HookedModel, concept: Concept, cue: str | Cue, *, mentions: Mentions | None = None,
                   layers: AnyLayers | None = None, max_word_pairs: Count | None = 20, controls: Names = (),
                   protocol: ProtocolName = "best", seed: Seed = 0) -> Recorded:
    """The residual streams that every instrument reads, once for all of them; `protocol` "paper" is of open readings alone.

    Errors: ConceptError for a concept, or a cue of it, without senses; EditError for a layer that does not exist; ModelError if the
    tokenizer does not know an identifier.
    """
    concept.both_senses(cue)
    layers = list(range(model.n_layers)) if layers is None else list(many(layers))
    stream = PROTOCOLS[protocol].read_stream
    sources = reading_sources(concept, cue, mentions=mentions, max_word_pairs=max_word_pairs, protocol=protocol, seed=seed)
    every = [*sources, *control_sources(concept, sources, controls, seed=seed)]
    model.check_known([source.prompt for source in every])
    resid = _record(model, every, layers, stream)
    for i, source in enumerate(every):
        if source.control == "random":
            resid[i] = random_like(resid[i], f"{seed}|{source.seen()}")
    return Recorded(model, every, layers, resid, stream)


def _record(model: HookedModel, sources: Sequence[Source], layers: Sequence[int], stream: Stream = "resid_post"
            ) -> Float[Tensor, "source layer d_model"]:
    """Sources of one kind are recorded together."""
    out = torch.empty(len(sources), len(layers), model.d_model)
    kinds: dict[tuple[Site, ...], list[int]] = {}
    for i, source in enumerate(sources):
        kinds.setdefault(tuple(source.site(layer, stream) for layer in layers), []).append(i)
    for sites, index in kinds.items():
        out[index] = model.record(model.rows([sources[i].prompt for i in index]), list(sites))
    return out


@dataclass(frozen=True, eq=False)
class Contexts:
    """Residual streams at identifiers of prompts after a sentence that settles their sense; `labels`: is it the other sense?"""

    __repr__ = one_line

    recorded: Recorded
    labels: Bool[np.ndarray, " vector"]
    sentences: list[str]

    @property
    def resid(self) -> Float[Tensor, "vector layer d_model"]:
        """The residual streams."""
        return self.recorded.resid

    def once(self) -> "Contexts":
        """One place of each sentence alone: its first."""
        kept = [self.sentences.index(sentence) for sentence in dict.fromkeys(self.sentences)]
        read = self.recorded
        return Contexts(replace(read, sources=[read.sources[i] for i in kept], resid=read.resid[kept]), self.labels[kept],
                        [self.sentences[i] for i in kept])

    @property
    def by_sentence(self) -> dict[str, bool]:
        """Each sentence once, and whether it settles the other sense."""
        return {sentence: bool(label) for sentence, label in zip(self.sentences, self.labels, strict=True)}


def record_contexts(model: HookedModel, concept: Concept, cue: str | Cue, layers: Sequence[int], split: str, *,
                    mentions: Sequence[int] = (0,)) -> Contexts:
    """The same places as the readings' (mentions in the implicit prompts), with each of the concept's `split` sentences before them.

    `split` is "train", "test" or "settled" ("test" where there are none). The prompts are cut off after the identifier.

    Errors: ConceptError without contexts for both senses.
    """
    found = _context_sources(concept, cue, split, mentions)
    model.check_known([source.prompt for source, _, _ in found])
    labels = np.array([sense == concept.other_sense for _, sense, _ in found])
    sources = [source for source, _, _ in found]
    return Contexts(Recorded(model, sources, list(layers), _record(model, sources, layers)), labels, [sentence for _, _, sentence in found])


def record_sentences(model: HookedModel, concept: Concept, cue: str | Cue, layers: Sequence[int], split: str, *, seed: int = 0) -> Contexts:
    """The identifiers inside each of the concept's `split` sentences (see `record_contexts`), which say which sense is meant.

    The k-th sentences of both senses name the same identifiers in the same order. Sentences whose words the tokenizer does not know are
    left out. Errors: ConceptError without contexts for both senses; UntriedError where fewer than `LEAST_SENTENCES` of a sense are
    left.
    """
    found = _sentence_sources(concept, cue, split, seed)
    spelt = [not unknown_words(model.tokenizer, item) for item in model.encode([source.prompt for source, _, _ in found])]
    found = [one for one, known in zip(found, spelt, strict=True) if known]
    left = [len({sentence for _, label, sentence in found if label == side}) for side in (False, True)]
    if min(left) < LEAST_SENTENCES:
        group, other = concept.both_senses(cue)
        raise UntriedError(f"the tokenizer of {model.spec.name} knows the words of {left[0]} and {left[1]} of the sentences that settle "
                           f"the senses {group.name} and {other.name}: at least {LEAST_SENTENCES} of each are needed to try an "
                           "instrument on.")
    sources = [source for source, _, _ in found]
    return Contexts(Recorded(model, sources, list(layers), _record(model, sources, layers)), np.array([label for _, label, _ in found]),
                    [sentence for _, _, sentence in found])


def _sentence_sources(concept: Concept, cue: str | Cue, split: str, seed: int) -> list[tuple[Source, bool, str]]:
    named, found = concept.cue(cue) if isinstance(cue, str) else cue, list[tuple[Source, bool, str]]()
    for sense in concept.both_senses(cue):
        for k, sentence in enumerate(_sentences(concept, sense.name, split)):
            marked, unmarked = named.identifiers(f"{split}|{k}", seed)
            order = ("marked", "unmarked") if k % 2 == 0 else ("unmarked", "marked")
            by_role = {"marked": marked, "unmarked": unmarked}
            roles = dict(zip("xy", order, strict=True))
            prompt = fill(sentence, {field: by_role[role] for field, role in roles.items()}, roles)
            labels = {"concept": concept.name, "cue": named.name, "template": sentence, "option_order": f"{order[0]}_first", **by_role,
                      **dict.fromkeys(_WORD_LABELS, "")}
            found += [(Source(replace(prompt, labels=labels), role, 0), sense.name == concept.other_sense, sentence) for role in order]
    return found


def sentence_prompts(concept: Concept, cue: str | Cue, split: str, *, seed: int = 0) -> list[Prompt]:
    """The sentences that `record_sentences` reads, once for each identifier."""
    return [source.prompt for source, _, _ in _sentence_sources(concept, cue, split, seed)]


def context_prompts(concept: Concept, cue: str | Cue, split: str) -> list[Prompt]:
    """The prompts that `record_contexts` reads at first mentions."""
    return [source.prompt for source, _, _ in _context_sources(concept, cue, split, (0,))]


def _context_sources(concept: Concept, cue: str | Cue, split: str, mentions: Sequence[int]) -> list[tuple[Source, str, str]]:
    """(source, sense, sentence) of every sentence of a split before every source; worked examples are left out."""
    concept = replace(concept, worked={})
    cue = concept.cue(cue) if isinstance(cue, str) else cue
    return [(source, sense.name, sentence) for sense in concept.both_senses(cue)
            for sentence in _sentences(concept, sense.name, split) for source in _after(sentence, concept, cue, mentions)]


def _sentences(concept: Concept, sense: str, split: str) -> tuple[str, ...]:
    if split not in ("train", "test", "settled"):
        raise ConceptError(f"unknown split {split!r} of contexts. Known: train, test, settled.")
    if sense not in concept.contexts:
        raise ConceptError(f"the concept {concept.name!r} has no sentences that settle the sense {sense!r}: give [contexts.{sense}].")
    contexts = concept.contexts[sense]
    sentences: tuple[str, ...] = getattr(contexts, split) or contexts.test
    return sentences


def _after(sentence: str, concept: Concept, cue: Cue, mentions: Sequence[int]) -> list[Source]:
    """The sources of a cue's prompts after a sentence, cut off behind the identifier; its identifiers stand in the order of the prompt."""
    out = []
    for source in reading_sources(concept, replace(cue, prefix=""), mentions=mentions, max_word_pairs=1):
        names = source.prompt.labels
        first, second = option_roles(source.prompt)
        lead = filled(sentence, x=names[first], y=names[second]) + " "
        mentioned = source.prompt.spans(source.role)[: source.mention + 1]
        seen = Prompt(source.seen(), {source.role: mentioned}, names).prefixed(lead)
        out.append(replace(source, prompt=seen))
    return out


def thinned(layers: Sequence[int], most: int) -> list[int]:
    """At most `most` of some layers, evenly spaced, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int))
    return [int(layers[i]) for i in chosen]
