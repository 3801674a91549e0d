"""How a table is shown on a terminal or in a pipe, or as JSON records. Does NOT compute anything."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from alignblind_mi.borders.texts import json_text, say, visible
from alignblind_mi.results import json_value

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 160    # of a file or a pipe, which has no width to fit


def records_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as JSON values: NaN and infinities become null."""
    return [{key: json_value(value) for key, value in row.items()} for row in frame.to_dict("records")]    # type: ignore[misc]


def print_json(records: Sequence[Mapping[str, Any]]) -> None:
    """JSON records on standard output, and nothing else."""
    say(json_text(list(records)))


def print_table(title: str, rows: Sequence[Mapping[str, str]], *, note: str = "", styles: Mapping[str, str] | None = None) -> None:
    """A table of texts; a row whose first text but one (its status) is in `styles` is shown in that style."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table = Table(title=plain_text(title, style="italic"), title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0] if rows else ():
        table.add_column(plain_text(name), overflow="fold")
    for row in rows:
        texts = list(row.values())
        style = (styles or {}).get(texts[1] if len(texts) > 1 else "", "")
        table.add_row(*(plain_text(text, style=style if i == 1 else "") for i, text in enumerate(texts)))
    console.print(table)
    if note:
        console.print(Text(visible(note), style="dim"))


def plain_text(text: object, *, style: str = "") -> "Text":
    """A cell or a title as rich shows it: no markup, no emoji codes, control characters written out."""
    from rich.text import Text

    return Text(visible(text, lines=False), style=style)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, `-` where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def interval(row: Mapping[str, Any], low: str = "low", high: str = "high") -> str:
    """The ends of an interval, `-` where there is none."""
    return "-" if row[low] is None or row[high] is None else f"{number(row[low])} to {number(row[high])}"


def tagged(tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """The rows of all tables as JSON records; each says its table, the weights it is about, and the seed."""
    return [{"table": name, "revision": provenance["revision"], "seed": seed, **record}
            for name, table in tables.items() for record in records_of(table)]


def about(provenance: Mapping[str, Any], seed: int, out: Path) -> str:
    """What stands under a table: the model, its weights, the seed, and where the rows are."""
    decoding = provenance["config"]["decoding"]
    how = f"sampled at temperature {decoding['temperature']:g}" if decoding["temperature"] else "greedy"
    return (f"{provenance['model']}, revision {provenance['revision']}, {provenance['dtype']}, {provenance['engine']} engine; "
            f"seed {seed}, {how}; rows in {out}")
