"""Interleaved timing: contestants take turns in every round, and medians of the same rounds are compared."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Contest:
    """One job on one size: our way, its rivals, what it must cost at least, and how outputs are compared.

    A rival's `share` is the share of the rows that it is timed on (its time is divided by it); its output is compared on those rows.
    `floor` is the time of what must be computed at all, from its own timed parts.
    """

    job: str
    size: str
    rows: int
    ours: Callable[[], Any]
    rivals: dict[str, Callable[[], Any]]
    same: Callable[[Any, Any, str], bool]
    share: dict[str, float] = field(default_factory=dict)
    floor_parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    floor: Callable[[Mapping[str, float]], float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def run(contest: Contest, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time a contest in interleaved rounds (the first is for warming up) and give a record per rival."""
    turns = {"ours": contest.ours, **contest.rivals, **{f"floor:{name}": part for name, part in contest.floor_parts.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    outputs: dict[str, Any] = {}
    for turn in range(rounds + 1):
        for name, act in turns.items():
            took, outputs[name] = timed(act)
            if turn > 0:
                seconds[name].append(took)
        say(f"  {contest.job} {contest.size}: round {turn} of {rounds}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = contest.floor({name: medians[f"floor:{name}"] for name in contest.floor_parts}) if contest.floor is not None else None
    records = []
    for rival in contest.rivals:
        share = contest.share.get(rival, 1.0)
        ratios = [theirs / share / ours for theirs, ours in zip(seconds[rival], seconds["ours"], strict=True)]
        records.append({
            "job": contest.job, "size": contest.size, "rival": rival, "ratio": statistics.median(ratios), "ratio_low": min(ratios),
            "ratio_high": max(ratios), "seconds_ours": medians["ours"], "seconds_rival": medians[rival] / share,
            "floor_share": None if floor is None else floor / medians["ours"],
            "exact": contest.same(outputs["ours"], outputs[rival], rival),
            "rows": contest.rows, "rows_timed_of_rival": round(contest.rows * share), "rounds": rounds, **contest.notes})
    return records


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and output of one call. A call may return its own seconds: (seconds, output) under the key `timed`."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    output = act()
    took = time.perf_counter() - start
    gc.enable()
    if isinstance(output, dict) and "timed" in output:
        return output["timed"]
    return took, output


def same_tokens(ours: Any, theirs: Any) -> bool:
    """Whether all generated tokens are the same."""
    return [list(map(int, row)) for row in ours] == [list(map(int, row)) for row in theirs]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-4) -> bool:
    """Whether numbers agree within float32 rounding of a deep random model."""
    return bool(torch.allclose(ours.float(), theirs.float(), atol=tolerance, rtol=1e-3))
