"""Tidy rows with their provenance, on disk: one Parquet file of rows, one JSON file that says where they came from.

Files appear whole or not at all (written beside, then renamed), so a study that is killed leaves only finished parts; one process at a
time writes in a folder. This module does NOT know what the rows mean.

THE RULE OF WRITING, for everything in this project that writes a file or a folder:

1. Nothing is deleted or replaced that this project did not write. A folder is ours by our record in it (study.json, identity.json), of this
   very configuration; a file is ours by what it says (a note with its digest, `written.json` with the digest of what was drawn). Anything
   else that stands where something is to be written is refused, before anything is computed (`refuse_taken`, `StudyFolder`).
2. What is not finished has a name that nobody else has: `.alignblind-` and 16 random digits (`LEFTOVER`), or stands in a folder that is
   claimed by our record. Only such things are cleared away.
3. A symbolic link is never replaced, and never followed into what is deleted.
4. A name that comes from data becomes a file name only if it is a plain one (`name_problem`).
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignblind_mi.borders import is_file, named, read_json
from alignblind_mi.borders import said as one_line
from alignblind_mi.errors import AlignblindError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
LOCK, HOLDER = ".lock", ".running"    # of a study folder: held while a process writes in it; which process that is
LEFTOVER = re.compile(r"\.alignblind-[0-9a-f]{16}\.part")    # what a killed process had not finished writing
RECORD = "written.json"    # what was drawn into a folder: digests by file
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")    # made of several names and doses
LONGEST, LONGEST_PART = 64, 200    # letters
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}    # no file names on Windows
RESERVED = {"study", "plan", "comparison", "calibration", "written"} | DEVICES    # no names of parts
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


# ---- names and places --------------------------------------------------------------------------------------------------


def name_problem(name: Any) -> str:
    """Why a name cannot become a part of a file name, as the end of a sentence ("is ..."); empty for a plain name.

    Plain is: letters a-z and A-Z, digits, `_` and `-`, beginning with a letter or a digit, at most 64 of them, and no name that a system
    keeps for a device.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "is no plain name: take letters a-z, digits, _ and -, no full stop or blank, a letter or digit first"
    if len(name) > LONGEST:
        return f"is {len(name)} letters long: a name has at most {LONGEST}"
    return "is kept by some systems for a device: take another name" if name.lower() in DEVICES else ""


def check_parts(names: Iterable[str]) -> None:
    """Whether parts can be saved under these names. Errors: ResultError for one that is no plain name, is kept for another file of the
    folder, or is given twice (small and capital letters are the same to some systems)."""
    seen = set[str]()
    for name in names:
        problem = ("is no plain name: take letters a-z, digits, _, ., + and -" if not isinstance(name, str) or not PART_NAME.fullmatch(name)
                   else f"is longer than {LONGEST_PART} letters" if len(name) > LONGEST_PART
                   else "is the name of another file of the folder" if name.split(".")[0].lower() in RESERVED
                   else "is there twice" if name.lower() in seen else "")
        if problem:
            raise ResultError(f"the part {str(name)[:LONGEST_PART]!r} {problem}.")
        seen.add(name.lower())


def refuse_taken(path: Path, *, what: str = "file", mine: Callable[[Path], bool] | None = None,
                 kind: type[AlignblindError] | None = None) -> None:
    """Whether something new can be written at `path` by the rule of this module (see there), found out without writing anything.

    Nothing may be there, unless `mine` says that it is ours; for a folder (what="folder") an empty one will do. Errors: `kind` (default:
    ResultError) for a place that is taken, a symbolic link, a name that is too long, or a way that leads through a file or a folder that
    cannot be written in.
    """
    path, kind = Path(path), kind or ResultError
    untouched = f"give another {what} (nothing was touched)"
    try:
        if b"\0" in os.fsencode(path):    # pathlib says of such names that nothing is there
            raise ValueError("it has a null character in it")
        if path.is_symlink():
            raise kind(f"{path} is a symbolic link, which is neither followed nor replaced: {untouched}.")
        if path.exists():
            empty = what == "folder" and path.is_dir() and not any(path.iterdir())
            if not empty and not (mine is not None and mine(path)):
                raise kind(f"{path} is there already and was not written by this command: {untouched}.")
        there = path.parent
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise kind(f"cannot write {path}: {there} is not a folder; {untouched}.")
        if not path.exists() and not os.access(there, os.W_OK | os.X_OK):
            raise kind(f"cannot write {path}: Permission denied in {there}; {untouched}.")
        for part in path.absolute().relative_to(there.absolute()).parts:
            (there / part).exists()    # an OSError where a name is longer than the file system takes
    except (OSError, ValueError) as error:
        halves = isinstance(error, UnicodeEncodeError)
        reason = "it has half a character (a lone surrogate) in it" if halves else getattr(error, "strerror", None) or error
        raise kind(f"{str(path)[:100]!r} cannot be a {what}: {reason}. Give another {what}.") from error


