"""Where the embedded model pairs lie and what is recorded of them; `organism` builds them.

Light to import: the names are listed before any model is loaded. This module does NOT know how a pair is made.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from alignblind_mi.borders.reading import read_object
from alignblind_mi.errors import AlignblindError

ROLES = ("base", "aligned")
RECORD = "organism.json"


class OrganismError(AlignblindError):
    """A member, knob or folder of an organism pair that does not exist or cannot be used."""


def _checkpoints() -> Path:
    return Path(str(files("alignblind_mi.organism"))) / "checkpoints"


def organism_pairs() -> list[str]:
    """The shipped pairs: `""`, the first one, whose models are called by their role alone, and those named after their concept."""
    found = sorted(folder.name for folder in _checkpoints().iterdir() if (folder / RECORD).is_file())
    return ["", *found]


def organism_names() -> list[str]:
    """What may follow `organism:`, such as `base`, or `PAIR-aligned` for a pair that is named after its concept."""
    return list(_folders())


def _folders() -> dict[str, Path]:
    return {f"{pair}-{role}" if pair else role: _checkpoints() / pair / role for pair in organism_pairs() for role in ROLES}


def organism_path(name: str) -> Path:
    """The folder of a shipped checkpoint, one of `organism_names()`; transformers' Auto classes load it as it is.

    Errors: OrganismError for another name, or where the package was installed without its checkpoints.
    """
    folders = _folders()
    if name not in folders:
        known = [f"organism:{known}" for known in folders]
        raise OrganismError(f"there is no embedded model {name!r}: give {', '.join(known[:-1])} or {known[-1]}.")
    if not (folders[name] / "model.safetensors").is_file():
        raise OrganismError(f"No checkpoint at {folders[name]}; build one: `alignblind organism build --out DIR`, and load it from there.")
    return folders[name]


def organism_info(pair: str = "") -> dict[str, Any]:
    """What was planted in a shipped pair, one of `organism_pairs()`, how it was built and what its gates measured (organism.json).

    Errors: OrganismError for an unknown pair, or where the package was installed without the record.
    """
    if pair not in organism_pairs():
        known = " or ".join(map(repr, organism_pairs()))
        raise OrganismError(f"there is no embedded pair {pair!r}: give {known}.")
    path = _checkpoints() / pair / RECORD
    if not path.is_file():
        raise OrganismError(f"No record at {path}; build the pair with `alignblind organism build --out DIR` and read it there.")
    return read_record(path.parent)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of the pair in a folder. Errors: OrganismError for one that cannot be read."""
    return read_object(folder / RECORD, "the record", OrganismError, advice="restore it, or take it out of that folder")
