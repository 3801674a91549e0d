"""How cost grows with rows, layers and prompt length, and where it bends: cost per unit along each axis, the others held."""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alignblind_mi import Edit, HookedModel, ModelSpec, Row, Site, load_model
from benchmarks.models import SIZES, Size, make_checkpoint, text_prompt
from benchmarks.timing import timed

AXES = {"rows": (1, 4, 16, 64, 256, 1024), "layers": (2, 4, 8, 16, 32), "length": (16, 32, 64, 128, 256, 512)}
HELD = {"rows": 64, "layers": 8, "length": 64}
BEND = 1.2    # a point is a bend where a unit costs this much more than at the cheapest point


def scaling(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """A record per point: seconds, and seconds per row, layer or token relative to the cheapest point of the axis."""
    for axis, values in AXES.items():
        points = [(value, _seconds(folder, {**HELD, axis: value}, rounds)) for value in values]
        cheapest = min(seconds / value for value, seconds in points)
        for value, seconds in points:
            unit = seconds / value / cheapest
            yield {"job": "scaling", "axis": axis, "value": value, "seconds": seconds, "unit_cost": unit, "bends": unit > BEND}


def _seconds(folder: Path, at: dict[str, int], rounds: int) -> float:
    """Median time of one-layer-in edits on rows of one length, each with a prompt of its own, and 8 new tokens."""
    size = replace(SIZES["S"], name=f"S{at['layers']}", layers=at["layers"])
    model = _model(size, folder)
    vector = torch.ones(size.width)
    rows = [Row(text_prompt(size, at["length"], k, {}, {"here": [at["length"] // 3]}), (Edit(Site(1, "here"), vector),))
            for k in range(at["rows"])]
    return statistics.median(timed(lambda: model.generate(rows, 8))[0] for _ in range(rounds + 1))


def _model(size: Size, folder: Path) -> HookedModel:
    loaded = load_model(ModelSpec(str(make_checkpoint(size, folder / size.name)), dtype="float32", device="cpu"))
    return replace(loaded, stop_ids=frozenset())
