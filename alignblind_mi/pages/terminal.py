"""How a table is shown on a terminal or in a pipe, or as JSON records. Does NOT compute anything.

Numbers, intervals and names are never cut nor folded: a table that does not fit says less, or becomes blocks of lines.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from alignblind_mi.borders import ranks
from alignblind_mi.borders.texts import json_text, say, visible
from alignblind_mi.results import records_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDTH = 160    # of a file or a pipe, which has no width to fit unless COLUMNS gives it one
SENTENCE = 24    # the least width of a column of sentences
Line = str | tuple[str, ...]    # a sentence, or parts that stay whole


def print_json(records: Sequence[Mapping[str, Any]]) -> None:
    """JSON records on standard output, and nothing else."""
    say(json_text(list(records)))


def print_table(title: str, rows: Sequence[Mapping[str, str]], *, said: Sequence[str] = (), once: Collection[str] = (),
                prose: Collection[str] = (), right: Collection[str] = (), note: str | Sequence[Line] = "",
                styles: Mapping[str, str] | None = None, console: "Console | None" = None) -> None:
    """A table of texts in which nothing is cut or folded but the columns of `prose`, and these at blanks alone.

    Where it does not fit the width, columns that say the same in every row are left out and said in the title, in brackets (those of `once`
    always are); where that is not enough, each row is a block of lines `name: value`.

    said: what else stands in these brackets. prose: columns of sentences. right: columns set to the right. note: what stands below, a text
    or lines. styles: a row whose first text but one (its status) is in them is shown so. console: where (default: standard output).
    """
    console, styles = console or _console(), styles or {}
    rows = [{visible(name, lines=False): visible(text, lines=False) for name, text in row.items()} for row in rows]
    every = list(rows[0]) if rows else []
    same = [name for name in every if len({row[name] for row in rows}) == 1]
    names = [name for name in every if name not in same or name not in once] or every[:1]
    widths = _widths(rows, names, prose, console.width)
    if widths is None and len(rows) > 1:
        names = [name for name in names if name not in same] or names[:1]
        widths = _widths(rows, names, prose, console.width)
    left_out = [f"{name} {rows[0][name]}" for name in every if name not in names and rows[0][name]]
    _print(console, [*title.split(" "), *_in_brackets([*said, *left_out])], "italic")
    if widths is None:
        _print_blocks(console, rows, names, prose, styles)
    elif rows:
        _print_rows(console, rows, widths, right, styles)
    for line in note.split("\n") if isinstance(note, str) else note:
        if line:
            _print(console, line.split(" ") if isinstance(line, str) else _listed(line), "dim")


def _console() -> "Console":
    from rich.console import Console

    console = Console(quiet=not ranks.leads())
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = WIDTH
    return console


def _widths(rows: Sequence[Mapping[str, str]], names: Sequence[str], prose: Collection[str], width: int) -> dict[str, int] | None:
    """The width of each column, so that the table is not wider than `width`; None where something would have to be cut."""
    from rich.cells import cell_len

    full = {name: max(map(cell_len, (name, *(row[name] for row in rows)))) for name in names}
    words = {name: max((cell_len(word) for row in rows for word in row[name].split()), default=0) for name in names if name in prose}
    widths = full | {name: max(cell_len(name), longest, min(full[name], SENTENCE)) for name, longest in words.items()}
    spare = width - sum(widths.values()) - 2 * len(names) - 1    # two blanks between columns and at the right, one at the left
    if spare < 0:
        return None
    for _ in range(spare):
        narrow = [name for name in words if widths[name] < full[name]]
        if not narrow:
            break
        widths[min(narrow, key=widths.__getitem__)] += 1
    return widths


def _print_rows(console: "Console", rows: Sequence[Mapping[str, str]], widths: Mapping[str, int], right: Collection[str],
                styles: Mapping[str, str]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, width in widths.items():
        table.add_column(plain_text(name), width=width, justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*(plain_text(row[name], style=_style(row, name, styles)) for name in widths))
    console.print(table)


def _print_blocks(console: "Console", rows: Sequence[Mapping[str, str]], names: Sequence[str], prose: Collection[str],
                  styles: Mapping[str, str]) -> None:
    """A block of lines for each row, empty texts left out."""
    for row in rows:
        console.print()
        shown = [name for name in names if row[name]]
        for name in shown:
            pieces = [f"{name}:", *row[name].split()] if name in prose else [f"{name}: {row[name]}"]
            _print(console, pieces, _style(row, name, styles), indent="" if name == shown[0] else "  ")
    console.print()


def _style(row: Mapping[str, str], name: str, styles: Mapping[str, str]) -> str:
    """How a cell is shown: as its text says if it is the row's status, its first text but one."""
    return styles.get(row[name], "") if list(row).index(name) == 1 else ""


def _print(console: "Console", pieces: Sequence[str], style: str, indent: str = "") -> None:
    """Pieces with blanks between them, in lines that are not wider than the console unless a piece is: none is broken."""
    from rich.cells import cell_len

    first, *rest = (visible(piece, lines=False) for piece in pieces)
    lines = [indent + first]
    for piece in rest:
        if cell_len(f"{lines[-1]} {piece}") > console.width:
            lines.append(f"{indent}  {piece}")
        else:
            lines[-1] += f" {piece}"
    for line in lines:
        console.print(plain_text(line, style=style), soft_wrap=True)


def _listed(parts: Sequence[str]) -> list[str]:
    """Parts with commas between them."""
    return [f"{part}," for part in parts[:-1]] + list(parts[-1:])


def _in_brackets(parts: Sequence[str]) -> list[str]:
    if not parts:
        return []
    first, *rest = _listed([*parts[:-1], f"{parts[-1]})"])
    return [f"({first}", *rest]


def plain_text(text: object, *, style: str = "") -> "Text":
    """A cell or a title as rich shows it: no markup, no emoji codes, control characters written out."""
    from rich.text import Text

    return Text(visible(text, lines=False), style=style)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, `-` where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def interval(row: Mapping[str, Any], low: str = "low", high: str = "high") -> str:
    """The ends of an interval, `-` where there is none."""
    return "-" if row.get(low) is None or row.get(high) is None else f"{number(row[low])} to {number(row[high])}"


def improbable(row: Mapping[str, Any]) -> str:
    """The share of items whose scored answers are improbable, of how many; `-` where none has the probabilities of its answers."""
    share = row["improbable"]
    return "-" if share is None or not math.isfinite(share) else f"{share:.0%} of {row['scored']}"


def tagged(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any], seed: int, **more: str) -> list[dict[str, Any]]:
    """The rows of all tables as JSON records; each says its table, the weights it is about, the seed, and `more`."""
    return [{"table": name, "revision": provenance["revision"], "seed": seed, **more, **record}
            for name, table in tables.items() for record in records_of(table)]


def about(provenance: Mapping[str, Any], seed: int, out: Path, *more: str) -> tuple[str, ...]:
    """What stands under a table, in parts: the model, its weights, the seed, where the rows are, and `more`."""
    decoding = provenance["config"]["decoding"]
    how = f"sampled at temperature {decoding['temperature']:g}" if decoding["temperature"] else "greedy"
    return (provenance["model"], f"revision {provenance['revision']}", provenance["dtype"], f"{provenance['engine']} engine",
            f"seed {seed}", how, f"rows in {out}", *more)
