"""Long parts in pieces, so that several processes can share one: how many, where they are kept, and how they become the part again.

The rows of a piece are those that the whole part would have there, since no row depends on the others. Does NOT know who computes them.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path

import pandas as pd

from alignblind_mi.borders import ranks
from alignblind_mi.borders.reading import is_file, read_object
from alignblind_mi.borders.writing import FOREVER, one_process, write_text
from alignblind_mi.errors import ResultError
from alignblind_mi.results import LOCK, PIECES, Result, StudyFolder, load_result
from alignblind_mi.studies.part import Load, Part

PLAN = "plan-of-pieces.json"    # in the folder of pieces: {part: number of pieces}, decided once
NEW_TOKEN = 8    # what writing a token costs, in tokens that are read: about what a batch takes for it
LETTERS = 4    # of a token, about
MOST = 0.25    # of what one process has to do: a part that asks more is split
FEWEST = 32    # prompts of a piece: below, a batch is not full


def cost_of(part: Part) -> float:
    """What a part asks, in about as many tokens that are read: the same number in every process, without a tokenizer."""
    return sum(_load_cost(load) for load in part.loads()) or 1.0


def _load_cost(load: Load) -> float:
    read = sum(len(prompt.text) for prompt in load.prompts) + sum(len(text) for texts in load.scored for text in texts)
    return load.times * (read / LETTERS + NEW_TOKEN * load.new_tokens * len(load.prompts))


def piece_name(part: str, i: int, n: int) -> str:
    """The file name of the i-th of n pieces, i from 0."""
    return f"{part}.{i + 1}-of-{n}"


def pieces_of(folder: StudyFolder) -> StudyFolder:
    """Where the pieces of parts are kept."""
    return StudyFolder(folder.path / PIECES)


def divided(folder: StudyFolder, parts: Sequence[Part], shares: int, costs: Mapping[str, float]) -> dict[str, int]:
    """The parts that are computed in pieces, and in how many: decided by whoever first divides the run, and kept in the folder.
    `costs`: what each part asks, by name (see `cost_of`).

    With one share nothing is split that has not been split before; where several processes hold one model, nothing is.
    """
    if ranks.together() > 1:
        return {}
    plan = folder.path / PIECES / PLAN
    if not is_file(plan) and shares > 1:
        most = MOST * sum(costs.values()) / shares
        whole = {part.same_as for part in parts}    # what is copied as it is
        wanted = {part.name: min(ceil(costs[part.name] / most), _prompts(part) // FEWEST) for part in parts
                  if part.piece is not None and part.name not in whole}
        write_text(plan, json.dumps({name: n for name, n in wanted.items() if n > 1}, indent=1))
    found = planned(folder)
    return {part.name: found[part.name] for part in parts if part.name in found and not folder.has(part.name)}


def planned(folder: StudyFolder) -> dict[str, int]:
    """What `divided` has decided of a folder. Errors: ResultError for a note that cannot be read."""
    plan = folder.path / PIECES / PLAN
    return {str(name): int(n) for name, n in read_object(plan, "", ResultError, advice="delete it, and the pieces beside it").items()
            } if is_file(plan) else {}


def _prompts(part: Part) -> int:
    return sum(len(load.prompts) for load in part.loads() if load.new_tokens)


def put_together(folder: StudyFolder, pieces: Mapping[str, int]) -> None:
    """Make every part whose pieces are all there, and clear them away. One process at a time does it."""
    if not pieces:
        return
    kept, busy = pieces_of(folder), ResultError(f"another process puts pieces together in {folder.path}.")
    with one_process(folder.path / f"{LOCK}-{PIECES}", busy, wait=FOREVER):
        for part, n in pieces.items():
            names = [piece_name(part, i, n) for i in range(n)]
            if not folder.has(part) and all(kept.has(name) for name in names):
                folder.part(part, partial(_whole, [kept.path / f"{name}.parquet" for name in names]))
            if folder.has(part):
                for name in names:
                    for ending in (".parquet", ".json"):
                        (kept.path / f"{name}{ending}").unlink(missing_ok=True)


def _whole(pieces: Sequence[Path]) -> Result:
    found = [load_result(piece) for piece in pieces]
    return Result(pd.concat([one.rows for one in found], ignore_index=True), found[-1].provenance)
