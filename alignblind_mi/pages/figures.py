"""Figures of a study, drawn from summary tables: each function takes a table and gives a matplotlib Figure.

Computes nothing but layout, so every drawn number is a number of the table. This module does NOT know models, rows or files, nor how
a table was made.
"""

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
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

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


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
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


@_styled
def behaviour_figure(rates: pd.DataFrame, log_odds: pd.DataFrame) -> Figure:
    """Implicit and explicit rates by category and role (after figure 2 of the paper), invalid shares below, mean log-odds beside.

    rates: role, kind, category, n, rate, low, high, cluster_low, cluster_high, invalid_share. log_odds: role, category, n, mean, low, high.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    top = figure.subplots(2, 3, height_ratios=(4, 1.1), width_ratios=(1, 1, 0.85), sharex="col", squeeze=False)
    for column, (kind, title) in enumerate((("implicit", "Implicit"), ("explicit", "Explicit"))):
        shown = rates[rates["kind"] == kind].rename(columns={"category": "group", "role": "series"})
        _rate_bars(top[0][column], top[1][column], shown, ROLE_COLOURS)
        top[0][column].set_title(f"{title} bias")
    top[0][0].set_ylabel("stereotyped, % of valid")
    top[1][0].set_ylabel("invalid")
    _points(top[0][2], log_odds.rename(columns={"category": "group", "role": "series"}), ROLE_COLOURS)
    top[0][2].set_title("Implicit, by probability")
    top[0][2].set_ylabel("mean log-odds (nats)")
    top[0][2].tick_params(labelbottom=True)
    top[1][2].set_visible(False)
    _legend(figure, _swatches(ROLE_COLOURS, list(rates["role"].unique())) + _interval_keys())
    return figure


@_styled
def position_figure(table: pd.DataFrame) -> Figure:
    """Association and position by template and role, balanced design.

    Columns: role, template, n, rate, low, high (stereotyped), position, position_low, position_high (first word with first option).
    """
    named = table.rename(columns={"template": "group"})
    templates, roles = list(table["template"].unique()), list(table["role"].unique())
    figure = Figure(figsize=(9.5, 1.5 + 0.55 * len(templates)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    for axis, name, low, high in ((axes[0], "rate", "low", "high"), (axes[1], "position", "position_low", "position_high")):
        for j, role in enumerate(roles):
            rows = table[table["role"] == role].set_index("template").reindex(templates)
            y = [i + _offset(j, len(roles), 0.28) for i in range(len(templates))]
            _forest(axis, y, rows[name], rows[low], rows[high], ROLE_COLOURS.get(role, INK), _marker(j), role)
        axis.axvline(UNBIASED, color=INK, lw=0.9, ls=(0, (4, 3)))
        axis.grid(axis="x")
        axis.set_xlim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes[0].set_yticks(range(len(templates)), [f"{name}\n{_counts(named, name)}" for name in templates])
    axes[0].set_ylim(len(templates) - 0.4, -0.6)
    axes[0].set_title("Association")
    axes[0].set_xlabel("stereotyped, % of valid answers (50: unbiased)")
    axes[1].set_title("Position")
    axes[1].set_xlabel("first word with first option, % of valid (50: no effect)")
    _legend(figure, [*_marks(roles, [ROLE_COLOURS.get(role, INK) for role in roles]), _line(INK, "95 % exact", width=2.4)])
    return figure


@_styled
def awareness_figure(curves: pd.DataFrame, scores: pd.DataFrame) -> Figure:
    """Change of the probability of each sense's word by source layer (after figure 3 of the paper); a row a question.

    Beside them r_blind and that of its controls. curves: question, role, word, layer, mean, low, high, unpatched. scores: question, role,
    control, r_blind, low, high, n.
    """
    questions, words = list(curves["question"].unique()), list(curves["word"].unique())
    figure = Figure(figsize=(11, 0.9 + 2.7 * len(questions)), layout="constrained")
    axes = figure.subplots(len(questions), len(words) + 1, width_ratios=[1.0] * len(words) + [0.8], squeeze=False)
    for i, question in enumerate(questions):
        here = curves[curves["question"] == question]
        for j, word in enumerate(words):
            _curves(axes[i][j], here[here["word"] == word])
            axes[i][j].set_title(f"ΔP(“{word.strip()}”), question “{question}”")
            axes[i][j].set_xlabel("source layer" if i == len(questions) - 1 else "")
            if j:
                axes[i][j].sharey(axes[i][0])
        axes[i][0].set_ylabel("change of probability")
        _controls(axes[i][-1], scores[scores["question"] == question].rename(columns={"r_blind": "mean"}))
        axes[i][-1].set_title("r_blind and controls")
    roles = list(curves["role"].unique())
    _legend(figure, _marks(roles, [ROLE_COLOURS.get(role, INK) for role in roles], line=True))
    return figure


@_styled
def steering_figure(table: pd.DataFrame) -> Figure:
    """Implicit rate by the first layer of the steered window, a line a sense or control (after figure 4 of the paper).

    Columns: family ("untreated" for the one untreated row), sense, start, n, rate, low, high, cluster_low, cluster_high, invalid_share.
    """
    untreated, steered = table[table["family"] == "untreated"], table[table["family"] != "untreated"]
    senses, starts = list(steered["sense"].unique()), sorted(steered["start"].astype(int).unique())
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axis, strip = figure.subplots(2, 1, height_ratios=(4, 1.1), sharex=True)
    labels = []
    for j, sense in enumerate(senses):
        rows = steered[steered["sense"] == sense].sort_values("start")
        x = [int(start) + _offset(j, len(senses), 0.12) for start in rows["start"]]
        labels.append(sense if rows["family"].iloc[0] == "steering" else f"placebo: {sense}")
        line = "-" if j == 0 else "--"
        axis.plot(x, rows["rate"], color=_colour(j), marker=_marker(j), ms=5, lw=1.4, ls=line, label=labels[-1], zorder=3)
        for at, (_, row) in zip(x, rows.iterrows(), strict=True):
            _whiskers(axis, at, row, _colour(j))
        strip.plot(x, rows["invalid_share"], color=_colour(j), marker=_marker(j), ms=4, lw=1.2, ls=line)
    for _, row in untreated.iterrows():
        axis.axhline(row["rate"], color=ROLE_COLOURS["aligned"], lw=1.4, label="untreated")
        strip.axhline(row["invalid_share"], color=ROLE_COLOURS["aligned"], lw=1.2)
    _share_axis(axis, headroom=0.04)
    _share_axis(strip, ticks=(0.0, 1.0), line=False)
    axis.set_ylabel("implicit: stereotyped, % of valid")
    strip.set_ylabel("invalid")
    strip.set_xlabel(f"first layer of the steered window ({_counts(steered.assign(group=''), '')} answers a point)")
    strip.set_xticks(starts if len(starts) <= 24 else starts[::4])
    strip.set_xlim(min(starts) - 0.6, max(starts) + 0.6)
    keys = _marks(labels, [_colour(j) for j in range(len(senses))], line=True)
    _legend(figure, keys + ([_line(ROLE_COLOURS["aligned"], "untreated")] if len(untreated) else []) + _interval_keys())
    return figure


@_styled
def lora_figure(table: pd.DataFrame) -> Figure:
    """Implicit and explicit rates of each layer group that was fine-tuned, beside the untreated model; invalid shares below.

    Columns: label, kind, n, rate, low, high, cluster_low, cluster_high, invalid_share.
    """
    colours = {"implicit": SERIES_COLOURS[0], "explicit": SERIES_COLOURS[1]}
    shown = table.rename(columns={"label": "group", "kind": "series"})
    figure = Figure(figsize=(2.6 + 1.4 * shown["group"].nunique(), 4.4), layout="constrained")
    axis, strip = figure.subplots(2, 1, height_ratios=(4, 1.1), sharex=True)
    _rate_bars(axis, strip, shown, colours)
    axis.set_ylabel("stereotyped, % of valid")
    strip.set_ylabel("invalid")
    _legend(figure, _swatches(colours, list(shown["series"].unique())) + _interval_keys())
    return figure


@_styled
def comparison_figure(table: pd.DataFrame) -> Figure:
    """All treatments in one picture, a row each: implicit and explicit rates, invalid share, r_blind.

    Columns: label, n, implicit, low, high, cluster_low, cluster_high, worst, best, invalid_share and, where measured, explicit,
    explicit_low, explicit_high, r_blind, r_blind_low, r_blind_high.
    """
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(table)), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.25, 1, 0.8, 1), squeeze=False)[0]
    y = [float(i) for i in range(len(table))]
    axes[0].barh(y, table["best"] - table["worst"], left=table["worst"], height=0.62, color=PALE, zorder=1)
    axes[0].hlines(y, table["cluster_low"], table["cluster_high"], color=SERIES_COLOURS[0], lw=0.9, zorder=2)
    _forest(axes[0], y, table["implicit"], table["low"], table["high"], SERIES_COLOURS[0], "o", "implicit")
    axes[2].barh(y, table["invalid_share"], height=0.62, color="#FFFFFF", edgecolor=INK, hatch="////", lw=0.7)
    for axis, name, colour in ((axes[1], "explicit", SERIES_COLOURS[1]), (axes[3], "r_blind", SERIES_COLOURS[3])):
        if name in table:
            _forest(axis, y, table[name], table[f"{name}_low"], table[f"{name}_high"], colour, "o", name)
    for axis, title in zip(axes, ("Implicit, % of valid", "Explicit, % of valid", "Invalid, implicit, %", "r_blind"), strict=True):
        axis.set_title(title)
        axis.grid(axis="x")
    for axis in axes[:3]:
        axis.set_xlim(-0.04, 1.04)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    for axis in axes[:2]:
        axis.axvline(UNBIASED, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes[3].axvline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes[3].xaxis.set_major_locator(MaxNLocator(4))
    axes[3].margins(x=0.12)
    axes[3].ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    axes[0].set_yticks(y, [f"{label} (n = {int(n)})" for label, n in zip(table["label"], table["n"], strict=True)])
    axes[0].set_ylim(len(table) - 0.4, -0.6)
    _legend(figure, [_patch(PALE, "bounds over invalid answers"), *_interval_keys()])
    return figure


@_styled
def patch_heatmap(table: pd.DataFrame, *, across: str = "patched tokens", effect: str = "effect (share of the difference moved)",
                  unit: str = "pairs") -> Figure:
    """Effects of patches by layer and place, a panel each; blue moves away from the source's answer, red towards it, white is nothing.

    Columns: panel, layer, place, mean, n; places stand in the order of the table, cells without a mean are hatched. The scale is symmetric
    and reaches at least from -1 to 1. `across` and `effect` name the axis and the colour bar, `unit` what n counts.

    Rows of patches (of `measure_patching`, `patch_grid`) are taken too, and shaped by `heatmap_table` as it does by default.
    """
    if "panel" not in table and {"control", "stream", "mark"} <= set(table.columns):
        from alignblind_mi.measures.patching import heatmap_table

        table = heatmap_table(table)
    panels, places = list(table["panel"].unique()), list(table["place"].unique())
    layers = sorted(int(layer) for layer in table["layer"].unique())
    width, height = 0.75 + 0.42 * len(places) if len(places) < 16 else 0.75 + 0.24 * len(places), 1.6 + 0.3 * len(layers)
    beside = len(places) <= 12
    across_page = min(2, len(panels)) if beside else 1
    grid = (math.ceil(len(panels) / across_page), across_page)
    longest = max(len(str(place)) for place in places)
    figure = Figure(figsize=(max(4.2, grid[1] * width + 1.1), grid[0] * (height + 0.06 * longest)), layout="constrained")
    axes = figure.subplots(*grid, sharey=beside, squeeze=False).flatten()
    for unused in axes[len(panels):]:
        unused.set_visible(False)
    axes = axes[: len(panels)]
    limit = max(1.0, float(table["mean"].abs().max(skipna=True)))
    for axis, panel in zip(axes, panels, strict=True):
        drawn = _heat(axis, table[table["panel"] == panel], layers, places, limit)
        axis.set_xlabel(across)
        axis.set_title(f"{panel} ({_counts(table.assign(group=table['panel']), panel)} {unit})")
    for axis in axes[::across_page]:
        axis.set_ylabel("layer")
    figure.colorbar(drawn, ax=list(axes), label=effect, shrink=0.9, aspect=28, pad=0.015)
    return figure


@_styled
def depth_figure(table: pd.DataFrame) -> Figure:
    """The effect of a patch by layer with its interval, a panel a direction; the pale band is from the lowest to the highest control.

    Columns: direction, layer, n, mean, low, high, control_low, control_high (NaN without controls).
    """
    panels = list(table["direction"].unique())
    figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for j, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        rows = table[table["direction"] == panel]
        axis.fill_between(rows["layer"], rows["control_low"], rows["control_high"], color=PALE, lw=0)
        _band(axis, rows, _colour(j), _marker(j), panel)
        axis.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(f"{panel} ({_counts(rows.assign(group=panel), panel)} pairs)")
        axis.set_xlabel("layer")
    axes[0].set_ylabel("effect (share of the difference)")
    _legend(figure, [*_marks(panels, [_colour(j) for j in range(len(panels))], line=True), _patch(PALE, "controls, 95 %")])
    return figure


@_styled
def selfie_figure(layers: pd.DataFrame, controls: pd.DataFrame) -> Figure:
    """What open-ended readings speak of (SelfIE): stacked shares by source layer (left), and over layers beside the controls (right).

    A row a panel. Both: panel, n and for each reading NAME_share, NAME_low, NAME_high, the group sense first, texts of no sense last;
    layers: layer; controls: control ("" for the identifiers). The whiskers are the group sense's exact intervals.
    """
    panels = list(layers["panel"].unique())
    names = [str(name).removesuffix("_share") for name in layers if str(name).endswith("_share")]
    colours = {name: _colour(j) for j, name in enumerate(names[:-1])} | {names[-1]: PALE}
    figure = Figure(figsize=(9.5, 0.9 + 2.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, width_ratios=(1.3, 1), squeeze=False)
    for (left, right), panel in zip(axes, panels, strict=True):
        here, held = layers[layers["panel"] == panel], controls[controls["panel"] == panel].set_index("control")
        _stacked(left, [float(layer) for layer in here["layer"]], here, colours, upright=True)
        left.set_title(f"{panel}: readings by layer ({_counts(here.assign(group=panel), panel)} a layer)")
        left.set_ylabel("share of readings, %")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        shown = [name for name in CONTROL_NAMES if name in held.index]
        _stacked(right, [float(i) for i in range(len(shown))], held.loc[shown], colours, upright=False)
        right.set_yticks(range(len(shown)), [f"{CONTROL_NAMES[name]}\nn = {int(held.loc[name, 'n'])}" for name in shown], fontsize=7.5)
        right.set_ylim(len(shown) - 0.4, -0.6)
        right.set_title("over layers, and controls")
    axes[-1][0].set_xlabel("source layer")
    axes[-1][1].set_xlabel("share of readings, %")
    keys = [_patch(colour, name) for name, colour in colours.items()]
    _legend(figure, [*keys, _line(INK, f"95 % exact, {names[0]}", width=1.6)])
    return figure


def _stacked(axis: Axes, at: Sequence[float], table: pd.DataFrame, colours: dict[str, str], *, upright: bool) -> None:
    """One stacked bar a row, with the first share's interval. Columns: NAME_share for each name of `colours`, FIRST_low, FIRST_high."""
    reached = pd.Series(0.0, index=table.index)
    for name, colour in colours.items():
        if upright:
            axis.bar(at, table[f"{name}_share"], 0.86, bottom=reached, color=colour, label=name)
        else:
            axis.barh(at, table[f"{name}_share"], 0.7, left=reached, color=colour, label=name)
        reached = reached + table[f"{name}_share"]
    first = next(iter(colours))
    (axis.vlines if upright else axis.hlines)(at, table[f"{first}_low"], table[f"{first}_high"], color=INK, lw=1.6, zorder=4)
    (axis.set_ylim if upright else axis.set_xlim)(0, 1)
    (axis.yaxis if upright else axis.xaxis).set_major_formatter(PercentFormatter(1.0, symbol=""))
    axis.grid(visible=False)


