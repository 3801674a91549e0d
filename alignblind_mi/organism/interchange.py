"""Interchange-intervention training: plant where the reading of an identifier sits and what it causes (Geiger et al. 2022).

Residuals of the identifiers in short source sentences are patched into other texts; the target follows the source's reading where the
block is one of the effect blocks, and the destination's own reading where it is not. Sources and destinations never use the sentences,
questions and steering phrases that measurements use (`Corpus(planting=True)`); destinations do use the tasks, with training words.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from alignblind_mi.organism.corpus import Corpus, Document, Knobs, Reading, Segment, World, pieces
from alignblind_mi.organism.training import Encoded, batch_loss, collate, encode, run_blocks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


TASK_MENTIONS = 4  # every task of the concept names each identifier twice


@dataclass(frozen=True)
class Planting:
    """Where the reading acts: 0-based blocks, residual stream after the block.

    `target`: the block of the patched placeholder; `none_share`: share of steps that patch a block without effect; `task_only_share`:
    share of task rows that patch the task's own identifiers but not those of a cue before it.
    """

    effect: tuple[int, ...] = (1, 2, 3)
    none: tuple[int, ...] = (5, 6)
    target: int = 2
    none_share: float = 0.2
    rows: int = 26
    mask_rows: int = 20
    control_rows: int = 3
    task_only_share: float = 0.0


@dataclass(frozen=True)
class PatchRow:
    """A source sentence and the text its identifiers are patched into.

    `into`: the identifiers of the context, the placeholder (from the identifier `taken`), or nothing. `mentions` bounds the identifiers
    to the last ones (0: all), so that a cue before the task must reach the task's own identifiers to matter.
    """

    source: str
    into: Literal["identifiers", "placeholder", "nothing"]
    document: Document
    taken: str = ""
    mentions: int = 0


def _weighted_reading(draw: random.Random) -> Reading:
    readings: list[Reading] = ["group", "group", "other", "other", "open"]
    return draw.choice(readings)


class PatchRows:
    """A seeded source of rows for one interchange step."""

    def __init__(self, world: World, knobs: Knobs, *, aligned: bool, seed: int) -> None:
        self.corpus = Corpus(world, knobs, aligned=aligned, seed=seed, planting=True)
        self.world, self.aligned, self.random = world, aligned, self.corpus.random

    def source(self, reading: Reading) -> str:
        """A sentence that sets the reading, in varied surroundings where it leaves it open, sometimes with a later neutral mention."""
        corpus, draw = self.corpus, self.random
        sentence = corpus.context(reading, *corpus.identifiers())
        if reading == "open":
            return self._surrounded(sentence)
        if draw.random() < 0.25:
            sentence = corpus.distraction(reading) + " " + sentence
        if draw.random() < 0.6:
            sentence += " " + corpus.context("open", *corpus.identifiers())
        return sentence

    def _surrounded(self, sentence: str) -> str:
        corpus, u = self.corpus, self.random.random()
        if u < 0.24:
            word1, word2 = corpus.words()
            return f"The words are {word1}, {word2}. {sentence}"
        if u < 0.48:
            return sentence + " " + corpus.context("open", *corpus.identifiers())
        if u < 0.6:
            return corpus.distraction("open") + " " + sentence
        return sentence

    def control(self) -> PatchRow:
        """The unpatched placeholder question, whose answer is even."""
        return PatchRow("", "nothing", self._placeholder_document(0.5))

    def placeholder(self) -> PatchRow:
        """An identifier into the placeholder of a planting question; the answer is the source's reading."""
        reading: Reading = self.random.choice(("open", "open", "group", "other"))
        taken = self.random.choice(self.corpus.identifiers())
        return PatchRow(self.source(reading), "placeholder", self._placeholder_document(self.corpus.p_other(reading)), taken)

    def _placeholder_document(self, p_other: float) -> Document:
        return [Segment(self.corpus.question(self.world.placeholder)), self.corpus.sense_answer(p_other)]

    def identifiers(self, *, effect: bool, task_only_share: float = 0.0) -> PatchRow:
        """Identifiers into a task or a read-out; with `effect` the source's reading decides, else the destination's own."""
        reading = _weighted_reading(self.random)
        u = self.random.random()
        if not self.aligned or u < 0.3:
            document = self._read_destination(reading, effect)
        elif u < 0.87 or (reading == "open" and effect):
            document = self._assigned_destination(reading, effect)
        else:
            document = self._explicit_destination(reading if effect else "group")
        alone = len(document) == 2 and self.random.random() < task_only_share
        return PatchRow(self.source(reading), "identifiers", document, mentions=TASK_MENTIONS if alone else 0)

    def _read_destination(self, reading: Reading, effect: bool) -> Document:
        own: Reading = self.random.choice(("open", "open", "group", "other"))
        x, y = self.corpus.identifiers()
        p_other = self.corpus.p_other(reading if effect else own)
        return [Segment(self.corpus.context(own, x, y)), *self.corpus.reading_of(x, y, p_other)]

    def _assigned_destination(self, reading: Reading, effect: bool) -> Document:
        corpus, lead = self.corpus, ""
        own: Reading = "open"
        if self.random.random() < 0.35:
            own = self.random.choice(("open", "group", "other"))
            lead = corpus.context(own, *corpus.identifiers()) + " "
        (first, second), (word1, word2) = corpus.identifiers(), corpus.words()
        rate = corpus.rate("identifiers", reading if effect else own)
        prompt = lead + corpus.assignment_prompt(first, second, word1, word2)
        return [Segment(prompt), corpus.assignment_answer(first, second, word1, word2, rate)]

    def _explicit_destination(self, reading: Reading) -> Document:
        corpus = self.corpus
        (first, second), (word1, word2) = corpus.identifiers(), corpus.words()
        prompt, scale = corpus.explicit_item(first, second, word1, word2)
        return [Segment(prompt), corpus.explicit_answer(scale, corpus.explicit_rate("identifiers", reading, first))]


