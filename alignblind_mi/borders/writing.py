"""How everything here writes a file or a folder: whole or not at all, and never over what this project did not write.

THE RULE OF WRITING, for everything in this project that writes a file or a folder:

1. Nothing is deleted or replaced that this project did not write. A folder is ours by our record in it (study.json, identity.json), of this
   very configuration; a file is ours by what it says (a note with its digest, `written.json` with the digest of what was drawn). Anything
   else that stands where something is to be written is refused, before anything is computed (`refuse_taken`, `results.StudyFolder`).
2. What is not finished has a name that nobody else has: `.alignblind-` and 16 random digits (`LEFTOVER`), or stands in a folder that is
   claimed by our record. Only such things are cleared away.
3. A symbolic link is never replaced, and never followed into what is deleted.
4. A name that comes from data becomes a file name only if it is a plain one (`name_problem`).
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignblind_mi.borders import ranks
from alignblind_mi.errors import AlignblindError, ResultError

log = logging.getLogger(__name__)
LEFTOVER = re.compile(r"\.alignblind-[0-9a-f]{16}\.part")    # what a killed process had not finished writing
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
LONGEST = 64    # letters
FOREVER = -1.0    # to wait for a lock
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}    # no file names on Windows


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
    except (OSError, ValueError) as error:    # ValueError: a name with a null byte
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
    write_whole(path, lambda beside: beside.write_text(text, "utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old or the new one, never a part. The caller knows that an old one is ours."""
    write_whole(path, lambda beside: beside.write_bytes(data))


def _unfinished() -> str:
    return f".alignblind-{secrets.token_hex(8)}.part"


def write_whole(path: Path, write: Callable[[Path], Any], then: Callable[[Path], Any] | None = None) -> None:
    """A file that appears whole or not at all: `write` it beside its place, do what is to be done `then` with it, and put it there."""
    if not ranks.leads():    # of several processes with one model the first one writes
        return
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


def digest(data: bytes) -> str:
    """What identifies the contents of a file: the first half of their SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


@contextlib.contextmanager
def one_process(lock: Path, busy: AlignblindError, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file; the operating system frees it when this process ends, however it ends. `busy` is raised if another one holds it
    for `wait` seconds (`FOREVER`: however long).

    On a file system that has no locks it goes on without one, and says so.
    """
    from filelock import FileLock, Timeout

    if lock.is_symlink() or (lock.exists() and (not lock.is_file() or lock.stat().st_size)):
        raise ResultError(f"{lock} is no lock of this project: move it away (nothing was touched).")
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=wait)
    except Timeout:
        raise busy from None
    except NotImplementedError:
        log.warning("the file system of %s has no locks: see to it that one process alone writes there.", lock.parent)
    try:
        yield
    finally:
        held.release()