def _heat(axis: Axes, table: pd.DataFrame, layers: Sequence[int], places: Sequence[str], limit: float) -> Any:
    """One layer x place map. Columns: layer, place, mean."""
    cells = table.pivot(index="layer", columns="place", values="mean").reindex(index=pd.Index(layers), columns=pd.Index(places))
    axis.add_patch(Rectangle((-0.5, -0.5), len(places), len(layers), facecolor="#FFFFFF", edgecolor=PALE, hatch="////", lw=0, zorder=0))
    drawn = axis.imshow(cells.to_numpy(float), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower",
                        interpolation="nearest")
    axis.set_xticks(range(len(places)), [str(place) for place in places], rotation=0 if max(map(len, places)) < 3 else 90)
    step = 1 if len(layers) <= 16 else 4
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.grid(visible=False)
    axis.tick_params(length=2)
    if len(places) <= 12 and len(layers) <= 16:
        for (row, column), value in _each(cells):
            axis.text(column, row, f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−"), ha="center", va="center", fontsize=6.5,
                      color="#FFFFFF" if abs(value) > 0.6 * limit else INK)
    return drawn


def _each(cells: pd.DataFrame) -> Iterator[tuple[tuple[int, int], float]]:
    """(row, column) and value of every cell that has one."""
    for row in range(cells.shape[0]):
        for column in range(cells.shape[1]):
            value = float(cells.iat[row, column])    # type: ignore[arg-type]
            if not math.isnan(value):
                yield (row, column), value