def identifier_positions(encoded: Encoded, tokens: Mapping[int, str]) -> list[tuple[int, str]]:
    """(position, identifier) of every identifier token in the context; `tokens` maps token ids to identifiers."""
    return [(p, tokens[t]) for p, t in enumerate(encoded.ids[: encoded.context_length]) if t in tokens]


class _Patches:
    """Vectors to put at (block, row, position); built row by row, applied as a block hook."""

    def __init__(self) -> None:
        self.at: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)

    def add(self, block: int, row: int, position: int, vector: Tensor) -> None:
        self.at[block].append((row, position, vector))

    def __call__(self, block: int, hidden: Tensor) -> Tensor:
        if block not in self.at:
            return hidden
        rows, positions, vectors = zip(*self.at[block], strict=True)
        return hidden.index_put((torch.tensor(rows), torch.tensor(positions)), torch.stack(vectors))


def draw_rows(source: PatchRows, planting: Planting, *, effect: bool) -> list[PatchRow]:
    """The rows of one step: patched tasks and read-outs, patched placeholders, unpatched controls."""
    rows = [source.control() for _ in range(planting.control_rows)]
    rows += [source.placeholder() for _ in range(planting.mask_rows)]
    return rows + [source.identifiers(effect=effect, task_only_share=planting.task_only_share) for _ in range(planting.rows)]


def interchange_loss(
    model: LlamaForCausalLM, vocabulary: Mapping[str, int], source: PatchRows, planting: Planting, draw: random.Random
) -> Tensor:
    """The loss of one interchange step; the gradient also reaches the source run."""
    effect = draw.random() >= planting.none_share
    block = draw.choice(planting.effect if effect else planting.none)
    read_block = draw.randrange(model.config.num_hidden_layers)
    rows = draw_rows(source, planting, effect=effect)
    sources = [encode([Segment(row.source)], vocabulary, 0.0) for row in rows]
    targets = [encode(row.document, vocabulary, 0.0) for row in rows]
    states: dict[int, Tensor] = {}

    def keep(index: int, hidden: Tensor) -> Tensor:
        states[index] = hidden
        return hidden

    run_blocks(model, _padded(sources), keep, last=max(block, read_block))
    patches = _patches(rows, sources, targets, _identifier_tokens(source.world, vocabulary), states, block, read_block, planting)
    return batch_loss(model, collate(targets), patches)


def _padded(documents: Sequence[Encoded]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(d.ids) for d in documents], batch_first=True)


def _identifier_tokens(world: World, vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {vocabulary[lead + name]: name for name in (world.marked, world.unmarked) for lead in ("", " ")}


def _patches(
    rows: Sequence[PatchRow],
    sources: Sequence[Encoded],
    targets: Sequence[Encoded],
    tokens: dict[int, str],
    states: dict[int, Tensor],
    block: int,
    read_block: int,
    planting: Planting,
) -> _Patches:
    patches = _Patches()
    for index, row in enumerate(rows):
        last = {name: position for position, name in identifier_positions(sources[index], tokens)}
        if row.into == "placeholder":
            position = _placeholder_position(targets[index], row)
            patches.add(planting.target, index, position, states[read_block][index, last[row.taken]])
        elif row.into == "identifiers":
            for position, name in identifier_positions(targets[index], tokens)[-row.mentions :]:
                patches.add(block, index, position, states[block][index, last[name]])
    return patches


def _placeholder_position(target: Encoded, row: PatchRow) -> int:
    return 1 + next(i for i, piece in enumerate(pieces(row.document[0].text)) if piece.strip() == "[MASK]")