def remove_own(folder: Path, known: re.Pattern[str]) -> None:
    """Delete a folder of ours whose entries all have `known` names. Errors: ResultError for a link, or one that holds anything else."""
    strange = [entry for entry in folder.rglob("*") if entry.is_symlink() or not known.fullmatch(entry.relative_to(folder).parts[0])]
    if folder.is_symlink() or strange:
        raise ResultError(f"{(strange or [folder])[0]} was not written by this command: move it away (nothing was touched).")
    shutil.rmtree(folder)


@contextlib.contextmanager
def whole_folder(out: Path, kind: type[AlignblindError] | None = None) -> Iterator[Path]:
    """A new folder `out` that appears whole or not at all: the block fills the folder that it is given, which has another name until then.

    Errors: as `refuse_taken`; `kind` if it cannot be written, or somebody else was faster.
    """
    refuse_taken(out, what="new folder", kind=kind)
    scratch = out.parent / _unfinished()
    try:
        scratch.mkdir(parents=True)
        draft = scratch / "folder"
        draft.mkdir()
        yield draft
        draft.rename(out)    # fails where anything has come to stand there
    except OSError as error:
        raise (kind or ResultError)(f"cannot write {out}: {error.strerror or error}. Nothing that was there before has changed.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)    # made above, under a name that nobody else has


# ---- files -------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either the old or the new one, never a part. The caller knows that an old one is ours."""
    _whole(path, lambda beside: beside.write_text(text, "utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old or the new one, never a part. The caller knows that an old one is ours."""
    _whole(path, lambda beside: beside.write_bytes(data))


def _unfinished() -> str:
    return f".alignblind-{secrets.token_hex(8)}.part"


def _whole(path: Path, write: Callable[[Path], Any], then: Callable[[Path], Any] | None = None) -> None:
    """Write beside a path, do what is to be done `then` with what was written, and put it in its place."""
    beside = path.with_name(_unfinished())
    try:
        if path.is_symlink():
            raise ResultError(f"{path} is a symbolic link, which is neither followed nor replaced: give the file itself.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb") as written:
            os.fsync(written)    # on the disk before it has its name
        if then is not None:
            then(beside)
        beside.replace(path)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):    # where nothing can be written, nothing can be there
            beside.unlink(missing_ok=True)
        said = getattr(error, "strerror", None) or error
        raise ResultError(f"cannot write {path}: {said}. Nothing that was there before has changed.") from error
    except ResultError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_drawn(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what is drawn from a results folder into it (paths relative to it), and keep the digests of all in `written.json`.

    A file that is there is replaced only if it is as it was written; in a folder of a version that kept no record, drawn files are taken
    for that version's. Errors: ResultError for a file of somebody else or one that was changed, a link, or a folder that is none of ours.
    """
    if not _is_for_drawing(folder):
        raise ResultError(f"{folder} is no results folder: it has no study.json. Give the folder of a study, or one that is new.")
    record, old, rows = _read_record(folder), not (folder / RECORD).exists() and _is_of_old(folder), rows_digest(folder)
    for name, data in files.items():
        file = folder / name
        links = [at for at in (file, *file.parents) if folder in at.parents and at.is_symlink()]
        if links:
            raise ResultError(f"{links[0]} is a symbolic link, which is neither followed nor replaced: move it away, then draw again.")
        there = file.read_bytes() if file.is_file() else None
        known = [*record.get(name, {}).get("digests", ()), _digest(data), *([_digest(there)] if old and there is not None else [])]
        if file.exists() and (there is None or _digest(there) not in known):
            raise ResultError(f"{file} was not written by this command, or was changed since: move it away, then draw again (nothing was "
                              "touched; the rows are as they were).")
        record[name] = {"rows": "", "digests": known}    # either is ours, if this process is killed half-way
    write_text(folder / RECORD, json.dumps(record, indent=1))
    for name, data in files.items():
        write_bytes(folder / name, data)
    record |= {name: {"rows": rows, "digests": [_digest(data)]} for name, data in files.items()}
    write_text(folder / RECORD, json.dumps(record, indent=1))


def _is_for_drawing(folder: Path) -> bool:
    """Whether a folder holds results, or what was drawn here, or nothing but folders of results (of several cues, say)."""
    if not folder.exists() or any(is_file(folder / note) for note in ("study.json", RECORD)):
        return True
    return folder.is_dir() and all(is_file(entry / "study.json") for entry in folder.iterdir())


def is_drawn(folder: Path, name: str) -> bool:
    """Whether a file was drawn from the rows that the folder holds now, and is as it was drawn."""
    file, entry = folder / name, _read_record(folder).get(name, {})
    return file.is_file() and entry.get("rows") == rows_digest(folder) and entry.get("digests") == [_digest(file.read_bytes())]


def rows_digest(folder: Path) -> str:
    """What identifies all finished parts of a folder: a digest of their notes, which bear the digests of their rows."""
    notes = sorted(part.with_suffix(".json") for part in folder.glob("*.parquet"))
    return _digest(b"".join(_digest(note.read_bytes()).encode() + note.name.encode() for note in notes if note.is_file()))


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((folder / RECORD).read_text("utf-8")) if (folder / RECORD).exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{folder / RECORD} is damaged ({error}): move it and what was drawn away, then draw again.") from error
    if not isinstance(found, dict) or not all(isinstance(entry, dict) and isinstance(entry.get("digests"), list)
                                              for entry in found.values()):
        raise ResultError(f"{folder / RECORD} is no record of what was drawn: move it away, then draw again.")
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@contextlib.contextmanager
def one_process(lock: Path, busy: AlignblindError) -> Iterator[None]:
    """Hold a lock file; the operating system frees it when this process ends, however it ends. `busy` is raised if another one holds it.

    On a file system that has no locks it goes on without one, and says so.
    """
    from filelock import FileLock, Timeout

    if lock.is_symlink() or (lock.exists() and (not lock.is_file() or lock.stat().st_size)):
        raise ResultError(f"{lock} is no lock of this project: move it away (nothing was touched).")
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


def save_result(result: Result, path: Path | str) -> None:
    """Save rows as `path` (.parquet) and provenance beside it (.json), with a digest of both. The provenance is written first: rows never
    lack it.

    A result that is there is replaced by it. Errors: ResultError for another ending, or a file that is no result of this project.
    """
    path = Path(path)
    note = path.with_suffix(".json")
    if path.suffix != ".parquet":
        raise ResultError(f"{path} cannot hold rows: give a name that ends in .parquet.")
    refuse_taken(note, mine=_is_note)
    refuse_taken(path, mine=lambda rows: rows.is_file() and _is_note(note))

    def noted(rows: Path) -> None:
        text = json.dumps(result.provenance, indent=1, default=str)
        digest = {"rows": _digest(rows.read_bytes()), "note": _digest(text.encode("utf-8", "surrogatepass"))}
        write_text(note, json.dumps({**json.loads(text), "digest": digest}, indent=1))

    _whole(path, lambda beside: result.rows.to_parquet(beside, index=False, write_page_checksum=True), noted)


def load_result(path: Path | str) -> Result:
    """Read what `save_result` wrote. Errors: ResultError naming the file when one of the two is missing, damaged or was changed."""
    import pandas as pd
    import pyarrow

    path = Path(path)
    note = path.with_suffix(".json")
    for file in (path, note):
        if not is_file(file):
            raise ResultError(f"{named('', file)} is missing: it belongs to the result {path.name}. Delete its other half to compute it "
                              "anew.")
    try:
        rows, said = pd.read_parquet(path, page_checksum_verification=True), json.loads(note.read_text("utf-8"))
        if not isinstance(said, dict):
            raise ValueError("the provenance is no table")
        if not _is_noted(said):
            raise ValueError("the provenance is none of this project")
        digest = said.pop("digest", None)    # a version that kept none wrote the folder otherwise
        if digest is not None and digest != {"rows": _digest(path.read_bytes()),
                                             "note": _digest(json.dumps(said, indent=1).encode("utf-8", "surrogatepass"))}:
            raise ValueError("it was changed since it was written")
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise ResultError(f"{path} or its provenance is damaged ({one_line(error)}). Delete both files to compute this part anew."
                          ) from error
    return Result(rows, said)


def _is_note(path: Path) -> bool:
    """Whether a file is the provenance of a result: by its digest, or (of a version that kept none) by what every part's ends with."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and _is_noted(found)


def _is_noted(provenance: Mapping[str, Any]) -> bool:
    return "digest" in provenance or {"versions", "made"} <= set(provenance)


def _is_of_old(folder: Path) -> bool:
    """Whether a part of a folder was written by a version that kept no digests."""
    notes = [part.with_suffix(".json") for part in folder.glob("*.parquet")]
    return any(note.is_file() and _is_note(note) and "digest" not in json.loads(note.read_text("utf-8")) for note in notes)


def json_value(value: Any) -> Any:
    """A number of numpy or pandas as JSON holds it: NaN and infinities become null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def folder_kind(folder: Path) -> str:
    """What a results folder holds by its own note: comparison, calibration, or (anything else) study."""
    note = folder / "study.json"
    try:
        found = json.loads(note.read_text("utf-8")) if is_file(note) else {}
    except (OSError, ValueError, RecursionError):
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
                    if LEFTOVER.fullmatch(file.name) and file.is_file() and not file.is_symlink():
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
        return self._file(name).is_file()

    def _file(self, name: str) -> Path:
        check_parts([name])
        return self.path / f"{name}.parquet"

    def refuse_taken(self, names: Iterable[str]) -> None:
        """Whether every missing part can be saved, found out before any is computed. Errors: ResultError for what stands in its place."""
        for name in names:
            if not self.has(name):
                refuse_taken(self._file(name), what="--out")
                refuse_taken(self._file(name).with_suffix(".json"), what="--out", mine=_is_note)

    def part(self, name: str, compute: Callable[[], Result]) -> Result:
        """The result `name`: read if it is there, else computed and saved."""
        file = self._file(name)
        if file.is_file():
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
        foreign = path.is_dir() and not all(_is_of_a_run(file) for file in path.iterdir())
    except (OSError, ValueError) as error:    # ValueError: a null byte
        raise ResultError(f"{str(path)[:100]!r} cannot be looked into: {getattr(error, 'strerror', None) or error}. Give another --out."
                          ) from error
    if foreign:
        raise ResultError(f"{path} is not empty and holds no study: give another --out (nothing in it was touched).")
    refuse_taken(path, what="--out", mine=Path.is_dir)
    return False


def _is_of_a_run(file: Path) -> bool:
    """Whether a file is what a process leaves in a folder before it has begun a study there: a lock, its note, an unfinished file."""
    if file.is_symlink() or not file.is_file():
        return False
    return (file.name == LOCK and not file.stat().st_size) or (file.name == HOLDER and bool(_holder(file.parent))) or (
        LEFTOVER.fullmatch(file.name) is not None)


def _holder(path: Path) -> str:
    """Which process says that it is at work in a folder, as far as it can be read."""
    try:
        found = json.loads((path / HOLDER).read_text("utf-8"))
        return f" ({found['pid']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _check_config(note: Path, config: Mapping[str, Any]) -> None:
    found = read_json(note, "", ResultError, advice="restore it or give another --out")
    wanted = json.loads(json.dumps(dict(config)))
    if not isinstance(found, dict) or found != wanted:
        have = found if isinstance(found, dict) else {}
        keys = [key for key in sorted({*have, *wanted}) if have.get(key) != wanted.get(key)]
        said = "; ".join(f"{key} is {have.get(key)!r} there and {wanted.get(key)!r} here" for key in keys)
        raise ResultError(f"{note.parent} holds results of another configuration: {said}. Give another --out (nothing was touched).")