def _rate_bars(axis: Axes, strip: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    """Grouped bars of `rate` with both intervals, and the invalid share hatched in the strip. Columns: group, series and a summary's."""
    groups, series = list(table["group"].unique()), [name for name in colours if name in set(table["series"])]
    width = 0.8 / max(1, len(series))
    for j, name in enumerate(series):
        rows = table[table["series"] == name].set_index("group").reindex(groups)
        x = [i + _offset(j, len(series), width) for i in range(len(groups))]
        axis.bar(x, rows["rate"], width * 0.92, color=colours[name], label=name, zorder=2)
        strip.bar(x, rows["invalid_share"], width * 0.92, color="#FFFFFF", edgecolor=colours[name], hatch="////", lw=0.9, label=name)
        for at, (_, row) in zip(x, rows.iterrows(), strict=True):
            _whiskers(axis, at, row, INK)
            _value(axis, at, row)
            strip.text(at, row["invalid_share"] + 0.04, percent(row["invalid_share"]), ha="center", va="bottom", fontsize=7, color=INK)
    _share_axis(axis, headroom=0.1)
    _share_axis(strip, headroom=0.4, ticks=(0.0, 1.0), line=False)
    strip.set_xticks(range(len(groups)), [f"{group}\n{_counts(table, group)}" for group in groups])


def _value(axis: Axes, at: float, row: pd.Series) -> None:
    """The rate in words above its intervals."""
    if math.isnan(row["rate"]):
        axis.text(at, 0.02, "no valid answer", ha="center", va="bottom", fontsize=7.5, color=INK, rotation=90)
        return
    top = max(v for v in (row["rate"], row["high"], row["cluster_high"]) if not math.isnan(v))
    axis.text(at, top + 0.015, percent(row["rate"]), ha="center", va="bottom", fontsize=8, color=INK)


def _counts(table: pd.DataFrame, group: str) -> str:
    """How many answers or readings a group's points stand for, one number where they agree."""
    found = list(dict.fromkeys(int(n) for n in table[table["group"] == group]["n"] if not math.isnan(n)))
    return "n = " + " / ".join(map(str, found))


def _controls(axis: Axes, table: pd.DataFrame) -> None:
    """The readings and their controls, a row each, a point with interval for each role. Columns: role, control, mean, low, high, n."""
    shown, roles = [name for name in CONTROL_NAMES if name in set(table["control"])], list(table["role"].unique())
    for j, role in enumerate(roles):
        rows = table[table["role"] == role].set_index("control").reindex(shown)
        y = [i + _offset(j, len(roles), 0.28) for i in range(len(shown))]
        _forest(axis, y, rows["mean"], rows["low"], rows["high"], ROLE_COLOURS.get(role, INK), _marker(j), role)
    axis.axvline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axis.grid(axis="x")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    named = table.rename(columns={"control": "group"})
    axis.set_yticks(range(len(shown)), [f"{CONTROL_NAMES[name]}\n{_counts(named, name)}" for name in shown], fontsize=7.5)
    axis.set_ylim(len(shown) - 0.4, -0.6)


@_styled
def readings_figure(profile: pd.DataFrame, scores: pd.DataFrame) -> Figure:
    """What each instrument reads, by layer (left) and over layers beside its controls (right); a row an instrument.

    Both: panel, role, mean, low, high (of `blind`: -1 the group sense, 1 the other sense), n; profile: layer; scores: control.
    """
    panels = list(profile["panel"].unique())
    figure = Figure(figsize=(9.5, 0.9 + 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, width_ratios=(1.3, 1), squeeze=False)
    for i, panel in enumerate(panels):
        for j, (role, rows) in enumerate(profile[profile["panel"] == panel].groupby("role", sort=False)):
            _band(axes[i][0], rows, ROLE_COLOURS.get(str(role), _colour(j)), _marker(j), str(role))
        axes[i][0].axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes[i][0].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[i][0].set_title(f"{panel}: reading by layer")
        axes[i][0].set_ylabel("group sense (−) to other sense (+)", fontsize=8)
        _controls(axes[i][1], scores[scores["panel"] == panel])
        axes[i][1].set_title("mean over layers, and controls")
    axes[-1][0].set_xlabel("layer")
    roles = list(profile["role"].unique())
    _legend(figure, _marks(roles, [ROLE_COLOURS.get(role, _colour(j)) for j, role in enumerate(roles)], line=True))
    return figure


def _band(axis: Axes, rows: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """Means by layer as a line with its interval as a band. Columns: layer, mean, low, high."""
    axis.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.22, lw=0)
    axis.plot(rows["layer"], rows["mean"], color=colour, marker=marker, ms=3.5, lw=1.5, label=label)


def _points(axis: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    """Means with intervals by group and series, zero marked. Columns: group, series, mean, low, high."""
    groups, series = list(table["group"].unique()), [name for name in colours if name in set(table["series"])]
    for j, name in enumerate(series):
        rows = table[table["series"] == name].set_index("group").reindex(groups)
        x = [i + _offset(j, len(series), 0.25) for i in range(len(groups))]
        axis.vlines(x, rows["low"], rows["high"], color=colours[name], lw=2.2)
        axis.plot(x, rows["mean"], color=colours[name], marker=_marker(j), ms=6, ls="none", label=name)
    axis.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axis.set_xticks(range(len(groups)), [f"{group}\n{_counts(table, group)}" for group in groups])
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.margins(y=0.12)


def _curves(axis: Axes, table: pd.DataFrame) -> None:
    """Mean change by layer with its band, a line a role; the unpatched probabilities in words.

    Columns: role, layer, mean, low, high, unpatched.
    """
    said = []
    for j, (role, rows) in enumerate(table.groupby("role", sort=False)):
        colour = ROLE_COLOURS.get(str(role), INK)
        _band(axis, rows, colour, _marker(j), str(role))
        said.append(f"{role} {number(rows['unpatched'].iloc[0])}")
    axis.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.16)
    axis.annotate("P unpatched: " + ", ".join(said), (0.01, 0.015), xycoords="axes fraction", fontsize=7.5, color="#444444")


def _forest(axis: Axes, y: Sequence[float], values: pd.Series, low: pd.Series, high: pd.Series, colour: str, marker: str,
            label: str) -> None:
    axis.hlines(y, low, high, color=colour, lw=2.4, zorder=3)
    axis.plot(values, y, color=colour, marker=marker, ms=5.5, ls="none", mec="#FFFFFF", mew=0.6, label=label, zorder=4)


def _whiskers(axis: Axes, x: float, row: pd.Series, colour: str) -> None:
    """The exact interval as a thick line, the clustered one as a thin line; nothing where there is no valid answer."""
    if math.isnan(row["rate"]):
        return
    axis.vlines([x], row["low"], row["high"], color=colour, lw=2.4, zorder=4)
    axis.vlines([x], row["cluster_low"], row["cluster_high"], color=colour, lw=0.9, zorder=4)


def _share_axis(axis: Axes, *, headroom: float = 0.05, ticks: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), line: bool = True) -> None:
    axis.set_ylim(0 if line else -0.06, 1 + headroom)
    axis.set_yticks(list(ticks))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if line:
        axis.axhline(UNBIASED, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=3)


def _offset(j: int, n: int, width: float) -> float:
    """Where the j-th of n series stands beside its group's middle."""
    return (j - (n - 1) / 2) * width


def _colour(j: int) -> str:
    return SERIES_COLOURS[j % len(SERIES_COLOURS)]


def _marker(j: int) -> str:
    return SERIES_MARKERS[j % len(SERIES_MARKERS)]


def percent(share: float | int) -> str:
    """A share as a whole percentage for a label: 0.973 -> '97'."""
    return f"{100 * share:.0f}"


def number(value: float | int) -> str:
    """A number with two significant digits: 0.18812 -> '0.19'; 'none' where there is none."""
    return "none" if math.isnan(value) else f"{value:#.2g}".rstrip(".")


def _legend(figure: Figure, handles: Sequence[object]) -> None:
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles) if len(handles) < 7 else (len(handles) + 1) // 2)


