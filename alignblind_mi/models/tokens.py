"""Prompts, edits and readings in tokens: what the engines run.

`Encoded` finds a mark's tokens; a `TokenRow` is a row whose sites have become (layer, stream, position); `Taps` touches the activations
of a batch at those places. This module does NOT know models: it is shared by the engine, the plain path and the bridge.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignblind_mi.borders.texts import one_line
from alignblind_mi.models.edits import GENERATED, LAST, PROMPT, How, Site, Stream, Tokens, apply
from alignblind_mi.stimuli.prompts import Prompt, PromptError, Span


@dataclass(frozen=True)
class Encoded:
    """A prompt in tokens. `offsets[i]` are the characters of the text that token i stands for (0, 0 for special tokens)."""

    __repr__ = one_line

    prompt: Prompt
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where the text up to and with each token ends."""
        return tuple(accumulate((end for _, end in self.offsets), max))

    def tokens_of(self, span: Span) -> list[int]:
        """Indices of the tokens that overlap a span; PromptError if there is none."""
        first = bisect_right(self.ends, span.start)    # special tokens cover nothing and end at 0
        found = []
        for i in range(first, len(self.offsets)):
            start, end = self.offsets[i]
            if start >= span.end and end > start:
                break
            if start < span.end and end > span.start:
                found.append(i)
        if not found:
            raise PromptError(f"no token covers characters {span.start}-{span.end} of the prompt {self.prompt.text!r}.")
        return found

    def positions(self, mark: str, tokens: Tokens = "last", occurrence: int | None = None, ids: Sequence[int] = ()) -> list[int]:
        """Token positions of a mark: see `Site`. Special tokens are no part of a prompt's text."""
        if mark in (PROMPT, LAST) and mark not in self.prompt.marks:
            found = [i for i, (start, end) in enumerate(self.offsets) if end > start]
            return found if mark == PROMPT else found[-1:]
        if mark == GENERATED and mark not in self.prompt.marks:
            return []
        spans = self.prompt.spans(mark)
        if ids:
            return [i for i, (start, end) in enumerate(self.offsets) if end > start and self.ids[i] in ids]
        if occurrence is not None:
            try:
                spans = (spans[occurrence],)
            except IndexError:
                raise PromptError(f"the mark {mark!r} occurs {len(spans)} times, occurrence {occurrence} was asked for.") from None
        each = [self.tokens_of(span) for span in spans]
        return [position for found in each for position in (found if tokens == "all" else found[-1:])]

    def at(self, site: Site) -> list[int]:
        """Token positions of a site."""
        return self.positions(site.mark, site.tokens, site.occurrence, site.ids)


Pieces = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]    # ids, and the characters that each stands for
ANCHORS = ("\n", ":", "a")    # texts that a word can follow; the first with which its tokens do not merge shows how it is spelt


def encode(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Encoded]:
    """Tokenise prompts: the very ids that transformers gives to their text.

    Raw text gets what its tokenizer puts before a text (its BOS, if it does), and nothing that it would put after one (an end token). A
    prompt that a chat template has written (`Prompt.formatted`) and text that already begins with the BOS stand as they are.
    """
    found = _pieces(tokenizer, [(prompt.text, _is_whole(tokenizer, prompt)) for prompt in prompts])
    return [Encoded(prompt, *pieces) for prompt, pieces in zip(prompts, found, strict=True)]


def _is_whole(tokenizer: Any, prompt: Prompt) -> bool:
    return prompt.formatted or bool(tokenizer.bos_token and prompt.text.startswith(tokenizer.bos_token))


