"""What is drawn from a results folder into it (pages, tables, figures), with a record of it, so that no file of somebody else is replaced.

The rule is that of `borders.writing`. This module does NOT know what is drawn.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignblind_mi.borders.reading import is_file, read_object
from alignblind_mi.borders.writing import digest, write_bytes, write_text
from alignblind_mi.errors import ResultError
from alignblind_mi.results import is_note

RECORD = "written.json"    # what was drawn into a folder: digests by file


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
        known = [*record.get(name, {}).get("digests", ()), digest(data), *([digest(there)] if old and there is not None else [])]
        if file.exists() and (there is None or digest(there) not in known):
            raise ResultError(f"{file} was not written by this command, or was changed since: move it away, then draw again (nothing was "
                              "touched; the rows are as they were).")
        record[name] = {"rows": "", "digests": known}    # either is ours, if this process is killed half-way
    write_text(folder / RECORD, json.dumps(record, indent=1))
    for name, data in files.items():
        write_bytes(folder / name, data)
    record |= {name: {"rows": rows, "digests": [digest(data)]} for name, data in files.items()}
    write_text(folder / RECORD, json.dumps(record, indent=1))


def _is_for_drawing(folder: Path) -> bool:
    """Whether a folder holds results, or what was drawn here, or nothing but folders of results (of several cues, say)."""
    if not folder.exists() or any(is_file(folder / note) for note in ("study.json", RECORD)):
        return True
    return folder.is_dir() and all(is_file(entry / "study.json") for entry in folder.iterdir())


def is_drawn(folder: Path, name: str) -> bool:
    """Whether a file was drawn from the rows that the folder holds now, and is as it was drawn."""
    file, entry = folder / name, _read_record(folder).get(name, {})
    return file.is_file() and entry.get("rows") == rows_digest(folder) and entry.get("digests") == [digest(file.read_bytes())]


def drawn_files(folder: Path) -> set[str]:
    """What was drawn into a folder, and the record of it: paths in it."""
    return {RECORD, *_read_record(folder)}


def rows_digest(folder: Path) -> str:
    """What identifies all finished parts of a folder: a digest of their notes, which bear the digests of their rows."""
    notes = sorted(part.with_suffix(".json") for part in folder.glob("*.parquet"))
    return digest(b"".join(digest(note.read_bytes()).encode() + note.name.encode() for note in notes if note.is_file()))


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RECORD
    found = read_object(path, "", ResultError, advice="move it and what was drawn away, then draw again") if path.exists() else {}
    if not all(isinstance(entry, dict) and isinstance(entry.get("digests"), list) for entry in found.values()):
        raise ResultError(f"{folder / RECORD} is no record of what was drawn: move it away, then draw again.")
    return found


def _is_of_old(folder: Path) -> bool:
    """Whether a part of a folder was written by a version that kept no digests."""
    notes = [part.with_suffix(".json") for part in folder.glob("*.parquet")]
    return any(note.is_file() and is_note(note) and "digest" not in json.loads(note.read_text("utf-8")) for note in notes)
