"""What all figures share: palette, style, labels, legends, and how a figure becomes a PNG or an SVG file. Does NOT know what is drawn."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from alignblind_mi.borders.texts import label as short_label

# Okabe and Ito's palette: distinct for colour-blind readers and in grey print.
ROLE_COLOURS = {"base": "#56B4E9", "aligned": "#D55E00"}
SERIES_COLOURS = ("#0072B2", "#E69F00", "#666666", "#009E73", "#CC79A7", "#F0E442")
SERIES_MARKERS = ("o", "s", "^", "D", "v", "P")
CONTROL_NAMES = {"": "identifiers", "anchor_group": "words of the group sense", "anchor_other": "words of the other sense",
                 "text": "text alone, asked", "wrong_token": "word before", "random": "random vector"}
INK, PALE, UNBIASED = "#222222", "#D5D5D5", 0.5
LONGEST = 48    # characters of a name in a figure; tables have it whole
STYLE: dict[Any, Any] = {
    "figure.facecolor": "#FFFFFF", "figure.dpi": 100, "savefig.dpi": 200, "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 9, "axes.edgecolor": "#555555", "axes.linewidth": 0.8, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.7, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.frameon": False, "legend.fontsize": 9, "hatch.linewidth": 0.6, "svg.hashsalt": "alignblind_mi",
    "text.parse_math": False, "text.usetex": False,    # names are texts: a dollar sign in one begins no formula
}


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def in_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under the style of this module, with names as short lines, and leave matplotlib's settings as they were."""
    @wraps(draw)
    def styled(*args: object, **kwargs: object) -> Figure:
        with _style():
            return draw(*map(_drawable, args), **{name: _drawable(value) for name, value in kwargs.items()})
    return styled


def _drawable(given: object) -> object:
    """A table, or a text, whose names are labels: one line, at most so long, no control characters. What differs still differs."""
    if isinstance(given, str):
        return short_label(given, LONGEST)
    if not isinstance(given, pd.DataFrame):
        return given
    table = given.copy(deep=False)
    for name in [name for name, dtype in given.dtypes.items() if dtype.kind not in "biufM"]:
        table[name] = [short_label(value, LONGEST) if isinstance(value, str) else value for value in given[name]]
    return table


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, 200 dots per inch."""
    return _saved(figure, "png", {"Software": None})


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG with letters as paths; the same figure gives the same bytes."""
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    out = io.BytesIO()
    with _style():
        figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


def mute(axes: Sequence[Axes]) -> None:
    """Grey out what some panels show, and say so across them: the numbers stay, and are no statement."""
    for axis in axes:
        for artist in (*axis.lines, *axis.collections, *axis.patches, *axis.texts):
            artist.set_alpha(0.25)
        axis.text(0.5, 0.5, "no statement", transform=axis.transAxes, ha="center", va="center", color="#777777", fontsize=10,
                  fontweight="bold", bbox={"facecolor": "#FFFFFF", "edgecolor": "#BBBBBB", "boxstyle": "round,pad=0.35"}, zorder=10)


