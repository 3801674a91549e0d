"""Where something that is not ours comes in: files of a user and calls into libraries. Whatever goes wrong there ends in one sentence.

Files: only regular ones are opened (a named pipe or a device would wait for ever), none above a stated size, and what cannot be parsed is
said with its place. Libraries: `foreign` goes around the one call into a library and around nothing of ours, so that our own faults still
show as what they are. It does NOT know models, concepts or results.
"""

import contextlib
import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignblind_mi.errors import AlignblindError

NOTE, TABLE = 16 << 20, 1 << 30    # bytes: the largest note or configuration, and the largest file of answers, that is read
MARGIN = 1 << 20    # bytes that a file may have grown by since it was looked at
DEEPEST = 100    # parts of a dotted name: reading them takes the square of their number
SAID = 300    # characters of a foreign error that are passed on


def said(error: BaseException) -> str:
    """What a foreign error says, in one line that is not too long, without its full stop; its kind where it says nothing."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]) if lines else type(error).__name__
    if isinstance(error, KeyError | AttributeError | TypeError | RecursionError | IndexError | AssertionError) and lines:
        text = f"{type(error).__name__}: {text}"    # of these the words alone say little
    return (text if len(text) <= SAID else text[: SAID - 3] + "...").rstrip(".: ")


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a library in Rust (tokenizers, safetensors), which Python does not count as an Exception."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def foreign(what: str, kind: type[AlignblindError], advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises into `kind`: "<what>: <what the library says>; <advice>." Errors of this project pass as they are.

    Put it around the library's call alone. Interrupting passes too.
    """
    try:
        yield
    except AlignblindError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise kind(f"{what}: {said(error)}{f'; {advice}' if advice else ''}.") from error


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def is_file(path: Path | str) -> bool:
    """Whether a regular file is there; False for names that no file system takes, and for links that lead nowhere or in a circle."""
    return os.path.isfile(path)    # noqa: PTH113 - that of pathlib raises for names that are too long


def is_folder(path: Path | str) -> bool:
    """Whether a folder is there; False for names that no file system takes."""
    return os.path.isdir(path)    # noqa: PTH112 - as above


def read_bytes(path: Path | str, what: str, kind: type[AlignblindError], *, limit: int = NOTE, advice: str = "") -> bytes:
    """The content of a regular file of at most `limit` bytes. `what` it is (or "") begins the sentence of an error, `advice` ends it.

    Errors: `kind` for a file that is missing, unreadable, too large or no regular file.
    """
    check_file(path, what, kind, limit=limit, advice=advice)
    try:
        with Path(path).open("rb") as file:
            data = file.read(min(limit, Path(path).stat().st_size + MARGIN) + 1)    # a buffer as large as it asks for is taken at once
    except (OSError, ValueError, MemoryError) as error:
        raise _unreadable(path, what, kind, advice, _reason(error)) from error
    if len(data) > limit:    # it grew meanwhile
        raise _unreadable(path, what, kind, advice, f"it is too large, at most {limit:,} bytes are read")
    return data


def check_file(path: Path | str, what: str, kind: type[AlignblindError], *, limit: int = TABLE, advice: str = "") -> None:
    """Whether a file may be opened: a regular one of at most `limit` bytes. Errors: `kind` as `read_bytes`."""
    if not str(path):    # pathlib takes it for the working folder
        raise _unreadable("''", what, kind, advice, "no file has an empty name")
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, what, kind, advice, _reason(error)) from error
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise _unreadable(path, what, kind, advice, f"it is {found}")
    if status.st_size > limit:
        raise _unreadable(path, what, kind, advice, f"it is too large, it has {status.st_size:,} bytes and at most {limit:,} are read")


def _unreadable(path: Path | str, what: str, kind: type[AlignblindError], advice: str, reason: str) -> AlignblindError:
    return kind(f"{named(what, path)} cannot be read: {reason}{f'; {advice}' if advice else ''}.")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return said(error)


