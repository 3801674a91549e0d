"""What each part of the engine gains: the jobs with one part taken out, against the whole engine, in interleaved rounds."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

from alignblind_mi.models import budget, decoding, engine, stems
from benchmarks.jobs import Bench
from benchmarks.timing import Contest, timed


def without(bench: Bench) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Ways to take one part out of the engine of a bench."""
    ours = bench.ours.engine

    def alone(self: Any, rows: Any, room: Any, reader: Any = None) -> Any:
        return self._read_all(rows, range(len(rows)), room, reader)

    @contextmanager
    def transformers_attention() -> Iterator[None]:
        ours.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            ours.model.set_attn_implementation(engine.ATTENTION)

    return {
        "shared trunks and stems": lambda: patch.object(engine.Engine, "batches", alone),
        "shared stems": lambda: patch.object(stems, "STEM_COST", 10**9),
        "last column only in the last layer": lambda: patch.object(ours, "trims", False),
        "batches cut where that is cheapest": lambda: patch.dict(budget.OVERHEAD, {"cpu": 1e9}),
        "grouped heads without copies": transformers_attention,
        "compaction of ended rows": lambda: patch.object(decoding, "COMPACT_SHARE", 2.0),
    }


def parts(bench: Bench, contest: Contest, rounds: int) -> list[dict[str, Any]]:
    """A record per part: how many times longer the job takes without it."""
    ways = without(bench)
    seconds: dict[str, list[float]] = {name: [] for name in ("whole", *ways)}
    for turn in range(rounds + 1):
        for name in seconds:
            if name == "whole":
                took, _ = timed(contest.ours)
            else:
                with ways[name]():
                    took, _ = timed(contest.ours)
            if turn:
                seconds[name].append(took)
    whole = statistics.median(seconds["whole"])
    return [{"job": contest.job, "size": contest.size, "without": name, "times_longer": statistics.median(seconds[name]) / whole}
            for name in ways]
