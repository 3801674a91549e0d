"""The embedded model pair: a small base and aligned model with planted, known ground truth.

A calibration device: it shows whether the instruments recover what was planted. It is never evidence about Llama 3.
Light to import; torch and transformers load only where a model is built.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from alignblind_mi.errors import AlignblindError

NAMES = ("base", "aligned")


class OrganismError(AlignblindError):
    """A member, knob or folder of an organism pair that does not exist or cannot be used."""


def _checkpoints() -> Path:
    return Path(str(files("alignblind_mi.organism"))) / "checkpoints"


def organism_path(name: str) -> Path:
    """The folder of a shipped checkpoint, `base` or `aligned`; transformers' Auto classes load it as it is."""
    if name not in NAMES:
        raise OrganismError(f"the embedded pair has no model {name!r}: give organism:{' or organism:'.join(NAMES)}.")
    path = _checkpoints() / name
    if not (path / "model.safetensors").is_file():
        raise OrganismError(f"No checkpoint at {path}; build one: `alignblind organism build --out DIR`, and load it from there.")
    return path


def organism_info() -> dict[str, Any]:
    """What was planted in the shipped pair, how it was built and what its gates measured (organism.json)."""
    path = _checkpoints() / "organism.json"
    if not path.is_file():
        raise OrganismError(f"No record at {path}; build the pair with `alignblind organism build --out DIR` and read it there.")
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return info