def read_text(path: Path | str, what: str, kind: type[AlignblindError], *, limit: int = NOTE, advice: str = "") -> str:
    """The text of a UTF-8 file, its byte order mark left out. Errors: `kind` as `read_bytes`, and for bytes that are not UTF-8."""
    data = read_bytes(path, what, kind, limit=limit, advice=advice)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise _unreadable(path, what, kind, advice, f"byte {error.start} is not UTF-8") from error


def parsed(parse: Callable[[str], Any], text: str, problem: str, kind: type[AlignblindError], advice: str = "") -> Any:
    """What a parser makes of a text. Errors: `kind`: "<problem>: <what the parser says>; <advice>." for a text that it cannot read, that is
    nested too deeply, or has numbers too long to be any."""
    try:
        return parse(text)
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        words = "it is nested too deeply" if isinstance(error, RecursionError) else said(error)
        raise kind(f"{problem}: {words}{f'; {advice}' if advice else ''}.") from error


def read_json(path: Path | str, what: str, kind: type[AlignblindError], *, limit: int = NOTE, advice: str = "") -> Any:
    """What a JSON file holds. Errors: `kind` as `read_text`, and for text that is no valid JSON or has halves of characters."""
    text = read_text(path, what, kind, limit=limit, advice=advice)
    found = parsed(loads, text, f"{named(what, path)} is damaged, no valid JSON", kind, advice)
    if "\\u" in text and has_halves(found):
        raise kind(f"{named(what, path)} is damaged: it has half a character (a lone surrogate){f'; {advice}' if advice else ''}.")
    return found


def loads(text: str) -> Any:
    """What a JSON text holds. Errors: ValueError for one that is no valid JSON, or has a key twice in one object."""
    return json.loads(text, object_pairs_hook=_each_once)


def _each_once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, JSON would drop one without a word."""
    found = dict(entries)
    if len(found) < len(entries):
        keys = [key for key, _ in entries]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} is there twice")
    return found


def has_halves(found: Any) -> bool:
    """Whether a text in nested lists and mappings has half a character (a lone surrogate), which cannot be written or printed."""
    if isinstance(found, dict):
        return any(has_halves(value) for entry in found.items() for value in entry)
    if isinstance(found, list):
        return any(map(has_halves, found))
    return isinstance(found, str) and any("\ud800" <= c <= "\udfff" for c in found)


def read_object(path: Path | str, what: str, kind: type[AlignblindError], *, needs: tuple[str, ...] = (), limit: int = NOTE,
                advice: str = "") -> dict[str, Any]:
    """The object in a JSON file, with the entries that it `needs`. Errors: `kind` as `read_json`, and for anything else in it."""
    found, end = read_json(path, what, kind, limit=limit, advice=advice), f"; {advice}." if advice else "."
    if not isinstance(found, dict):
        raise kind(f"{named(what, path)} is damaged: it holds {_called(found)} where an object was expected{end}")
    lacking = [name for name in needs if name not in found]
    if lacking:
        raise kind(f"{named(what, path)} is damaged: it lacks {', '.join(lacking)}{end}")
    return found


def _called(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def parse_toml(text: str, where: str, kind: type[AlignblindError]) -> dict[str, Any]:
    """The tables of a TOML text. Errors: `kind` naming `where` and the line if it is not TOML."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.split("=")[0].count(".") > DEEPEST and not line.lstrip().startswith("#"):
            raise kind(f"{where} is not valid TOML: the name in line {number} has more than {DEEPEST} parts.")
    found: dict[str, Any] = parsed(tomllib.loads, text, f"{where} is not valid TOML", kind)
    return found


def named(what: str, path: Path | str) -> str:
    """What a file is and its path, as a sentence can hold it: not longer than a line or two, no character that cannot be printed."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))
    return f"{what} {text if len(text) <= SAID else f'{text[:60]}... ({len(text):,} characters)'}".lstrip()
