"""Tidy rows with their provenance, on disk: one Parquet file of rows, one JSON file that says where they came from.

Files appear whole or not at all (written beside, then renamed), so a study that is killed leaves only finished parts. This module does
NOT know what the rows mean.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignblind_mi.errors import AlignblindError

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("alignblind-mi", "torch", "transformers", "transformer-lens", "peft", "numpy", "pandas")


class ResultError(AlignblindError):
    """Saved results that cannot be read, or do not belong where they were found."""


@dataclass(frozen=True, eq=False)
class Result:
    """Rows (one per answer, patch or reading) and the provenance that every number made from them carries."""

    rows: "pd.DataFrame"
    provenance: dict[str, Any] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either the old or the new one, never a part."""
    _whole(path, lambda beside: beside.write_text(text, "utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old or the new one, never a part."""
    _whole(path, lambda beside: beside.write_bytes(data))


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ResultError(f"cannot write {path}: {error.strerror or error}. Nothing that was there before has changed.") from error


def save_result(result: Result, path: Path) -> None:
    """Save rows as `path` (.parquet) and provenance beside it (.json). The provenance is written first: rows never lack it."""
    write_text(path.with_suffix(".json"), json.dumps(result.provenance, indent=1, default=str))
    _whole(path, lambda beside: result.rows.to_parquet(beside, index=False))


def load_result(path: Path) -> Result:
    """Read what `save_result` wrote. Errors: ResultError naming the file when one of the two is missing or damaged."""
    import pandas as pd
    import pyarrow

    note = path.with_suffix(".json")
    for file in (path, note):
        if not file.is_file():
            raise ResultError(f"{file} is missing: it belongs to the result {path.name}. Delete its other half to compute it anew.")
    try:
        return Result(pd.read_parquet(path), json.loads(note.read_text("utf-8")))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ResultError(f"{path} or its provenance is damaged ({error}). Delete both files to compute this part anew.") from error


@dataclass(frozen=True)
class StudyFolder:
    """A folder of results from one configuration; parts that are there are not computed again."""

    path: Path

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any]) -> "StudyFolder":
        """Open or begin a folder. Errors: ResultError if it holds another configuration's results, or anything else."""
        note = path / "study.json"
        if path.exists() and not path.is_dir():
            raise ResultError(f"{path} is not a folder: give another --out.")
        if note.is_file():
            _check_config(note, config)
        elif path.is_dir() and any(path.iterdir()):
            raise ResultError(f"{path} is not empty and holds no study: give another --out (nothing in it was touched).")
        else:
            write_text(note, json.dumps(dict(config), indent=1))
        return cls(path)

    def has(self, name: str) -> bool:
        """Whether the part `name` is finished."""
        return (self.path / f"{name}.parquet").is_file()

    def part(self, name: str, compute: Callable[[], Result]) -> Result:
        """The result `name`: read if it is there, else computed and saved."""
        file = self.path / f"{name}.parquet"
        if self.has(name):
            return load_result(file)
        result = compute()
        save_result(result, file)
        return result


def _check_config(note: Path, config: Mapping[str, Any]) -> None:
    try:
        found = json.loads(note.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{note} is damaged ({error}): restore it or give another --out.") from error
    wanted = json.loads(json.dumps(dict(config)))
    if not isinstance(found, dict) or found != wanted:
        have = found if isinstance(found, dict) else {}
        keys = [key for key in sorted({*have, *wanted}) if have.get(key) != wanted.get(key)]
        said = "; ".join(f"{key} is {have.get(key)!r} there and {wanted.get(key)!r} here" for key in keys)
        raise ResultError(f"{note.parent} holds results of another configuration: {said}. Give another --out (nothing was touched).")
