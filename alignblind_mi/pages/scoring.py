"""Scores stored answers and interpretations without any model: finds result files, judges every text, gives one record per group.

Reads released JSON files (answers, or interpretations one object a line), this project's Parquet results and Inspect's logs; the records
are plain JSON values. It does NOT run models, and prints only in `render`.
"""

import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from alignblind_mi.borders.reading import check_file, foreign, is_file, is_folder, named
from alignblind_mi.borders.settings import Names, takes
from alignblind_mi.borders.texts import encodable
from alignblind_mi.errors import ScoreError
from alignblind_mi.exchange.inspect_logs import ENDING, inspect_rows, read_inspect_logs
from alignblind_mi.pages.terminal import print_table
from alignblind_mi.results import STUDY, is_note
from alignblind_mi.statistics.rates import label_shares, summarise
from alignblind_mi.stimuli.answers import RULES, judge
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, Concept, load_concept
from alignblind_mi.stimuli.readings import classify, is_interpretations, read_interpretations, reading_names
from alignblind_mi.stimuli.released import read_released

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_BY = ("model", "cue", "category")
_WITH_SEVERAL = ("folder", "concept", "treatment", "design")    # join the default grouping where the rows have more than one of them
_ALWAYS = ("model", "cue", "category", "kind")
_NEEDED = ("answer", "kind", "marked", "unmarked", "positive", "negative", "statement", "template", "word_pair", "model", "cue", "category")
_NOT_KEYS = {"answer", "prompt", "outcome", "reason", "log_odds", "n_tokens", "finished", "interpretation", "text"}
# Records that this project keeps beside its results; other JSON is taken for answers.
_RECORDS = {"calibration", "provenance", "config", "report", "organism", "study", "settings", "training"}
_OF_A_RUN = {"study", "comparison", "calibration", "plan", "written"}    # beside study.json
_READ_BY = ("folder", "model", "treatment", "control")    # how interpretations are grouped where nothing else is asked for
_NUMBERS = ("n", "stereotyped", "reversed", "rejected", "invalid", "invalid_share", "rate", "low", "high", "interval", "template_min",
            "template_max", "worst", "best")


@takes(ScoreError)
def score(paths: Sequence[Path], *, rule: str = "robust", by: Names = (), concept: Concept | None = None) -> list[dict[str, Any]]:
    """One record per group of the answers and interpretations in `paths` (files or folders, searched recursively), judged anew.

    A record of this project stands for the rows it is about: `comparison.json` for its folder, a provenance for the rows beside it. Rows of
    several results folders are told apart by the column `folder`.

    Answers: see `score_answers`. Interpretations (released files, one JSON object a line, or this project's SelfIE rows): see
    `score_interpretations`.

    Errors: ScoreError naming the path, key or rule that cannot be used, and what can.
    """
    if rule not in RULES:
        raise ScoreError(f"unknown rule {rule!r}. Known: {', '.join(RULES)}.")
    answers, interpretations = _read_all(paths)
    kinds = [rows for rows in (answers, interpretations) if rows is not None]
    if len(kinds) > 1 and any(set(by) <= set(rows.columns) for rows in kinds):    # keys of one kind score that kind
        answers, interpretations = (rows if rows is not None and set(by) <= set(rows.columns) else None
                                    for rows in (answers, interpretations))
    records = [] if answers is None else score_answers(answers, rule=rule, by=by)
    concept = concept or load_concept(DEFAULT_CONCEPT)
    return records + ([] if interpretations is None else score_interpretations(interpretations, concept, by=by))


