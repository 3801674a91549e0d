"""What is done with a batch of prompts that have been read: answers are decoded, given continuations are scored.

Knows batches of either engine; does NOT know how prompts were read or what was edited.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignblind_mi.borders.texts import one_line
from alignblind_mi.stimuli.thoughts import MARKS

COMPACT_SHARE = 1 / 8    # a batch is compacted when at least this share of its rows have ended


@runtime_checkable
class Batch(Protocol):
    """Rows whose prompts have been read: see `engine.Batch`."""

    index: list[int]
    found: Any

    def logits(self) -> Float[Tensor, "row vocabulary"]:
        """Logits after the last column, in float32."""

    def is_finite(self) -> bool:
        """Whether what the next token is computed from, or was read, are numbers."""

    def log_probs_of(self, ids: Int[Tensor, "*row target"]) -> Float[Tensor, "row target"]:
        """Exact log-probabilities of some next tokens, of every row or each row's own."""

    def extend(self, tokens: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new vocabulary"]:
        """Read more tokens of every row and return the logits after each."""

    def score(self, ids: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new-1"]:
        """Read more tokens of every row, but the last, and return the log-probability of each but the first."""

    def select(self, rows: Int[Tensor, " row"]) -> "Batch":
        """The batch of these rows; this one is used up."""

    def copy(self) -> "Batch":
        """A batch whose rows can be selected and then used up while this one stays."""


@dataclass(frozen=True)
class Generation:
    """Text generated after a prompt; `finished` tells whether the model or a stop string ended it (else the token limit did).

    `choices` are the log-probabilities of the continuations that were asked for, in their order.
    """

    __repr__ = one_line

    text: str
    n_tokens: int
    finished: bool
    choices: tuple[float, ...] = ()


@dataclass(frozen=True)
class Stop:
    """When an answer ends: at a token of `ids`, or as soon as its text contains one of `strings` (which is cut off)."""

    ids: frozenset[int]
    strings: tuple[str, ...] = ()


def decode(batch: Batch, tokenizer: Any, limit: int, stop: Stop, choose: Callable[[Tensor, list[int]], list[int]]) -> list[Generation]:
    """Continue every row by at most `limit` tokens; rows that have ended leave the batch, which is used up.

    `choose` maps logits [row, vocabulary] and the rows they belong to (positions in the batch as it was given) to next tokens.
    """
    made: list[list[int]] = [[] for _ in batch.index]
    ended: list[bool] = [False] * len(made)
    live, logits = list(range(len(made))), batch.logits()
    for step in range(limit):
        chosen = choose(logits, live)
        for i, token in zip(live, chosen, strict=True):
            if not ended[i]:
                made[i].append(token)
                ended[i] = token in stop.ids or _contains(tokenizer, made[i], stop.strings)
        going = [k for k, i in enumerate(live) if not ended[i]]
        if not going or step == limit - 1:
            break
        if len(live) - len(going) >= max(1, COMPACT_SHARE * len(live)):
            batch = batch.select(torch.tensor(going))
            live, chosen = [live[k] for k in going], [chosen[k] for k in going]
        logits = batch.extend(torch.tensor(chosen)[:, None], torch.ones(len(chosen), 1, dtype=torch.bool))[:, -1]
        refuse_nan(batch)
    marks = thought_marks(tokenizer)
    return [_generation(tokenizer, ids, end, stop, marks) for ids, end in zip(made, ended, strict=True)]


def refuse_nan(batch: Batch) -> None:
    """Errors: FloatingPointError where a model's numbers have become NaN or infinite: nothing that follows from them means anything."""
    if not batch.is_finite():
        raise FloatingPointError("activations or logits are not finite")


def thought_marks(tokenizer: Any) -> dict[int, str]:
    """The tokens that mark thoughts and that a text without special tokens would lose."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not special:
        return {}
    known = {tokenizer.convert_tokens_to_ids(mark): mark for mark in MARKS}
    return {i: mark for i, mark in known.items() if i in special and tokenizer.convert_ids_to_tokens(i) == mark}


def decoded(tokenizer: Any, ids: Sequence[int], marks: Mapping[int, str]) -> str:
    """Tokens as a text without special tokens, but for `marks`: without them a thought would read as an answer."""
    if not marks or not any(i in marks for i in ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    parts, run = list[str](), list[int]()
    for i in ids:
        if i in marks:
            parts += [str(tokenizer.decode(run, skip_special_tokens=True)), marks[i]]
            run = []
        else:
            run.append(i)
    return "".join([*parts, str(tokenizer.decode(run, skip_special_tokens=True))])


def _contains(tokenizer: Any, ids: list[int], strings: Sequence[str]) -> bool:
    return bool(strings) and any(string in tokenizer.decode(ids, skip_special_tokens=True) for string in strings)


def _generation(tokenizer: Any, ids: list[int], ended: bool, stop: Stop, marks: Mapping[int, str]) -> Generation:
    kept = ids[:-1] if ids and ids[-1] in stop.ids else ids
    text = decoded(tokenizer, kept, marks)
    cut = min((text.index(string) for string in stop.strings if string in text), default=len(text))
    return Generation(text[:cut], len(kept), ended)


def sampler(temperature: float, noise: Sequence[random.Random]) -> Callable[[Tensor, list[int]], list[int]]:
    """Next tokens: the most probable ones at temperature 0, else by inverse transform sampling with the row's own random numbers."""
    def choose(logits: Float[Tensor, "row vocabulary"], rows: list[int]) -> list[int]:
        if temperature == 0:
            return logits.argmax(-1).tolist()
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1).cpu()
        draws = torch.tensor([[noise[i].random()] for i in rows], dtype=torch.float64) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, draws).squeeze(1).clamp_max(logits.shape[-1] - 1).tolist()

    return choose


def continuation_log_probs(batch: Batch, choices: Sequence[Sequence[Sequence[int]]], most: int) -> Float[Tensor, "row choice"]:
    """Log-probability of each of a row's continuations (token ids; the same number for every row), summed over tokens, on the CPU.

    The batch is used up. At most `most` tokens are scored at a time, and there are caches of twice the batch's rows.
    """
    n, width = len(choices[0]), max(len(ids) for row in choices for ids in row)
    size = max(1, min(most // (n * width), 2 * len(choices) // n))
    parts = []
    for start in range(0, len(choices), size):
        rows = torch.arange(start, min(start + size, len(choices)))
        part = batch if size >= len(choices) or width == 1 else batch.copy().select(rows)
        parts.append(_continuations(part, choices[start : start + size] if part is not batch else choices, width))
        if part is batch:
            break
    return torch.cat(parts)


def _continuations(batch: Batch, choices: Sequence[Sequence[Sequence[int]]], width: int) -> Float[Tensor, "row choice"]:
    n, flat = len(choices[0]), [list(ids) for row in choices for ids in row]
    targets = torch.tensor([ids + [0] * (width - len(ids)) for ids in flat])
    real = torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in flat])
    log_probs = batch.log_probs_of(targets[:, 0].view(-1, n)).view(-1, 1)
    if width > 1:
        part = batch.select(torch.arange(len(choices)).repeat_interleave(n))    # on the CPU: an index that works on every device
        log_probs = torch.cat([log_probs, part.score(targets, real)], 1)
        refuse_nan(part)
    return log_probs.sum(1).view(-1, n)