def _patch(colour: str, label: str) -> object:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=_key(label))


def _line(colour: str, label: str, *, width: float = 1.4, marker: str = "", ls: str = "-") -> object:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, lw=width, marker=marker, ms=6, ls=ls, label=_key(label))


def _key(label: str) -> str:
    """A label as a legend shows it: matplotlib leaves out those that begin with an underscore."""
    return short_label(f" {label}" if label.startswith("_") else label, LONGEST)


def _swatches(colours: dict[str, str], present: Sequence[str]) -> list[object]:
    return [_patch(colour, name) for name, colour in colours.items() if name in present]


def _marks(labels: Sequence[str], colours: Sequence[str], *, line: bool = False) -> list[object]:
    ls = "-" if line else "none"
    return [_line(colour, label, marker=_marker(j), ls=ls) for j, (label, colour) in enumerate(zip(labels, colours, strict=True))]


def _interval_keys() -> list[object]:
    return [_line(INK, "95 % exact", width=2.4), _line(INK, "95 % clustered", width=0.9), _line(INK, "unbiased", width=0.9, ls="--")]


# ---- calibration -------------------------------------------------------------------------------------------------------


@_styled
def recovery_figure(recovery: pd.DataFrame) -> Figure:
    """What every instrument says of organisms against what was planted, a panel an instrument, a line a seed.

    Columns: instrument, seed, knob ("reading" or "behaviour"), planted, estimate, low, high (95 %).
    """
    names, seeds = list(recovery["instrument"].unique()), sorted(recovery["seed"].unique())
    columns = min(5, len(names))
    figure = Figure(figsize=(2.5 * columns, 0.8 + 2.4 * math.ceil(len(names) / columns)), layout="constrained")
    axes = list(figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        for j, seed in enumerate(seeds):
            rows = recovery[(recovery["instrument"] == name) & (recovery["seed"] == seed)].sort_values("planted")
            axis.vlines(rows["planted"], rows["low"], rows["high"], color=_colour(j), lw=2.0)
            axis.plot(rows["planted"], rows["estimate"], color=_colour(j), marker=_marker(j), ms=4, lw=1.1, label=f"seed {seed}")
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel(f"planted {recovery.loc[recovery['instrument'] == name, 'knob'].iloc[0]}", fontsize=8)
        axis.set_xlim(0, 1)
    for axis in axes[len(names):]:
        axis.set_visible(False)
    _legend(figure, _marks([f"seed {seed}" for seed in seeds], [_colour(j) for j in range(len(seeds))], line=True))
    return figure


@_styled
def planted_depth_figure(profile: pd.DataFrame) -> Figure:
    """What every instrument shows by layer on organisms that differ in depth alone, a panel an instrument; planted blocks are shaded.

    Columns: instrument, kind, seed, layer, value, onset, last. Thin lines are seeds, the thick one their mean.
    """
    names, kinds = list(profile["instrument"].unique()), list(profile["kind"].unique())
    columns = min(4, len(names))
    figure = Figure(figsize=(2.9 * columns, 0.8 + 2.3 * math.ceil(len(names) / columns)), layout="constrained")
    axes = list(figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False, sharex=True).flat)
    for axis, name in zip(axes, names, strict=False):
        for j, kind in enumerate(kinds):
            rows = profile[(profile["instrument"] == name) & (profile["kind"] == kind)]
            axis.axvspan(rows["onset"].iloc[0] - 0.5, rows["last"].iloc[0] + 0.5, color=_colour(j), alpha=0.12, lw=0)
            for _, one in rows.groupby("seed"):
                axis.plot(one["layer"], one["value"], color=_colour(j), lw=0.7, alpha=0.7)
            mean = rows.groupby("layer")["value"].mean()
            axis.plot(mean.index, mean, color=_colour(j), marker=_marker(j), ms=3.5, lw=1.6)
        axis.axhline(0, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=1)
        axis.set_title(name.replace("_", " "))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("layer", fontsize=8)
    for axis in axes[len(names):]:
        axis.set_visible(False)
    spans = {kind: profile[profile["kind"] == kind].iloc[0] for kind in kinds}
    labels = [f"planted in {int(row['onset'])}–{int(row['last'])} (shaded)" for row in spans.values()]
    _legend(figure, _marks(labels, [_colour(j) for j in range(len(kinds))], line=True))
    return figure


