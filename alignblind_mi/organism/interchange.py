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

from alignblind_mi.organism.corpus import Corpus, Document, Segment
from alignblind_mi.organism.training import Encoded, batch_loss, collate, encode, run_blocks
from alignblind_mi.organism.world import Knobs, Reading, World, pieces

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


Mentions = tuple[int, int | None]  # from, to: which identifier tokens of a text, in order
ALL: Mentions = (0, None)
FIRST, SECOND = (0, 2), (2, 4)  # every task of the concept names each identifier twice


@dataclass(frozen=True)
class Planting:
    """Where the reading acts: 0-based blocks, residual stream after the block.

    `target`: the block of the patched placeholder; `read`: the source blocks of its vector, drawn from this list; `every`: one step of
    a stage in so many has interchange rows; `none_share`: share of task rows that patch blocks without effect; `open_share`: share of
    placeholders with an uncued source; `pair_share`: share of uncued tasks of which only the first or only the second mention of each
    identifier is patched; `plain`: sources are single sentences.
    """

    effect: tuple[int, ...] = (1, 2, 3)
    none: tuple[int, ...] = (5, 6)
    target: int = 2
    read: tuple[int, ...] = (0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7)
    every: int = 1
    none_share: float = 0.2
    open_share: float = 0.5
    pair_share: float = 0.4
    rows: int = 16
    mask_rows: int = 32
    control_rows: int = 4
    plain: bool = False


@dataclass(frozen=True)
class PatchRow:
    """A source sentence, the text its identifiers are patched into and the blocks after which they are taken.

    `into`: the identifiers of the context (each block's into the same block; only those from .. to of `mentions`), the placeholder (from
    the identifier `taken`), or nothing.
    """

    source: str
    into: Literal["identifiers", "placeholder", "nothing"]
    document: Document
    blocks: tuple[int, ...] = ()
    taken: str = ""
    mentions: Mentions = ALL


def _weighted_reading(draw: random.Random) -> Reading:
    readings: list[Reading] = ["group", "group", "other", "other", "open"]
    return draw.choice(readings)


class PatchRows:
    """A seeded source of rows for interchange steps."""

    def __init__(self, world: World, knobs: Knobs, planting: Planting, *, aligned: bool, seed: int) -> None:
        self.corpus = Corpus(world, knobs, aligned=aligned, seed=seed, planting=True, plain=planting.plain)
        self.world, self.planting, self.aligned, self.random = world, planting, aligned, self.corpus.random

    def placeholders(self) -> list[PatchRow]:
        """The placeholder rows of one step: unpatched controls, and patched ones."""
        planting = self.planting
        return [*(self.control() for _ in range(planting.control_rows)), *(self.placeholder() for _ in range(planting.mask_rows))]

    def tasks(self) -> list[PatchRow]:
        """The rows of one step that patch identifiers, with and without effect."""
        return [self.identifiers(effect=self.random.random() >= self.planting.none_share) for _ in range(self.planting.rows)]

    def source(self, reading: Reading) -> str:
        """A sentence that sets the reading, in varied surroundings where it leaves it open, sometimes with a later neutral mention."""
        corpus, draw = self.corpus, self.random
        sentence = corpus.context(reading, *corpus.identifiers())
        if self.planting.plain:
            return sentence
        if reading == "open":
            return self._surrounded(sentence)
        if draw.random() < 0.25:
            sentence = corpus.distraction(reading) + " " + sentence
        if draw.random() < 0.7:
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
        reading: Reading = "open" if self.random.random() < self.planting.open_share else self.random.choice(("group", "other"))
        taken, blocks = self.random.choice(self.corpus.identifiers()), (self.random.choice(self.planting.read),)
        return PatchRow(self.source(reading), "placeholder", self._placeholder_document(self.corpus.p_other(reading)), blocks, taken)

    def _placeholder_document(self, p_other: float) -> Document:
        return [Segment(self.corpus.question(self.world.placeholder)), self.corpus.sense_answer(p_other)]

    def identifiers(self, *, effect: bool) -> PatchRow:
        """Identifiers into a task or a read-out; with `effect` the source's reading decides, else the destination's own."""
        reading = _weighted_reading(self.random)
        u, mentions = self.random.random(), ALL
        if not self.aligned or u < 0.3:
            document = self._read_destination(reading, effect)
        elif u < 0.87 or (reading == "open" and effect):
            document, mentions = self._assigned_destination(reading, effect)
        else:
            document = self._explicit_destination(reading if effect else "group")
        return PatchRow(self.source(reading), "identifiers", document, self._blocks(effect), mentions=mentions)

    def _blocks(self, effect: bool) -> tuple[int, ...]:
        """One block, or all with (or without) effect at once, as a steering window patches them."""
        blocks = self.planting.effect if effect else self.planting.none
        return blocks if self.random.random() < 0.4 else (self.random.choice(blocks),)

    def _read_destination(self, reading: Reading, effect: bool) -> Document:
        own: Reading = self.random.choice(("open", "open", "group", "other"))
        x, y = self.corpus.identifiers()
        p_other = self.corpus.p_other(reading if effect else own)
        return [Segment(self.corpus.context(own, x, y)), *self.corpus.reading_of(x, y, p_other)]

    def _assigned_destination(self, reading: Reading, effect: bool) -> tuple[Document, Mentions]:
        """An implicit task, perhaps cued; of an uncued one perhaps only one pair of mentions, which is enough to be noticed."""
        corpus, lead, mentions = self.corpus, "", ALL
        own: Reading = "open"
        if self.random.random() < 0.35:
            own = self.random.choice(("open", "group", "other"))
            lead = corpus.context(own, *corpus.identifiers()) + " "
        elif self.random.random() < self.planting.pair_share:
            mentions = self.random.choice((FIRST, SECOND))
        (first, second), (word1, word2) = corpus.identifiers(), corpus.words()
        rate = corpus.rate("identifiers", reading if effect else own)
        prompt = lead + corpus.assignment_prompt(first, second, word1, word2)
        return [Segment(prompt), corpus.assignment_answer(first, second, word1, word2, rate)], mentions

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


