"""Tidy rows with their provenance, on disk: one Parquet file of rows, one JSON file that says where they came from.

Files appear whole or not at all (written beside, then renamed), so a study that is killed leaves only finished parts; one process at a
time writes in a folder. This module does NOT know what the rows mean.
"""

import contextlib
import json
import logging
import math
import os
import platform
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignblind_mi.errors import AlignblindError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
LOCK, HOLDER = ".lock", ".running"    # of a study folder: held while a process writes in it; which process that is
LEFTOVER = re.compile(r"\..*\.\d+\.part")    # what a killed process had not finished writing
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


def stamp() -> dict[str, Any]:
    """What every part's provenance ends with: the versions behind it and when it was made (UTC)."""
    return {"versions": versions(), "made": datetime.now(UTC).isoformat(timespec="seconds")}


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
        with beside.open("rb") as written:
            os.fsync(written)    # on the disk before it has its name
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):    # where nothing can be written, nothing can be there
            beside.unlink(missing_ok=True)
        raise ResultError(f"cannot write {path}: {error.strerror or error}. Nothing that was there before has changed.") from error


@contextlib.contextmanager
def one_process(lock: Path, busy: AlignblindError) -> Iterator[None]:
    """Hold a lock file; the operating system frees it when this process ends, however it ends. `busy` is raised if another one holds it.

    On a file system that has no locks it goes on without one, and says so.
    """
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise busy from None
    except NotImplementedError:
        log.warning("the file system of %s has no locks: see to it that one process alone writes there.", lock.parent)
    try:
        yield
    finally:
        held.release()


def save_result(result: Result, path: Path) -> None:
    """Save rows as `path` (.parquet) and provenance beside it (.json). The provenance is written first: rows never lack it."""
    write_text(path.with_suffix(".json"), json.dumps(result.provenance, indent=1, default=str))
    _whole(path, lambda beside: result.rows.to_parquet(beside, index=False, write_page_checksum=True))


def load_result(path: Path) -> Result:
    """Read what `save_result` wrote. Errors: ResultError naming the file when one of the two is missing or damaged."""
    import pandas as pd
    import pyarrow

    note = path.with_suffix(".json")
    for file in (path, note):
        if not file.is_file():
            raise ResultError(f"{file} is missing: it belongs to the result {path.name}. Delete its other half to compute it anew.")
    try:
        return Result(pd.read_parquet(path, page_checksum_verification=True), json.loads(note.read_text("utf-8")))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ResultError(f"{path} or its provenance is damaged ({error}). Delete both files to compute this part anew.") from error


def json_value(value: Any) -> Any:
    """A number of numpy or pandas as JSON holds it: NaN and infinities become null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def folder_kind(folder: Path) -> str:
    """What a results folder holds by its own note: comparison, calibration, or (anything else) study."""
    note = folder / "study.json"
    try:
        found = json.loads(note.read_text("utf-8")) if note.is_file() else {}
    except (OSError, ValueError):
        return "study"    # reading it as one says what is wrong with the note
    return next((kind for kind in ("comparison", "calibration") if isinstance(found, dict) and kind in found), "study")


@dataclass(frozen=True)
class StudyFolder:
    """A folder of results from one configuration; parts that are there are not computed again."""

    path: Path

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any]) -> "StudyFolder":
        """Open or begin a folder. Errors: ResultError if it holds another configuration's results, or anything else."""
        if not _is_begun(path, config):
            write_text(path / "study.json", json.dumps(dict(config), indent=1))
        return cls(path)

    @classmethod
    @contextlib.contextmanager
    def claim(cls, path: Path, config: Mapping[str, Any]) -> Iterator["StudyFolder"]:
        """`open` for this process alone, until the block ends; what a killed process had not finished writing is cleared away.

        Errors: as `open`, and ResultError if another process is at work there, or the folder cannot be written in.
        """
        _is_begun(path, config)    # a folder that is not ours is not touched
        busy = ResultError(f"another process{_holder(path)} is at work in {path}: wait until it ends, or give another --out (nothing was "
                           "touched).")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(one_process(path / LOCK, busy))
                for file in path.iterdir():
                    if LEFTOVER.fullmatch(file.name) and file.is_file():
                        file.unlink()
                folder = cls.open(path, config)
            except OSError as error:
                raise ResultError(f"cannot write in {path}: {error.strerror or error}. Nothing that was there has changed.") from error
            write_text(path / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname(),
                                                  "since": datetime.now(UTC).isoformat(timespec="seconds")}))
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):    # it is but a note
                    (path / HOLDER).unlink()

    def holds(self, config: Mapping[str, Any], names: Iterable[str]) -> bool:
        """Whether the folder is of this configuration and has all of these parts: then there is nothing to write. Errors: as `open`."""
        return _is_begun(self.path, config) and all(self.has(name) for name in names)

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


def _is_begun(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds a study, of this configuration. Errors: ResultError for another one, or a folder of anything else."""
    note = path / "study.json"
    try:
        if path.exists() and not path.is_dir():
            raise ResultError(f"{path} is not a folder: give another --out.")
        if note.is_file():
            _check_config(note, config)
            return True
        foreign = path.is_dir() and any(file.name not in (LOCK, HOLDER) and not LEFTOVER.fullmatch(file.name) for file in path.iterdir())
    except OSError as error:
        raise ResultError(f"{path} cannot be looked into: {error.strerror or error}. Give another --out.") from error
    if foreign:
        raise ResultError(f"{path} is not empty and holds no study: give another --out (nothing in it was touched).")
    return False


def _holder(path: Path) -> str:
    """Which process says that it is at work in a folder, as far as it can be read."""
    try:
        found = json.loads((path / HOLDER).read_text("utf-8"))
        return f" ({found['pid']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


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
