"""Texts are data everywhere: none that came from a user, a file or a model becomes a formula, a tag, a script or an order to a terminal.

Every way out of the project has its one function here: `say` (terminals), `csv_text` (spreadsheets), `script_json` (scripts in pages),
`encodable` (files), `shortened` (pages and figures). HTML itself is escaped by jinja2's autoescape. This module does NOT know what is said.
"""

import hashlib
import json
import numbers
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from alignblind_mi.borders import ranks

if TYPE_CHECKING:
    import pandas as pd

# Controls (C0 but tab and line feed, delete, C1), line and paragraph separators, orders of writing direction, halves of a character and
# what XML and Unicode call no character.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe"
                     "\uffff]")
_UNSEEN_AND_BREAKS = re.compile(f"[\t\n]|{_UNSEEN.pattern}")
_FORMULA = re.compile(r"[\s\ufeff]*[=+\-@＝＋－＠]|[\t\r\n]")    # how a cell begins that a spreadsheet computes (OWASP, "CSV Injection")
SHOWN = 20    # rows of a table in a notebook
_IN_SCRIPTS = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def visible(text: object, *, lines: bool = True) -> str:
    r"""A text whose control characters, writing-direction marks and lone surrogates are written out: ESC becomes `\x1b`.

    lines: whether tabs and line feeds stay as they are (not in a cell of a table or a label).
    """
    return (_UNSEEN if lines else _UNSEEN_AND_BREAKS).sub(_written_out, str(text))


def _written_out(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


def encodable(text: str) -> str:
    r"""The text as a UTF-8 file can hold it: lone surrogates (of undecodable file names, of JSON's `\ud800`) are written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def encodable_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table whose texts are `encodable`: pandas and Parquet hold no other."""
    return {name: encodable(value) if isinstance(value, str) else value for name, value in row.items()}


def shortened(text: str, most: int) -> str:
    """At most `most` characters: the beginning and a mark of the whole, so that two long texts stay two. Shorter texts stay as they are."""
    if len(text) <= most:
        return text
    mark = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:6]
    return f"{text[:most - 9]}… #{mark}"


def middle_cut(text: str, most: int) -> str:
    """At most `most` characters: the beginning and the end, where a sentence says what to do. Shorter texts stay as they are."""
    return text if len(text) <= most else f"{text[: 2 * most // 3 - 3]} … {text[-(most // 3):]}"


def label(text: object, most: int = 60) -> str:
    """A text as one short line of a figure or a page: visible and shortened."""
    return shortened(visible(text, lines=False), most)


# --- what Python shows of a value ------------------------------------------------------------------------------------------------------

ONE_LINE, PIECE = 200, 48    # characters of a value that is shown, and of a field of it


def one_line(value: Any) -> str:
    """A dataclass in one line of at most 200 characters: its name and the fields that differ from their defaults, each shortened.

    For `__repr__`. It identifies a value and does not hold it: long lists are counted, arrays have their shape.
    """
    told = [(field.name, getattr(value, field.name)) for field in fields(value) if field.repr and not _is_default(value, field)]
    return named_line(value, ", ".join(f"{name}={_piece(given)}" for name, given in told))


def named_line(value: Any, about: str) -> str:
    """What `one_line` makes of a class whose words are its own."""
    return label(f"{type(value).__name__}({about})", ONE_LINE)


def _is_default(value: Any, field: Any) -> bool:
    usual = field.default if field.default_factory is MISSING else field.default_factory()
    given = getattr(value, field.name)
    return given is usual or (isinstance(given, (str, int, float, tuple, dict)) and type(given) is type(usual) and given == usual) or (
        is_dataclass(given) and type(given) is type(usual) and given == usual)


def _piece(given: Any) -> str:
    """A part of a value, shortened."""
    if isinstance(given, str):
        return repr(shortened(given, PIECE))
    if isinstance(given, Mapping):
        return f"{len(given)} of {label(', '.join(map(str, given)), PIECE)}" if given else "{}"
    if isinstance(given, (list, tuple)) and given and all(map(is_dataclass, given)):
        return f"{len(given)} of {type(given[0]).__name__}"
    if isinstance(given, (list, tuple)) and not hasattr(given, "_fields"):
        return label(f"({', '.join(map(_piece, given[:3]))}{f', ... {len(given)} in all' if len(given) > 3 else ''})", 2 * PIECE)
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        return f"{list(given.shape)} {given.dtype}"
    if hasattr(given, "shape"):
        return f"{given.shape[0]} rows x {given.shape[1]} columns"
    if callable(given) and hasattr(given, "__qualname__"):
        return label(given.__qualname__, PIECE)
    return label(repr(given), PIECE if not is_dataclass(given) else 2 * PIECE)