@takes(ScoreError)
def score_interpretations(rows: pd.DataFrame, concept: Concept, *, by: Names = ()) -> list[dict[str, Any]]:
    """One record per group of free-text interpretations, classified by the lexicons of the concept's senses.

    by: columns to group by (default: the model, and folder, treatment and control where there are several). Each record has kind
    ("interpretation"), model, the keys of `by`, rule ("lexicon"), n, the number of readings of each sense and of none ("other"), and for
    each its share (`<name>_share`) with its interval (`<name>_low`, `<name>_high`), which takes a prompt's readings as dependent (0 to 1
    with one prompt only, which says nothing of others).
    """
    _check_keys(rows, by)
    keys = list(by) or [name for name in _READ_BY if name in rows and (name == "model" or rows[name].nunique() > 1)]
    read = rows.assign(reading=[classify(str(text), concept) for text in rows["interpretation"]])
    records = []
    for key, group in read.groupby(keys, sort=False, dropna=False):
        record = {"model": _common(group["model"])} | dict(zip(keys, map(_plain, key), strict=True))
        labels = [group[name].astype(str).to_numpy() for name in ("prompt", "template") if name in group]
        records.append(record | {"kind": "interpretation", "rule": "lexicon", "n": len(group)}
                       | label_shares(group["reading"].tolist(), reading_names(concept), labels))
    return records


@takes(ScoreError)
def score_answers(rows: pd.DataFrame, *, rule: str = "robust", by: Names = ()) -> list[dict[str, Any]]:
    """One record per group of answers, judged by `rule`.

    by: columns to group by (default: model, cue, category, and folder, concept, treatment and design where there are several); the kind of
    the questions always separates. Each record has model, cue, category, kind (the groups' common value, or "all" over several), the keys
    of `by`, rule, and the numbers of `statistics.summarise`; `rejected` for explicit answers only, and `refused` (how many refuse, see
    `stimuli/refusals.py`) where a column says so, as of Inspect's logs. What cannot be computed is None.

    Errors: ScoreError naming a key that the rows do not have.
    """
    _check_keys(rows, by)
    keys = list(by) or [*DEFAULT_BY, *(name for name in _WITH_SEVERAL if name in rows and rows[name].nunique() > 1)]
    judged = judge_rows(rows, rule)
    table = summarise(judged, by=list(dict.fromkeys([*keys, "kind"])))
    groups = judged.groupby([*dict.fromkeys([*keys, "kind"])], sort=False, dropna=False)
    commons = [{name: _common(group[name]) for name in _ALWAYS} for _, group in groups]
    said = [{"refused": int(group["refused"].eq(True).sum())} if "refused" in group else {} for _, group in groups]
    return [_record(common, row, keys, rule) | more for common, row, more in zip(commons, table.to_dict("records"), said, strict=True)]


def judge_rows(rows: pd.DataFrame, rule: str = "robust") -> pd.DataFrame:
    """The rows with `outcome` and `reason` by `rule`, whatever they had before."""
    names = [str(name) for name in rows.columns]
    labels = (dict(zip(names, values, strict=True)) for values in rows.itertuples(index=False, name=None))
    outcomes = [judge(str(row["answer"]), row, rule, prompt=str(row.get("prompt", ""))) for row in labels]
    return rows.assign(outcome=[outcome.label for outcome in outcomes], reason=[outcome.reason for outcome in outcomes])


def _check_keys(rows: pd.DataFrame, by: Sequence[str]) -> None:
    allowed = sorted(set(map(str, rows.columns)) - _NOT_KEYS)
    unknown = [name for name in by if name not in allowed]
    if unknown:
        raise ScoreError(f"cannot group by {', '.join(map(repr, unknown))}. Allowed: {', '.join(allowed)}.")


def _common(values: "pd.Series[Any]") -> Any:
    found = values.unique()
    return _plain(found[0]) if len(found) == 1 else "all"


def _record(common: Mapping[str, Any], row: Mapping[Any, Any], keys: Sequence[str], rule: str) -> dict[str, Any]:
    shown = [name for name in _NUMBERS if name != "rejected" or common["kind"] == "explicit"]
    return {**common, **{key: _plain(row[key]) for key in keys}, "rule": rule, **{name: _plain(row[name]) for name in shown}}


