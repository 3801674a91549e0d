"""Figures of patching: which places the answers depend on, and at which depth."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from alignblind_mi.pages.figures.style import INK, PALE, band, colour_of, counts, in_style, legend_below, mark_keys, marker_of, patch_key


@in_style
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
        axis.set_title(f"{panel} ({counts(table.assign(group=table['panel']), panel)} {unit})")
    for axis in axes[::across_page]:
        axis.set_ylabel("layer")
    figure.colorbar(drawn, ax=list(axes), label=effect, shrink=0.9, aspect=28, pad=0.015)
    return figure


@in_style
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
        band(axis, rows, colour_of(j), marker_of(j), panel)
        axis.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(f"{panel} ({counts(rows.assign(group=panel), panel)} pairs)")
        axis.set_xlabel("layer")
    axes[0].set_ylabel("effect (share of the difference)")
    legend_below(figure, [*mark_keys(panels, [colour_of(j) for j in range(len(panels))], line=True), patch_key(PALE, "controls, 95 %")])
    return figure


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