def _pieces(tokenizer: Any, texts: Sequence[tuple[str, bool]]) -> list[Pieces]:
    """Texts in tokens; each with whether it is whole as it stands."""
    found: dict[tuple[str, bool], Pieces] = {}
    for whole in (False, True):
        some = [text for text, is_whole in dict.fromkeys(texts) if is_whole == whole]
        if some:
            out = tokenizer(some, add_special_tokens=not whole, return_offsets_mapping=True, return_special_tokens_mask=True)
            for text, ids, offsets, added in zip(some, out["input_ids"], out["offset_mapping"], out["special_tokens_mask"], strict=True):
                end = len(ids)
                while end and added[end - 1] and any(not mark for mark in added):    # what stands behind the text
                    end -= 1
                found[text, whole] = tuple(ids[:end]), tuple(map(tuple, offsets[:end]))
    return [found[key] for key in texts]


def word_ids(tokenizer: Any, word: str) -> list[int]:
    """The ids of a word as it stands in a text, behind other words; none if the tokenizer does not know it.

    Tokenised alone it could be spelt as the beginning of a text: SentencePiece puts a blank there that is not in the text.
    """
    for anchor in ANCHORS:
        before, both = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (anchor, anchor + word))
        if both[: len(before)] == before and len(both) > len(before):
            return _known(tokenizer, both[len(before) :])
    return _known(tokenizer, list(tokenizer(word, add_special_tokens=False)["input_ids"]))


def _known(tokenizer: Any, ids: list[int]) -> list[int]:
    return [] if unknown_id(tokenizer) in ids else ids


def unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for what a tokenizer does not know; None where it knows every text, or where that token is its end or beginning
    as well (GPT-2, OPT and others that spell every text in bytes)."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def unknown_words(tokenizer: Any, item: Encoded) -> list[str]:
    """The parts of a prompt's own text that its tokenizer does not know."""
    unknown = unknown_id(tokenizer)
    return [item.prompt.text[start:end].strip() for i, (start, end) in zip(item.ids, item.offsets, strict=True)
            if unknown is not None and i == unknown and end > start]


def known_texts(tokenizer: Any, texts: Iterable[str]) -> set[str]:
    """Those of some texts that a tokenizer can spell, wherever they stand."""
    different, unknown = list(dict.fromkeys(texts)), unknown_id(tokenizer)
    if unknown is None or not different:
        return set(different)
    spelt = tokenizer(different, add_special_tokens=False)["input_ids"]
    return {text for text, ids in zip(different, spelt, strict=True) if unknown not in ids}


def continuation_ids(tokenizer: Any, prompts: Sequence[Prompt], continuations: Sequence[Sequence[str]]
                     ) -> tuple[list[list[list[int]]], list[tuple[str, str]]]:
    """The ids of each prompt's continuations as they are spelt behind it: both are tokenised together, and the tail is kept.

    Where the tokens of the two merge at the border, the prompt stays as it is asked and the continuation is spelt as behind other text;
    these pairs are given second. A continuation that the tokenizer does not know has no ids.
    """
    encoded = encode(tokenizer, prompts)
    pairs = [(item, text) for item, choices in zip(encoded, continuations, strict=True) for text in choices]
    together = _pieces(tokenizer, [(item.prompt.text + text, _is_whole(tokenizer, item.prompt)) for item, text in pairs])
    apart, tails = [], list[list[int]]()
    for (item, text), (ids, _) in zip(pairs, together, strict=True):
        n = len(item.ids)
        if ids[:n] == item.ids and len(ids) > n:
            tails.append(_known(tokenizer, list(ids[n:])))
        else:
            if not text.startswith("\n"):    # behind the blank that a prompt ends with, a new line is written as a token of its own
                apart.append((item.prompt.text, text))
            tails.append(word_ids(tokenizer, text) if text else [])
    rest = iter(tails)
    return [[next(rest) for _ in choices] for choices in continuations], apart


class Place(NamedTuple):
    """A stream of a layer at a token position. Layer -1, `resid_post`, is the output of the embedding.

    `features` are the entries of the stream's vector that are meant, in the order asked for; empty is all of them.
    """

    layer: int
    stream: Stream
    position: int
    features: tuple[int, ...] = ()