def _plain(value: Any) -> Any:
    """A JSON value: numpy scalars as Python's, NaN and infinities as None."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, (bool, int, float, str)) else str(value)


# --- reading ------------------------------------------------------------------------------------------------------------------------------


def read_answers(paths: Sequence[Path]) -> pd.DataFrame:
    """All answers in files and folders, each file once; the columns `file` and `folder` (of results, else "") say where a row comes from.

    Errors: ScoreError for a path that does not exist, holds no answers or cannot be read.
    """
    answers, _ = _read_all(paths)
    if answers is None:
        raise ScoreError(f"{', '.join(map(str, paths))}: there are no answers there, only interpretations.")
    return answers


def _read_all(paths: Sequence[Path]) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """All answers and all interpretations of files and folders, None where there are none of a kind."""
    files: dict[Path, pd.DataFrame] = {}
    for path in map(Path, paths):
        found = dict(_found(path))
        if not found:
            raise ScoreError(f"{path} holds no answers: expected released .json files, results (.parquet) with a column 'answer', "
                             f"interpretations (.jsonl) or logs of Inspect ({ENDING}).")
        files.update({file: rows for file, rows in found.items() if file not in files})
    if not files:
        raise ScoreError("nothing to score: give result files or folders.")
    folders = _folders(files)
    named = [rows.assign(file=encodable(file.name), folder=encodable(folders[file])) for file, rows in files.items()]
    return _joined([rows for rows in named if "answer" in rows]), _joined([rows for rows in named if "answer" not in rows])


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    if not frames:
        return None
    rows = pd.concat(frames, ignore_index=True)
    texts = [name for name in rows.columns if rows[name].dtype == object or isinstance(rows[name].dtype, pd.StringDtype)]
    return rows.assign(**{name: rows[name].fillna("") for name in texts})


def _folders(files: Iterable[Path]) -> dict[Path, str]:
    """The results folder that each file lies in, named from the folder that all of these lie in; "" for a file that lies in none."""
    folders = {file: next((folder for folder in file.parents if is_file(folder / STUDY)), None) for file in files}
    several = {folder for folder in folders.values() if folder is not None}
    above = os.path.commonpath(several) if len(several) > 1 else next(iter(several), Path()).parent
    return {file: "" if folder is None else os.path.relpath(folder, above) for file, folder in folders.items()}


def _about(path: Path) -> Path:
    """What a record of this project is about: the folder of a run, the rows beside their provenance. Any other path stays as it is."""
    if path.suffix.lower() != ".json" or not is_file(path):
        return path
    rows = path.with_suffix(".parquet")
    if is_file(rows) and is_note(path):
        return rows
    return path.parent if path.stem in _OF_A_RUN and is_file(path.parent / STUDY) and any(path.parent.glob("*.parquet")) else path


def _found(path: Path) -> Iterator[tuple[Path, pd.DataFrame]]:
    """(resolved path, rows) of every file with answers at a path."""
    path = _about(path)
    if is_folder(path):
        for file in sorted(path.rglob("*")):
            rows = _read(file) if _may_hold_answers(file, path) else None
            if rows is not None:
                yield file.resolve(), rows
        return
    if not is_file(path):
        raise ScoreError(f"{named('', path)} does not exist or is no file: give result files (.json, .parquet) or folders of them.")
    if path.suffix.lower() not in (".json", ".jsonl", ".parquet", ENDING):
        raise ScoreError(f"{path} is neither .json (released answers), .jsonl (interpretations), .parquet (results of this project) nor "
                         f"{ENDING} (a log of Inspect).")
    rows = read_inspect_logs(path) if path.suffix.lower() == ENDING else _read(path)
    if rows is None:
        raise ScoreError(f"{path} has no column 'answer': it holds other measurements, which have no outcome to score.")
    yield path.resolve(), rows


def _may_hold_answers(file: Path, root: Path) -> bool:
    """Whether a file found in a folder could be a result: not a record beside one, not part of a saved model, not hidden."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    if hidden or not file.is_file():
        return False
    if file.suffix.lower() == ".json":
        record = file.stem in _RECORDS or (file.stem in _OF_A_RUN and is_file(file.parent / STUDY))
        return not record and not file.with_suffix(".parquet").is_file() and not _saved_model(file.parent)
    return file.suffix.lower() in (".parquet", ENDING) or is_interpretations(file)