def html_summary(title: str, facts: Mapping[str, object], table: Sequence[Mapping[str, Any]] = ()) -> str:
    """A value as a notebook shows it: a title, some facts, a table of up to 20 rows. All of it is text: none of it can be a tag."""
    from markupsafe import escape

    lines = "".join(f"<tr><th>{escape(label(name))}</th><td>{escape(label(fact, ONE_LINE))}</td></tr>"
                    for name, fact in facts.items())
    out = f"<b>{escape(label(title, ONE_LINE))}</b><table>{lines}</table>"
    if table:
        head = "".join(f"<th>{escape(label(name))}</th>" for name in table[0])
        rows = "".join("<tr>" + "".join(f"<td>{escape(_shown_cell(cell))}</td>" for cell in row.values()) + "</tr>"
                       for row in table[:SHOWN])
        more = f"<p>{len(table) - SHOWN} more rows</p>" if len(table) > SHOWN else ""
        out += f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"
    return encodable(out)


def _shown_cell(cell: Any) -> str:
    if isinstance(cell, float):
        return "–" if cell != cell else f"{cell:.3g}"    # NaN is not itself
    return label(cell)


# --- terminals ------------------------------------------------------------------------------------------------------------------------


def say(text: object, *, err: bool = False, end: str = "\n") -> None:
    """Print a text as it is, on whatever terminal: without markup, control characters visible, what the encoding lacks written out."""
    if not ranks.leads():
        return
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write((visible(text) + end).encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def safe_streams() -> None:
    """Let standard output and error write out what their encoding lacks, whoever prints (rich's tables, other packages)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):    # what a test or a notebook has put in its place may not have it
            stream.reconfigure(errors="backslashreplace")


# --- files --------------------------------------------------------------------------------------------------------------------------


def csv_text(table: "pd.DataFrame") -> str:
    """The table as CSV, without its index. A text that a spreadsheet would compute (`=1+1`) begins with an apostrophe; numbers are numbers.

    Control characters are written out, as in `visible`: a lone carriage return would begin a row. Parquet rows have every text as it is.
    """
    safe = table.copy(deep=False)
    for i, dtype in enumerate(table.dtypes):
        if dtype.kind not in "biuf":
            safe.isetitem(i, [_cell(value) for value in table.iloc[:, i]])
    safe.columns = [_text_cell(str(name)) for name in table.columns]
    return encodable(safe.to_csv(index=False, lineterminator="\n"))


def _cell(value: Any) -> Any:
    import numpy as np
    import pandas as pd

    if value is None or value is pd.NA or value is pd.NaT or isinstance(value, (bool, int, float, np.number, np.bool_)):
        return value
    return _text_cell(str(value))


def _text_cell(text: str) -> str:
    seen = visible(text)
    return f"'{seen}" if _FORMULA.match(text) else seen


def script_json(value: Any) -> str:
    """A value as JSON that stands within a <script> or <style> and cannot end it: ASCII alone, `<`, `>` and `&` as escapes.

    Errors: ValueError for a number that is not finite, TypeError for what JSON does not hold.
    """
    return json_text(value, indent=None).translate(_IN_SCRIPTS)


def json_text(value: Any, *, indent: int | None = 1) -> str:
    """A value as JSON in visible ASCII characters, which `say` leaves as they are. Errors: as `script_json`."""
    return json.dumps(value, indent=indent, allow_nan=False).replace("\x7f", "\\u007f")


def shown(value: Any) -> str:
    """A value as a sentence shows it: short whatever it is, numbers of a thousand digits among them."""
    if isinstance(value, float):
        return repr(float(value)).removesuffix(".0")    # numpy's floats write their type as well
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        whole = int(value)
        return str(whole) if whole.bit_length() < 128 else f"a number of about {int(whole.bit_length() * 0.30103) + 1} digits"
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    try:
        return brief.repr(value)
    except ValueError:    # a number of very many digits in a list
        return f"a {type(value).__name__}"