@_styled
def trust_figure(records: pd.DataFrame, causal: pd.DataFrame) -> Figure:
    """Causal against decodable only, false alarms with their interval, and coverage of the 95 % interval, a row an instrument.

    records: instrument, false_alarm_rate, false_alarm_low, false_alarm_high, false_alarm_n, coverage, coverage_n. causal: instrument, kind,
    seed, value.
    """
    names = list(records["instrument"])
    figure = Figure(figsize=(10.5, 1.2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(1.3, 1, 1), squeeze=False)[0]
    y = [float(i) for i in range(len(names))]
    kinds = [kind for kind in causal["kind"].unique() if kind != "decodable"] + ["decodable"]
    for j, kind in enumerate(kinds):
        rows = causal[causal["kind"] == kind]
        at = [names.index(name) + _offset(j, len(kinds), 0.28) for name in rows["instrument"]]
        axes[0].plot(rows["value"], at, color=_colour(j), marker=_marker(j), ms=5, ls="none")
    axes[0].axvline(0, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes[0].set_title("Shown where the sense is used, and not")
    axes[0].set_xlabel("a point a seed", fontsize=8)
    known = records["false_alarm_rate"].astype(float)
    _forest(axes[1], y, known, records["false_alarm_low"].astype(float), records["false_alarm_high"].astype(float), _colour(0), "o", "")
    axes[1].axvline(0.05, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes[1].set_title("False alarms")
    axes[1].set_xlabel("% of trials (dashed: 5)", fontsize=8)
    axes[2].axvspan(0.93, 0.97, color=PALE, lw=0)
    axes[2].plot(records["coverage"].astype(float), y, color=_colour(0), marker="o", ms=5.5, ls="none")
    axes[2].set_title("Coverage of 95 % intervals")
    axes[2].set_xlabel("% of simulated studies (grey: 93–97)", fontsize=8)
    axes[2].set_xlim(0.88, 1.0)
    for axis in axes[1:]:
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    for axis in axes:
        axis.grid(axis="x")
    axes[0].set_yticks(y, [f"{name.replace('_', ' ')}\n(alarms: n = {int(n)})" for name, n in
                           zip(names, records["false_alarm_n"], strict=True)], fontsize=8)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    labels = ["decodable only" if kind == "decodable" else "causal" for kind in kinds]
    _legend(figure, _marks(labels, [_colour(j) for j in range(len(kinds))]))
    return figure


@_styled
def convergence_figure(table: pd.DataFrame) -> Figure:
    """Spearman's correlations between instruments and planted knobs, as a matrix with numbers. Columns: first, second, spearman, n."""
    names = list(table["first"].unique())
    values = table.pivot(index="first", columns="second", values="spearman").reindex(index=names, columns=names).astype(float)
    figure = Figure(figsize=(2.2 + 0.52 * len(names), 1.4 + 0.46 * len(names)), layout="constrained")
    axis = figure.subplots()
    grid = values.to_numpy(float)
    image = axis.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            value = float(grid[i, j])
            axis.text(j, i, "–" if math.isnan(value) else f"{round(value, 1) + 0.0:.1f}", ha="center", va="center", fontsize=7.5,
                      color="#FFFFFF" if abs(value) > 0.6 else INK)
    shown = [name.replace("_", " ") for name in names]
    axis.set_xticks(range(len(names)), shown, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), shown)
    axis.grid(False)
    axis.set_title(f"Rank correlation over organisms (n = {int(table['n'].max())})")
    figure.colorbar(image, ax=axis, shrink=0.7)
    return figure


FAMILY_COLOURS = {"untreated": INK, "steering": "#0072B2", "lora": "#E69F00", "unlearning": "#CC79A7", "prompt": "#009E73",
                  "placebo": "#999999", "combined": "#56B4E9"}
DAMAGE_NAMES = {"kl_neutral": "divergence on neutral text (nats a token)", "kl_mentions": "divergence where the other sense is settled",
                "wrong": "right answers lost, of the kind that loses most", "invalid": "answers that became invalid (share)"}


@_styled
def frontier_figure(points: pd.DataFrame) -> Figure:
    """Benefit against damage, a panel a damage measure; the Pareto frontier as steps, dose curves as lines from the untreated model.

    Columns: damage_measure, treatment, family, curve, dose, benefit, low, high, damage, pareto. Treatments on the frontier are named.
    """
    measures = list(points["damage_measure"].unique())
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    axes = list(figure.subplots(2, 2, squeeze=False).flat)
    families = [name for name in FAMILY_COLOURS if name in set(points["family"])]
    for axis, measure in zip(axes, measures, strict=False):
        rows = points[points["damage_measure"] == measure]
        front = rows[rows["pareto"]].sort_values("damage")
        axis.step([0.0, *front["damage"]], [0.0, *front["benefit"]], where="post", color=INK, lw=0.8, ls=(0, (2, 2)), zorder=1)
        for curve, some in rows[rows["curve"] != ""].groupby("curve", sort=False):
            some = some.sort_values("damage")
            colour = FAMILY_COLOURS.get(str(curve), INK)
            axis.plot([0.0, *some["damage"]], [0.0, *some["benefit"]], color=colour, lw=1.0, alpha=0.6, zorder=2)
        for j, family in enumerate(families):
            some = rows[rows["family"] == family]
            axis.vlines(some["damage"], some["low"], some["high"], color=FAMILY_COLOURS[family], lw=0.8, alpha=0.6, zorder=2)
            axis.plot(some["damage"], some["benefit"], color=FAMILY_COLOURS[family], marker=_marker(j), ms=6, ls="none", zorder=3)
        _name_points(axis, front, max(float(rows["damage"].max()), 0.05))
        axis.axhline(0, color=INK, lw=0.8)
        axis.set_xlabel(DAMAGE_NAMES.get(measure, measure))
        axis.set_ylabel("benefit: nearer to 50 % by")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" points"))
        axis.margins(x=0.08, y=0.12)
        axis.set_xlim(right=max(axis.get_xlim()[1], 0.05), left=min(-0.02 * axis.get_xlim()[1], -0.004))
    for axis in axes[len(measures):]:
        axis.set_visible(False)
    _legend(figure, [*_marks(families, [FAMILY_COLOURS[name] for name in families]), _line(INK, "best for its damage", ls="--", width=0.8)])
    return figure