def _saved_model(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or any(folder.glob("*.safetensors"))


def _read(file: Path) -> pd.DataFrame | None:
    """Rows of a file; None for results of this project that hold neither answers nor interpretations, and for logs of other tasks."""
    if file.suffix.lower() == ".parquet":
        return _read_result(file)
    if file.suffix.lower() == ENDING:
        return inspect_rows(file)
    named = file.suffix.lower() == ".jsonl"    # given by name: an error says what is wrong in it
    return read_interpretations(file) if named or is_interpretations(file) else read_released(file)


def _read_result(file: Path) -> pd.DataFrame | None:
    from pyarrow import parquet

    check_file(file, "", ScoreError)
    with foreign(f"{file} is damaged", ScoreError, "delete it and compute it anew"):
        names = parquet.read_schema(file).names
    if "answer" not in names and not {"text", "reading"} <= set(names):
        return None
    with foreign(f"{file} is damaged", ScoreError, "delete it and compute it anew"):
        rows = pd.read_parquet(file)
    if "answer" not in rows:    # SelfIE rows: the column `interpretation` names the prompt there, the context is what was read
        rows = rows[rows["instrument"] == "selfie"] if "instrument" in rows else rows    # a comparison's other instruments have no texts
        return rows.assign(interpretation=rows["text"], prompt=rows["context"])
    missing = [name for name in _NEEDED if name not in rows.columns]
    if missing:
        raise ScoreError(f"{file} has answers but lacks the column(s) {', '.join(missing)}: it is no result of this project.")
    return rows


# --- showing ------------------------------------------------------------------------------------------------------------------------------


def render(records: Sequence[Mapping[str, Any]], console: "Console | None" = None) -> None:
    """Print the records as tables: of answers, the rate with its interval, extremes by template and bounds; of readings, the senses."""
    answers = [record for record in records if record["kind"] != "interpretation"]
    interpretations = [record for record in records if record["kind"] == "interpretation"]
    if answers or not interpretations:
        _render("Share of stereotyped answers" if answers else "No answers", answers, (*_NUMBERS, "refused"), list(map(_cells, answers)),
                "rate: stereotyped among the valid answers. 95 %: over word pairs and templates. templates: the lowest, the highest.\n"
                "bounds: every invalid answer counted against, or with, the stereotype.", console)
    if interpretations:
        _render_interpretations(interpretations, console)


def _render_interpretations(records: Sequence[Mapping[str, Any]], console: "Console | None") -> None:
    names = [name.removesuffix("_share") for name in records[0] if name.endswith("_share")]
    numbers = {"n", *names, *(f"{name}_{end}" for name in names for end in ("share", "low", "high"))}
    cells = [{"n": str(record["n"]), **{name: str(record[name]) for name in names},
              **{f"{name} %": f"{_percent(record[f'{name}_share'])} [{_range(record, f'{name}_low', f'{name}_high')}]" for name in names}}
             for record in records]
    _render("Interpretations by sense", records, numbers, cells,
            "by the lexicons of the concept's senses; other: a text that names neither. In brackets: 95 %, prompts as units.", console)


def _render(title: str, records: Sequence[Mapping[str, Any]], numbers: Container[str], cells: Sequence[Mapping[str, str]], note: str,
            console: "Console | None") -> None:
    """A table of the records' keys, those that all have in common in its title, and their cells."""
    rules = list(dict.fromkeys(f"{record['rule']} rule" for record in records))
    keys = [name for name in (records[0] if records else ()) if name not in numbers and name != "rule"]
    rows = [{**{key: str(record[key]) for key in keys}, **shown} for record, shown in zip(records, cells, strict=True)]
    print_table(title, rows, said=rules, once=keys, right=list(cells[0]) if cells else (), note=note, console=console)


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    refused = {"refused": str(record["refused"])} if "refused" in record else {}
    return {**{name: str(record.get(name, "-")) for name in ("n", "stereotyped", "reversed", "rejected")}, **refused,
            "invalid": f"{record['invalid']} ({100 * record['invalid_share']:.0f} %)", "rate %": _percent(record["rate"]),
            "95 %": _range(record, "low", "high"), "templates %": _range(record, "template_min", "template_max"),
            "bounds %": _range(record, "worst", "best")}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _range(record: Mapping[str, Any], low: str, high: str) -> str:
    return "-" if record[low] is None or record[high] is None else f"{_percent(record[low])}–{_percent(record[high])}"