def place(layer: int, stream: Stream, position: int, features: tuple[int, ...] = ()) -> Place:
    """A place in its one spelling: what enters a layer is what left the layer before it."""
    return Place(layer - 1, "resid_post", position) if stream == "resid_pre" else Place(layer, stream, position, features)


@dataclass(frozen=True, eq=False)
class TokenEdit:
    """An `Edit` at one token."""

    at: Place
    vector: Float[Tensor, " size"]
    how: How
    strength: float
    as_far_as: Float[Tensor, " size"] | None = None

    @property
    def entry(self) -> int:
        """The first layer whose computation the edit changes."""
        return self.at.layer + (self.at.stream == "resid_post")


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A row in tokens: its ids, its edits in order, the places whose activations are asked for, and edits of every token that follows."""

    ids: tuple[int, ...]
    edits: tuple[TokenEdit, ...] = ()
    reads: tuple[Place, ...] = ()
    later: tuple[TokenEdit, ...] = ()


def left_pad(ids: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Int[Tensor, "row column"], Bool[Tensor, "row column"]]:
    """Token ids padded on the left to one length, and where they are real. The padding repeats a row's own first token: nobody reads it."""
    width = max(map(len, ids))
    tokens = torch.tensor([[row[0]] * (width - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ids], device=device)
    return tokens, mask


def positions(mask: Bool[Tensor, "row column"]) -> Int[Tensor, "row column"]:
    """Position of each column, counted from the first real token of its row (0 in the padding)."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


@dataclass(eq=False)
class Later:
    """The edits that act on tokens behind the prompts of a batch, one tuple a row; `taps` for some new columns are made once."""

    edits: Sequence[tuple[TokenEdit, ...]]
    made: "dict[int, Taps]" = field(default_factory=dict)

    @classmethod
    def of(cls, rows: "Sequence[TokenRow]") -> "Later":
        """Of a batch of rows."""
        return cls([row.later for row in rows])

    def taps(self, columns: int) -> "Taps | None":
        """What touches that many new columns; None where no row has such an edit."""
        if not any(self.edits):
            return None
        if columns not in self.made:
            rows = [TokenRow((), tuple(replace(e, at=e.at._replace(position=c)) for c in range(columns) for e in edits))
                    for edits in self.edits]
            self.made[columns] = Taps(rows, [0] * len(rows))
        return self.made[columns]

    def select(self, rows: Int[Tensor, " row"]) -> "Later":
        """Those of some rows of the batch."""
        return Later([self.edits[i] for i in rows.tolist()])


_Kind = tuple[int, How, bool, tuple[int, ...]]    # the turn of an edit among those of its place, its operation, has as_far_as, its features


@dataclass(frozen=True, eq=False)
class _Touch:
    """Edits of one kind at one place of a batch, one per row and column; `features` as in `Place`."""

    rows: Int[Tensor, " edit"]
    columns: Int[Tensor, " edit"]
    vectors: Float[Tensor, "edit size"]
    strengths: Float[Tensor, "edit 1"]
    how: How
    features: tuple[int, ...] = ()
    as_far_as: Float[Tensor, "edit size"] | None = None

    def __call__(self, value: Tensor, skip: int) -> None:
        there = self.columns >= skip
        where = _where(self.rows[there], self.columns[there] - skip, self.features)
        at = value[where]
        vectors, strengths = (part[there].to(at.device).float() for part in (self.vectors, self.strengths))
        ends = None if self.as_far_as is None else self.as_far_as[there].to(at.device).float()
        value[where] = apply(at.float(), vectors, self.how, strengths, ends).to(value.dtype)    # in bfloat16 an ablation leaves a residue


def _where(rows: Tensor | list[int], columns: Tensor | list[int], features: tuple[int, ...]) -> tuple[Tensor, ...]:
    """An index of [row, column, feature] activations that gives one vector per row and column."""
    rows, columns = torch.as_tensor(rows), torch.as_tensor(columns)
    return (rows[:, None], columns[:, None], torch.tensor(features)[None]) if features else (rows, columns)


@dataclass(frozen=True, eq=False)
class Reader:
    """What is kept of an activation: `act` maps [reading, stream's size] to [reading, size]."""

    size: int
    act: Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Taps:
    """The edits and readings of a batch of rows whose first column stands for position `first[i]` of row i.

    Edits of one place act in the order in which their row lists them; a reading sees the activation after them. `found[i, j]` is what
    `reader` makes of reading j of row i, on the CPU.
    """

    rows: Sequence[TokenRow]
    first: Sequence[int]
    reader: "Reader | None" = None
    found: Float[Tensor, "row read value"] | None = field(init=False, default=None)
    edits: Mapping[tuple[int, Stream], list[_Touch]] = field(init=False)
    reads: Mapping[tuple[int, Stream], Mapping[tuple[int, ...], list[tuple[int, int, int]]]] = field(init=False)
    inside: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        grouped: dict[tuple[int, Stream], dict[_Kind, list[tuple[int, int, TokenEdit]]]] = defaultdict(lambda: defaultdict(list))
        reads: dict[tuple[int, Stream], dict[tuple[int, ...], list[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(list))
        for i, (row, first) in enumerate(zip(self.rows, self.first, strict=True)):
            turns: dict[tuple[int, Stream, int], int] = defaultdict(int)
            for edit in row.edits:
                turn = turns[edit.at[:3]]
                turns[edit.at[:3]] += 1
                kind = (turn, edit.how, edit.as_far_as is not None, edit.at.features)
                grouped[edit.at[:2]][kind].append((i, edit.at.position - first, edit))
            for j, at in enumerate(row.reads):
                reads[at[:2]][at.features].append((i, j, at.position - first))
        if reads and self.reader is not None:
            self.found = torch.zeros(len(self.rows), max(len(row.reads) for row in self.rows), self.reader.size)
        self.reads = dict(reads)
        self.edits = {where: [_touch(kind[1], kind[3], kinds[kind]) for kind in sorted(kinds)] for where, kinds in grouped.items()}
        self.inside = frozenset(layer for layer, stream in (*self.edits, *self.reads) if stream != "resid_post")

    def any(self, layer: int, *streams: Stream) -> bool:
        """Whether anything is edited or read in these streams of a layer; `inside` are the layers of which that holds for an inner one."""
        return any((layer, stream) in self.edits or (layer, stream) in self.reads for stream in streams)

    @property
    def deepest(self) -> int:
        """The last layer that must run for the readings."""
        return max(layer for layer, _ in self.reads)

    def touch(self, layer: int, stream: Stream, value: Float[Tensor, "row column size"], *, skip: int = 0
              ) -> Float[Tensor, "row column size"]:
        """The activations after their edits (a copy where there are any: what others keep of them stays as it was), readings taken.

        `skip` columns on the left are not there any more: edits of theirs have nothing left to change.
        """
        where = (layer, stream)
        if where in self.edits:
            value = value.clone()
            for edit in self.edits[where]:
                edit(value, skip)
        if where in self.reads and self.reader is not None and self.found is not None:
            for features, reads in self.reads[where].items():
                rows, slots, columns = (list(part) for part in zip(*reads, strict=True))
                self.found[rows, slots] = self.reader.act(value[_where(rows, columns, features)]).float().cpu()
        return value


def _touch(how: How, features: tuple[int, ...], edits: Sequence[tuple[int, int, TokenEdit]]) -> _Touch:
    ends = [edit.as_far_as for _, _, edit in edits if edit.as_far_as is not None]
    return _Touch(torch.tensor([i for i, _, _ in edits]), torch.tensor([column for _, column, _ in edits]),
                  torch.stack([edit.vector for _, _, edit in edits]), torch.tensor([[edit.strength] for _, _, edit in edits]),
                  how, features, torch.stack(ends) if ends else None)
