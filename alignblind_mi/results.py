"""Tidy rows with their provenance, on disk: one Parquet file of rows, one JSON file that says where they came from.

Files appear whole or not at all (written beside, then renamed), so a study that is killed leaves only finished parts; one process at a
time writes in a folder. This module does NOT know what the rows mean.

The files are written by the rule of `borders.writing`.
"""

import contextlib
import json
import math
import os
import platform
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from alignblind_mi.borders import ranks
from alignblind_mi.borders.reading import is_file, named, read_json, said as one_line
from alignblind_mi.borders.settings import File, Listed, takes
from alignblind_mi.borders.texts import html_summary, named_line
from alignblind_mi.borders.writing import DEVICES, LEFTOVER, digest, one_process, refuse_taken, write_text, write_whole
from alignblind_mi.errors import ResultError

if TYPE_CHECKING:
    import pandas as pd

Label = Literal["stereotyped", "reversed", "rejected", "invalid"]
OUTCOMES: tuple[Label, ...] = ("stereotyped", "reversed", "rejected", "invalid")    # of an answer
STUDY = "study.json"    # of a results folder: what its rows are of
LOCK, HOLDER = ".lock", ".running"    # of a study folder: held while a process writes in it; which process that is
PIECES = "pieces"    # of a study folder: where parts of parts are kept until all of a part are there
MOMENT = 10.0    # seconds that a share waits for another one to have looked whether the folder is free
PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")    # made of several names and doses
LONGEST_PART = 200    # letters
RESERVED = {PIECES, "shares", "study", "plan", "comparison", "calibration", "written"} | DEVICES    # no names of parts
PACKAGES = ("alignblind-mi", "torch", "transformers", "transformer-lens", "peft", "numpy", "pandas")


@dataclass(frozen=True, eq=False)
class Result:
    """Rows (one per answer, patch or reading) and the provenance that every number made from them carries."""

    rows: "pd.DataFrame"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        told = [name for name in ("part", "model", "revision", "treatment") if name in self.provenance]
        about = ", ".join(f"{name} {self.provenance[name]}" for name in told)
        return named_line(self, f"{len(self.rows)} rows x {self.rows.shape[1]} columns{f', {about}' if about else ''}")

    def _repr_html_(self) -> str:
        """What a notebook shows: where the rows come from and, of judged answers, rates with intervals and the invalid share."""
        config = self.provenance.get("config")
        seed = config.get("seed") if isinstance(config, Mapping) else None
        told = [name for name in ("part", "model", "revision", "treatment", "made") if name in self.provenance]
        facts: dict[str, object] = {"n": len(self.rows), **{name: self.provenance[name] for name in told}}
        if seed is not None:
            facts["seed"] = seed
        return html_summary("Result", facts, rates_of(self.rows))


def rates_of(rows: "pd.DataFrame") -> list[dict[str, Any]]:
    """What judged answers say in short, by model, treatment and kind: n, the rate of the stereotype with its 95 % interval over the valid
    answers (over word pairs and templates, as in `statistics.rates.summarise`), the invalid share. Rows of anything else say nothing."""
    from alignblind_mi.intervals.clustered import rate_interval

    by = [name for name in ("model", "treatment", "kind") if name in rows]
    if "outcome" not in rows or not by:
        return []
    records = []
    for key, group in rows.groupby(by, sort=False, dropna=False):
        n, hits, valid = len(group), group["outcome"] == "stereotyped", group["outcome"] != "invalid"
        labels = [group[name].to_numpy() for name in ("word_pair", "template") if name in group]
        found = rate_interval(hits.to_numpy(float), labels, valid=valid.to_numpy(float)) if labels else None
        rate = int(hits.sum()) / int(valid.sum()) if valid.any() else math.nan
        low, high = (found.low, found.high) if found is not None else (math.nan, math.nan)
        records.append({**dict(zip(by, key, strict=True)), "n": n, "rate": rate, "low": low, "high": high,
                        "invalid_share": 1 - int(valid.sum()) / n})
    return records


Results = Annotated[Result | Sequence[Result], Listed(some=True, once=False, alone=True)]    # one or many


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def stamp() -> dict[str, Any]:
    """What every part's provenance ends with: the versions behind it and when it was made (UTC)."""
    return {"versions": versions(), "made": datetime.now(UTC).isoformat(timespec="seconds")}


@takes(ResultError)
def save_result(result: Result, path: File) -> None:
    """Save rows as `path` (.parquet) and provenance beside it (.json), with a digest of both. The provenance is written first: rows never
    lack it.

    A result that is there is replaced by it. Errors: ResultError for another ending, or a file that is no result of this project.
    """
    path = Path(path)
    note = path.with_suffix(".json")
    if path.suffix != ".parquet":
        raise ResultError(f"{path} cannot hold rows: give a name that ends in .parquet.")
    refuse_taken(note, mine=is_note)
    refuse_taken(path, mine=lambda rows: rows.is_file() and is_note(note))

    def noted(rows: Path) -> None:
        text = json.dumps(result.provenance, indent=1, default=str)
        digests = {"rows": digest(rows.read_bytes()), "note": digest(text.encode("utf-8", "surrogatepass"))}
        write_text(note, json.dumps({**json.loads(text), "digest": digests}, indent=1))

    write_whole(path, lambda beside: result.rows.to_parquet(beside, index=False, write_page_checksum=True), noted)


