"""Beginnings that rows share: where rows part, and which beginnings are worth a run of their own. Does NOT run anything."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from alignblind_mi.models.tokens import TokenEdit, TokenRow

STEM_COST = 64    # tokens that sharing a beginning must save to be worth a run of its own
DEEPEST = 100     # branches of beginnings within beginnings that are looked at


def first_column(row: TokenRow) -> int:
    """The first position that a row must compute itself: its first edited token, or its last token if it has no edits."""
    return min((edit.at.position for edit in row.edits), default=len(row.ids) - 1)


def cut(row: TokenRow, start: int, stop: int) -> TokenRow:
    """The tokens of a row from `start` to `stop`, with the edits and readings there, positions counted from `start`."""
    edits = tuple(replace(e, at=e.at._replace(position=e.at.position - start)) for e in row.edits if start <= e.at.position < stop)
    reads = tuple(at._replace(position=at.position - start) for at in row.reads if start <= at.position < stop)
    return TokenRow(row.ids[start:stop], edits, reads, row.later)


def common_stems(rows: Sequence[TokenRow], chosen: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Rows in groups that begin with the same tokens under the same edits: (tokens in common, rows of the group).

    The last token of a row and what it reads are never in common. Of all ways to group them, the one that saves most tokens, each shared
    beginning counted as STEM_COST; a stem of 0 says that there is nothing to share.
    """
    numbers: dict[Any, int] = {}
    spelt = {i: [numbers.setdefault(sign, len(numbers)) for sign in _signs(rows[i])] for i in chosen}
    order = sorted(chosen, key=spelt.__getitem__)
    common = [0, *(_common(spelt[a], spelt[b]) for a, b in pairwise(order))]

    def best(start: int, stop: int, depth: int = 0) -> tuple[int, list[tuple[int, list[int]]]]:
        """The best grouping of neighbours in the order, and what it saves: all of them, or the best of each branch."""
        if stop - start == 1 or depth > DEEPEST:
            return 0, [(0, [i]) for i in order[start:stop]]
        stem = min(common[start + 1 : stop])
        bounds = [start, *(k for k in range(start + 1, stop) if common[k] == stem), stop]
        branches = [best(a, b, depth + 1) for a, b in pairwise(bounds)]
        saved, whole = sum(saving for saving, _ in branches), stem * (stop - start - 1) - STEM_COST
        return (whole, [(stem, order[start:stop])]) if whole > saved else (saved, [group for _, groups in branches for group in groups])

    return best(0, len(order))[1] if order else []


def _signs(row: TokenRow) -> Iterator[Any]:
    """What makes each token of a row what it is, as far as it may be shared: its id and its edits."""
    edits: dict[int, list[Any]] = {}
    for edit in row.edits:
        edits.setdefault(edit.at.position, []).append(_sign(edit))
    for position in range(min([len(row.ids) - 1, *(at.position for at in row.reads)])):
        yield row.ids[position], tuple(edits.get(position, ()))


def _sign(edit: TokenEdit) -> tuple[Any, ...]:
    """What makes an edit what it is."""
    end = () if edit.as_far_as is None else _memory(edit.as_far_as)
    return (*edit.at[:2], edit.at.features, edit.how, edit.strength, *_memory(edit.vector), *end)


def _memory(vector: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where a vector's numbers lie: views of the same memory are the same edit."""
    return vector.data_ptr(), vector.stride()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