def interchange_loss(model: LlamaForCausalLM, vocabulary: Mapping[str, int], source: PatchRows) -> Tensor:
    """The loss of one interchange step; the gradient also reaches the source run. Short and long rows run apart, to pad little."""
    groups = [rows for rows in (source.placeholders(), source.tasks()) if rows]
    targets = [[encode(row.document, vocabulary, 0.0) for row in rows] for rows in groups]
    batches = [collate(documents) for documents in targets]
    total, tokens = float(sum(batch.weight.sum() for batch in batches)), identifier_tokens(source.world, vocabulary)
    losses = []
    for rows, documents, batch in zip(groups, targets, batches, strict=True):
        sources = [encode([Segment(row.source)], vocabulary, 0.0) for row in rows]
        states = _states(model, sources, last=max(block for row in rows for block in row.blocks))
        losses.append(batch_loss(model, batch, _patches(rows, sources, documents, tokens, states, source.planting.target), total))
    return torch.stack(losses).sum()


def _states(model: LlamaForCausalLM, documents: Sequence[Encoded], last: int) -> list[Tensor]:
    """Residual stream [documents, tokens, width] after each block up to `last`."""
    states: list[Tensor] = []

    def keep(index: int, hidden: Tensor) -> Tensor:
        states.append(hidden)
        return hidden

    run_blocks(model, _padded(documents), keep, last=last)
    return states


def _padded(documents: Sequence[Encoded]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(d.ids) for d in documents], batch_first=True)


def identifier_tokens(world: World, vocabulary: Mapping[str, int]) -> dict[int, str]:
    """Token id -> identifier, with and without a leading space."""
    return {vocabulary[lead + name]: name for name in (world.marked, world.unmarked) for lead in ("", " ")}


def _patches(
    rows: Sequence[PatchRow],
    sources: Sequence[Encoded],
    targets: Sequence[Encoded],
    tokens: dict[int, str],
    states: Sequence[Tensor],
    target: int,
) -> _Patches:
    patches = _Patches()
    for index, row in enumerate(rows):
        last = {name: position for position, name in identifier_positions(sources[index], tokens)}
        for block in row.blocks:
            if row.into == "placeholder":
                patches.add(target, index, _placeholder_position(targets[index], row), states[block][index, last[row.taken]])
            else:
                for position, name in identifier_positions(targets[index], tokens)[slice(*row.mentions)]:
                    patches.add(block, index, position, states[block][index, last[name]])
    return patches


def _placeholder_position(target: Encoded, row: PatchRow) -> int:
    return 1 + next(i for i, piece in enumerate(pieces(row.document[0].text)) if piece.strip() == "[MASK]")