def rate_bars(axis: Axes, strip: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    """Grouped bars of `rate` with both intervals, and the invalid share hatched in the strip. Columns: group, series and a summary's."""
    groups, series = list(table["group"].unique()), [name for name in colours if name in set(table["series"])]
    width = 0.8 / max(1, len(series))
    for j, name in enumerate(series):
        rows = table[table["series"] == name].set_index("group").reindex(groups)
        x = [i + offset(j, len(series), width) for i in range(len(groups))]
        axis.bar(x, rows["rate"], width * 0.92, color=colours[name], label=name, zorder=2)
        strip.bar(x, rows["invalid_share"], width * 0.92, color="#FFFFFF", edgecolor=colours[name], hatch="////", lw=0.9, label=name)
        for at, (_, row) in zip(x, rows.iterrows(), strict=True):
            whiskers(axis, at, row, INK)
            write_value(axis, at, row)
            strip.text(at, row["invalid_share"] + 0.04, percent(row["invalid_share"]), ha="center", va="bottom", fontsize=7, color=INK)
    share_axis(axis, headroom=0.1)
    share_axis(strip, headroom=0.4, ticks=(0.0, 1.0), line=False)
    strip.set_xticks(range(len(groups)), [f"{group}\n{counts(table, group)}" for group in groups])


def write_value(axis: Axes, at: float, row: pd.Series) -> None:
    """The rate in words above its interval."""
    if math.isnan(row["rate"]):
        axis.text(at, 0.02, "no valid answer", ha="center", va="bottom", fontsize=7.5, color=INK, rotation=90)
        return
    axis.text(at, row["high"] + 0.015, percent(row["rate"]), ha="center", va="bottom", fontsize=8, color=INK)


def counts(table: pd.DataFrame, group: str) -> str:
    """How many answers or readings a group's points stand for, one number where they agree."""
    found = list(dict.fromkeys(int(n) for n in table[table["group"] == group]["n"] if not math.isnan(n)))
    return "n = " + " / ".join(map(str, found))


def band(axis: Axes, rows: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """Means by layer as a line with its interval as a band. Columns: layer, mean, low, high."""
    axis.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.22, lw=0)
    axis.plot(rows["layer"], rows["mean"], color=colour, marker=marker, ms=3.5, lw=1.5, label=label)


def forest(axis: Axes, y: Sequence[float], values: pd.Series, low: pd.Series, high: pd.Series, colour: str, marker: str,
            label: str) -> None:
    """Estimates with their intervals as horizontal lines."""
    axis.hlines(y, low, high, color=colour, lw=2.4, zorder=3)
    axis.plot(values, y, color=colour, marker=marker, ms=5.5, ls="none", mec="#FFFFFF", mew=0.6, label=label, zorder=4)


def whiskers(axis: Axes, x: float, row: pd.Series, colour: str) -> None:
    """The interval as a thick line, the rates of templates from lowest to highest as a thin one beside it; nothing without an answer."""
    if math.isnan(row["rate"]):
        return
    axis.vlines([x], row["low"], row["high"], color=colour, lw=2.4, zorder=4)
    axis.vlines([x + 0.04], row["template_min"], row["template_max"], color=colour, lw=0.9, zorder=4)


def share_axis(axis: Axes, *, headroom: float = 0.05, ticks: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), line: bool = True) -> None:
    """An axis of shares from 0 to 1."""
    axis.set_ylim(0 if line else -0.06, 1 + headroom)
    axis.set_yticks(list(ticks))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if line:
        axis.axhline(UNBIASED, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=3)


def offset(j: int, n: int, width: float) -> float:
    """Where the j-th of n series stands beside its group's middle."""
    return (j - (n - 1) / 2) * width


def colour_of(j: int) -> str:
    """The colour of the j-th series."""
    return SERIES_COLOURS[j % len(SERIES_COLOURS)]


def marker_of(j: int) -> str:
    """The marker of the j-th series."""
    return SERIES_MARKERS[j % len(SERIES_MARKERS)]


def percent(share: float | int) -> str:
    """A share as a whole percentage for a label: 0.973 -> '97'."""
    return f"{100 * share:.0f}"


def number(value: float | int) -> str:
    """A number with two significant digits: 0.18812 -> '0.19'; 'none' where there is none."""
    return "none" if math.isnan(value) else f"{value:#.2g}".rstrip(".")


def legend_below(figure: Figure, handles: Sequence[object]) -> None:
    """A legend above the panels, in one or two rows."""
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles) if len(handles) < 7 else (len(handles) + 1) // 2)


def patch_key(colour: str, label: str) -> object:
    """A key of an area."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=short_key(label))


def line_key(colour: str, label: str, *, width: float = 1.4, marker: str = "", ls: str = "-") -> object:
    """A key of a line or a marker."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, lw=width, marker=marker, ms=6, ls=ls, label=short_key(label))


def short_key(label: str) -> str:
    """A label as a legend shows it: matplotlib leaves out those that begin with an underscore."""
    return short_label(f" {label}" if label.startswith("_") else label, LONGEST)


def swatches(colours: dict[str, str], present: Sequence[str]) -> list[object]:
    """Keys of the colours that are present."""
    return [patch_key(colour, name) for name, colour in colours.items() if name in present]


def mark_keys(labels: Sequence[str], colours: Sequence[str], *, line: bool = False) -> list[object]:
    """Keys of series, each with its marker."""
    ls = "-" if line else "none"
    return [line_key(colour, label, marker=marker_of(j), ls=ls) for j, (label, colour) in enumerate(zip(labels, colours, strict=True))]


def interval_keys() -> list[object]:
    """Keys of the interval, the rates of templates and the unbiased rate."""
    return [line_key(INK, "95 %", width=2.4), line_key(INK, "lowest to highest template", width=0.9),
            line_key(INK, "unbiased", width=0.9, ls="--")]