def _name_points(axis: Axes, front: pd.DataFrame, width: float) -> None:
    """Names at the frontier's points, best first; none where its place is taken by another."""
    taken: list[tuple[float, float]] = []
    for row in front.sort_values("benefit", ascending=False).to_dict("records"):
        at = (row["damage"] / width, row["benefit"])
        if any(abs(at[0] - x) < 0.4 and abs(at[1] - y) < 0.035 for x, y in taken):
            continue
        taken.append(at)
        left = at[0] > 0.6
        axis.annotate(str(row["treatment"]).replace("_", " "), (row["damage"], row["benefit"]), xytext=(-6 if left else 6, 6),
                      textcoords="offset points", fontsize=7, ha="right" if left else "left")


@_styled
def dose_figure(table: pd.DataFrame) -> Figure:
    """Dose and response: implicit rate with its interval, and what is lost, by dose; a column a curve.

    Columns: curve, dose, n, implicit, low, high, kl_neutral, kl_mentions, colour_accuracy, group_accuracy, copy_accuracy, judging_accuracy.
    """
    curves = list(table["curve"].unique())
    figure = Figure(figsize=(3.6 * len(curves), 5.4), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False, sharey="row", sharex="col")
    lost = {"colour_accuracy": "questions, other sense", "group_accuracy": "questions, group sense", "copy_accuracy": "copying",
            "judging_accuracy": "judging"}
    for j, curve in enumerate(curves):
        rows = table[table["curve"] == curve].sort_values("dose")
        colour = FAMILY_COLOURS.get(curve, INK)
        axes[0][j].errorbar(rows["dose"], rows["implicit"], [rows["implicit"] - rows["low"], rows["high"] - rows["implicit"]], color=colour,
                            marker="o", ms=5, lw=1.4, capsize=2)
        axes[0][j].axhline(UNBIASED, color=INK, lw=0.9, ls=(0, (4, 3)))
        axes[0][j].set_title(f"{curve} (n = {int(rows['n'].max())} a dose)")
        for k, name in enumerate(lost):
            axes[1][j].plot(rows["dose"], rows[name], color=_colour(k + 1), marker=_marker(k), ms=4.5, lw=1.2)
        axes[1][j].set_xlabel("dose (0: untreated)")
        for axis in (axes[0][j], axes[1][j]):
            axis.set_ylim(-0.04, 1.04)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes[0][0].set_ylabel("stereotyped, % of valid")
    axes[1][0].set_ylabel("right answers, %")
    _legend(figure, _marks(list(lost.values()), [_colour(k + 1) for k in range(len(lost))], line=True))
    return figure
