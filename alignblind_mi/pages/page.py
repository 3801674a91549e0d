"""What the three pages share: how numbers and the columns of tables are written, and how a page is made from its template and drawn.

Texts are escaped and shortened, pages run nothing and fetch nothing. This module does NOT know what a page says."""

import base64
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi.borders.texts import csv_text, encodable, label, shortened, visible
from alignblind_mi.pages import figures
from alignblind_mi.stimuli.protocol import STAYS, protocol_lines
from alignblind_mi.studies.drawn import write_drawn

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


LONGEST, LONGEST_TITLE = 500, 2000    # characters of a text on a page, and of the same text where it is pointed at
# Pages run nothing and fetch nothing: styles and pictures are inside them, the views beside them are shown in frames without rights.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-src 'self' file:; base-uri 'none'; form-action 'none'"


def save_shown(folder: Path, tables: dict[str, pd.DataFrame], drawn: dict[str, Figure]) -> dict[str, bytes]:
    """Write tables/NAME.csv, figures/NAME.png and figures/NAME.svg into a folder. Returns the figures as SVG, by name."""
    vectors = {name: figures.to_svg(figure) for name, figure in drawn.items()}
    files = {f"tables/{name}.csv": csv_text(table).encode() for name, table in tables.items()}
    for name, figure in drawn.items():
        files |= {f"figures/{name}.png": figures.to_png(figure), f"figures/{name}.svg": vectors[name]}
    write_drawn(folder, files)
    return vectors


@dataclass(frozen=True)
class Column:
    """A column of a shown table: its title and how a row's cell is written."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    numeric: bool = True


def percent(share: float | int | None) -> str:
    """A share in per cent with one decimal; a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def signed(value: float | int | None) -> str:
    """A signed number with two significant digits and a true minus; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:+.1f}" if abs(value) >= 10 else f"{value:+#.2g}"
    return text.replace("-", "−") if value else "0.0"


def plain(value: float | int | None) -> str:
    """A number that is never negative: two significant digits, or whole from 100 on."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:#.2g}".rstrip(".")


def points(value: Any) -> str:
    """A difference of rates in percentage points; a dash where there is none."""
    return "–" if value is None or pd.isna(value) else f"{100 * value:+.1f}"


def p_value(value: Any) -> str:
    """A p-value with two significant digits; a dash where there is none."""
    return "–" if value is None or pd.isna(value) else f"{value:.2g}"


def whole(value: Any) -> str:
    """A whole number, in groups of three digits; a dash where there is none."""
    return "–" if value is None or pd.isna(value) else f"{int(value):,}".replace(",", " ")


def yes(value: Any) -> str:
    """Yes or no; a dash where there is neither."""
    return "–" if value is None else "yes" if value else "no"


def text(title: str, name: str) -> Column:
    """A text as it is."""
    return Column(title, lambda row: str(row[name]), numeric=False)


def words(title: str, name: str) -> Column:
    """A name whose underscores are blanks."""
    return Column(title, lambda row: str(row[name]).replace("_", " "), numeric=False)


def value(title: str, name: str, write: Callable[[Any], str]) -> Column:
    """One number as `write` writes it."""
    return Column(title, lambda row: write(row.get(name)))


def count(title: str, name: str) -> Column:
    """A whole number."""
    return value(title, name, whole)


def share(title: str, name: str) -> Column:
    """A share in per cent."""
    return Column(title, lambda row: percent(row.get(name, math.nan)))


def shares(title: str, low: str, high: str) -> Column:
    """Two ends in per cent: an interval, or bounds."""
    return Column(title, lambda row: _ends(percent(row.get(low, math.nan)), percent(row.get(high, math.nan))))


def rate(title: str, name: str, low: str, high: str) -> Column:
    """A rate in per cent with its interval in brackets."""
    ends = shares("", low, high)
    return Column(title, lambda row: "–" if pd.isna(row.get(name, math.nan)) else f"{percent(row[name])} [{ends.cell(row)}]")


def mean(title: str, name: str, low: str, high: str, write: Callable[[Any], str] = signed) -> Column:
    """A mean or a difference with its interval in brackets."""
    def cell(row: dict[str, Any]) -> str:
        ends = _ends(write(row.get(low, math.nan)), write(row.get(high, math.nan)), ", ")
        return "–" if pd.isna(row.get(name, math.nan)) else f"{write(row[name])} [{ends}]"
    return Column(title, cell)


def _ends(low: str, high: str, between: str = "–") -> str:
    return "–" if low == high == "–" else f"{low}{between}{high}"


def flag(title: str, name: str) -> Column:
    """Whether something is so."""
    return Column(title, lambda row: yes(bool(row[name])), numeric=False)


def page_text(template: str, **given: Any) -> str:
    """A page from one of the package's templates. Every text is escaped, and shortened where it is longer than any that is meant."""
    return encodable(environment().get_template(template).render(given))


def environment() -> "Environment":
    """jinja2 over the package's templates: strict about names, with this module's ways to write numbers."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(loader=PackageLoader("alignblind_mi.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True, finalize=_shown)
    found.filters |= {"percent": percent, "signed": signed, "label": label, "whole": _paragraph}
    found.globals |= {"policy": POLICY, "protocol_lines": protocol_lines, "stays": STAYS, "muted": lambda table, row: False}
    return found


def _shown(value: Any) -> Any:
    """What stands in a page for a value: a text with its control characters written out, its end only when pointed at if it is long."""
    from markupsafe import Markup

    if hasattr(value, "__html__") or not isinstance(value, str):
        return value
    text = visible(value)
    if len(text) <= LONGEST:
        return text
    return Markup('<span title="{}">{}</span>').format(shortened(text, LONGEST_TITLE), shortened(text, LONGEST))


def _paragraph(text: str) -> "Markup":
    """The filter for our own paragraphs, however long."""
    from markupsafe import escape

    return escape(visible(text))


def as_uri(svg: bytes) -> "Markup":
    """An image as a data URI."""
    from markupsafe import escape

    return escape("data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii"))


def version_names(notes: Iterable[dict[str, Any]]) -> list[str]:
    """Every package with its version that some parts were made with."""
    return sorted({f"{name} {version}" for note in notes for name, version in note.get("versions", {}).items()})