@takes(ResultError)
def load_result(path: File) -> Result:
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
        kept = said.pop("digest", None)    # a version that kept none wrote the folder otherwise
        if kept is not None and kept != {"rows": digest(path.read_bytes()),
                                             "note": digest(json.dumps(said, indent=1).encode("utf-8", "surrogatepass"))}:
            raise ValueError("it was changed since it was written")
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise ResultError(f"{path} or its provenance is damaged ({one_line(error)}). Delete both files to compute this part anew."
                          ) from error
    return Result(rows, said)


def is_note(path: Path) -> bool:
    """Whether a file is the provenance of a result: by its digest, or (of a version that kept none) by what every part's ends with."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and _is_noted(found)


def _is_noted(provenance: Mapping[str, Any]) -> bool:
    return "digest" in provenance or {"versions", "made"} <= set(provenance)


def json_value(value: Any) -> Any:
    """A number of numpy or pandas as JSON holds it: NaN and infinities become null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows of a table as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def records_of(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows of a table as JSON values: NaN and infinities become null."""
    return [{name: json_value(value) for name, value in row.items()} for row in as_records(table)]


def folder_kind(folder: Path) -> str:
    """What a results folder holds by its own note: comparison, calibration, or (anything else) study."""
    note = folder / STUDY
    try:
        found = json.loads(note.read_text("utf-8")) if is_file(note) else {}
    except (OSError, ValueError, RecursionError):
        return "study"    # reading it as one says what is wrong with the note
    return next((kind for kind in ("comparison", "calibration") if isinstance(found, dict) and kind in found), "study")


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


@dataclass(frozen=True)
class StudyFolder:
    """A folder of results from one configuration; parts that are there are not computed again."""

    path: Path

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any]) -> "StudyFolder":
        """Open or begin a folder. Errors: ResultError if it holds another configuration's results, or anything else."""
        if not _is_begun(path, config):
            write_text(path / STUDY, json.dumps(dict(config), indent=1))
        return cls(path)

    @classmethod
    @contextlib.contextmanager
    def claim(cls, path: Path, config: Mapping[str, Any], share: str = "") -> Iterator["StudyFolder"]:
        """`open` for this process alone, until the block ends; what a killed process had not finished writing is cleared away.

        share: one of several processes that write in the folder at the same time, such as "1-of-3": it keeps out a second one of its name,
        and one that claims the whole. They need no more than that, since every file appears whole, is the same whoever
        writes it, and has its unfinished name to itself.

        Errors: as `open`, and ResultError if another process is at work there, or the folder cannot be written in.
        """
        if not ranks.leads():    # writing is the first process' business
            ranks.agreed(None)
            yield cls(path)
            return
        _is_begun(path, config)    # a folder that is not ours is not touched
        busy = ResultError(f"another process{_holder(path)} is at work in {path}: wait until it ends, or give another --out (nothing was "
                           "touched).")
        with contextlib.ExitStack() as stack:
            try:
                if share:
                    stack.enter_context(one_process(path / f"{LOCK}-{share}", busy))
                    with one_process(path / LOCK, busy, wait=MOMENT):    # nobody has the whole; another share may just be looking
                        folder = cls.open(path, config)
                else:
                    stack.enter_context(one_process(path / LOCK, busy))
                    for lock in sorted(path.glob(f"{LOCK}-*")):
                        with one_process(lock, busy):
                            pass
                    for file in (*path.iterdir(), *path.glob(f"{PIECES}/*")):
                        if LEFTOVER.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                            file.unlink()
                    folder = cls.open(path, config)
            except OSError as error:
                raise ResultError(f"cannot write in {path}: {error.strerror or error}. Nothing that was there has changed.") from error
            if share:
                yield folder
                return
            write_text(path / HOLDER, json.dumps({"pid": os.getpid(), "host": socket.gethostname(),
                                                  "since": datetime.now(UTC).isoformat(timespec="seconds")}))
            ranks.agreed(None)    # the others go on when the folder is ours
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):    # it is but a note
                    (path / HOLDER).unlink()

    def holds(self, config: Mapping[str, Any], names: Iterable[str]) -> bool:
        """Whether the folder is of this configuration and has all of these parts: then there is nothing to write. Errors: as `open`."""
        return ranks.agreed(ranks.leads() and _is_begun(self.path, config)) and all(self.has(name) for name in names)

    def has(self, name: str) -> bool:
        """Whether the part `name` is finished."""
        return ranks.agreed(self._file(name).is_file())

    def _file(self, name: str) -> Path:
        check_parts([name])
        return self.path / f"{name}.parquet"

    def refuse_taken(self, names: Iterable[str]) -> None:
        """Whether every missing part can be saved, found out before any is computed. Errors: ResultError for what stands in its place."""
        for name in names:
            if not self.has(name):
                refuse_taken(self._file(name), what="--out")
                refuse_taken(self._file(name).with_suffix(".json"), what="--out", mine=is_note)

    def part(self, name: str, compute: Callable[[], Result]) -> Result:
        """The result `name`: read if it is there, else computed and saved."""
        file = self._file(name)
        if self.has(name):
            return load_result(file)
        result = compute()
        if ranks.leads():
            save_result(result, file)
        ranks.agreed(None)    # nobody looks for it before it is there
        return result


def _is_begun(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds a study, of this configuration. Errors: ResultError for another one, or a folder of anything else."""
    note = path / STUDY
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
    return (file.name.partition("-")[0] == LOCK and not file.stat().st_size) or (file.name == HOLDER and bool(_holder(file.parent))) or (
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
