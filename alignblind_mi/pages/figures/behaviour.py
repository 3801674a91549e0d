"""Figures of behaviour: rates by category, association beside position."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from alignblind_mi.pages.figures.style import (
    INK,
    ROLE_COLOURS,
    UNBIASED,
    counts,
    forest,
    in_style,
    interval_keys,
    legend_below,
    line_key,
    mark_keys,
    marker_of,
    offset,
    rate_bars,
    swatches,
)


@in_style
def behaviour_figure(rates: pd.DataFrame, log_odds: pd.DataFrame) -> Figure:
    """Implicit and explicit rates by category and role (after figure 2 of the paper), invalid shares below, mean log-odds beside.

    rates: role, kind, category, n, rate, low, high, template_min, template_max, invalid_share.
    log_odds: role, category, n, mean, low, high.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    top = figure.subplots(2, 3, height_ratios=(4, 1.1), width_ratios=(1, 1, 0.85), sharex="col", squeeze=False)
    for column, (kind, title) in enumerate((("implicit", "Implicit"), ("explicit", "Explicit"))):
        shown = rates[rates["kind"] == kind].rename(columns={"category": "group", "role": "series"})
        rate_bars(top[0][column], top[1][column], shown, ROLE_COLOURS)
        top[0][column].set_title(f"{title} bias")
    top[0][0].set_ylabel("stereotyped, % of valid")
    top[1][0].set_ylabel("invalid")
    _points(top[0][2], log_odds.rename(columns={"category": "group", "role": "series"}), ROLE_COLOURS)
    top[0][2].set_title("Implicit, by probability")
    top[0][2].set_ylabel("mean log-odds (nats)")
    top[0][2].tick_params(labelbottom=True)
    top[1][2].set_visible(False)
    legend_below(figure, swatches(ROLE_COLOURS, list(rates["role"].unique())) + interval_keys())
    return figure


@in_style
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
            y = [i + offset(j, len(roles), 0.28) for i in range(len(templates))]
            forest(axis, y, rows[name], rows[low], rows[high], ROLE_COLOURS.get(role, INK), marker_of(j), role)
        axis.axvline(UNBIASED, color=INK, lw=0.9, ls=(0, (4, 3)))
        axis.grid(axis="x")
        axis.set_xlim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes[0].set_yticks(range(len(templates)), [f"{name}\n{counts(named, name)}" for name in templates])
    axes[0].set_ylim(len(templates) - 0.4, -0.6)
    axes[0].set_title("Association")
    axes[0].set_xlabel("stereotyped, % of valid answers (50: unbiased)")
    axes[1].set_title("Position")
    axes[1].set_xlabel("first word with first option, % of valid (50: no effect)")
    legend_below(figure, [*mark_keys(roles, [ROLE_COLOURS.get(role, INK) for role in roles]), line_key(INK, "95 %", width=2.4)])
    return figure


def _points(axis: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    """Means with intervals by group and series, zero marked. Columns: group, series, mean, low, high."""
    groups, series = list(table["group"].unique()), [name for name in colours if name in set(table["series"])]
    for j, name in enumerate(series):
        rows = table[table["series"] == name].set_index("group").reindex(groups)
        x = [i + offset(j, len(series), 0.25) for i in range(len(groups))]
        axis.vlines(x, rows["low"], rows["high"], color=colours[name], lw=2.2)
        axis.plot(x, rows["mean"], color=colours[name], marker=marker_of(j), ms=6, ls="none", label=name)
    axis.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axis.set_xticks(range(len(groups)), [f"{group}\n{counts(table, group)}" for group in groups])
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.margins(y=0.12)
