"""Figures of awareness: what identifiers are read as, by layer and by instrument, beside controls."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignblind_mi.pages.figures.style import (
    CONTROL_NAMES,
    INK,
    PALE,
    ROLE_COLOURS,
    band,
    colour_of,
    counts,
    forest,
    in_style,
    legend_below,
    line_key,
    mark_keys,
    marker_of,
    number,
    offset,
    patch_key,
)


@in_style
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
    legend_below(figure, mark_keys(roles, [ROLE_COLOURS.get(role, INK) for role in roles], line=True))
    return figure


@in_style
def selfie_figure(layers: pd.DataFrame, controls: pd.DataFrame) -> Figure:
    """What open-ended readings speak of (SelfIE): stacked shares by source layer (left), and over layers beside the controls (right).

    A row a panel. Both: panel, n and for each reading NAME_share, NAME_low, NAME_high, the group sense first, texts of no sense last;
    layers: layer; controls: control ("" for the identifiers). The whiskers are the group sense's intervals.
    """
    panels = list(layers["panel"].unique())
    names = [str(name).removesuffix("_share") for name in layers if str(name).endswith("_share")]
    colours = {name: colour_of(j) for j, name in enumerate(names[:-1])} | {names[-1]: PALE}
    figure = Figure(figsize=(9.5, 0.9 + 2.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, width_ratios=(1.3, 1), squeeze=False)
    for (left, right), panel in zip(axes, panels, strict=True):
        here, held = layers[layers["panel"] == panel], controls[controls["panel"] == panel].set_index("control")
        _stacked(left, [float(layer) for layer in here["layer"]], here, colours, upright=True)
        left.set_title(f"{panel}: readings by layer ({counts(here.assign(group=panel), panel)} a layer)")
        left.set_ylabel("share of readings, %")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        shown = [name for name in CONTROL_NAMES if name in held.index]
        _stacked(right, [float(i) for i in range(len(shown))], held.loc[shown], colours, upright=False)
        right.set_yticks(range(len(shown)), [f"{CONTROL_NAMES[name]}\nn = {int(held.loc[name, 'n'])}" for name in shown], fontsize=7.5)
        right.set_ylim(len(shown) - 0.4, -0.6)
        right.set_title("over layers, and controls")
    axes[-1][0].set_xlabel("source layer")
    axes[-1][1].set_xlabel("share of readings, %")
    keys = [patch_key(colour, name) for name, colour in colours.items()]
    legend_below(figure, [*keys, line_key(INK, f"95 %, {names[0]}", width=1.6)])
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


def _controls(axis: Axes, table: pd.DataFrame) -> None:
    """The readings and their controls, a row each, a point with interval for each role. Columns: role, control, mean, low, high, n."""
    shown, roles = [name for name in CONTROL_NAMES if name in set(table["control"])], list(table["role"].unique())
    for j, role in enumerate(roles):
        rows = table[table["role"] == role].set_index("control").reindex(shown)
        y = [i + offset(j, len(roles), 0.28) for i in range(len(shown))]
        forest(axis, y, rows["mean"], rows["low"], rows["high"], ROLE_COLOURS.get(role, INK), marker_of(j), role)
    axis.axvline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axis.grid(axis="x")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    named = table.rename(columns={"control": "group"})
    axis.set_yticks(range(len(shown)), [f"{CONTROL_NAMES[name]}\n{counts(named, name)}" for name in shown], fontsize=7.5)
    axis.set_ylim(len(shown) - 0.4, -0.6)


@in_style
def readings_figure(profile: pd.DataFrame, scores: pd.DataFrame) -> Figure:
    """What each instrument reads, by layer (left) and over layers beside its controls (right); a row an instrument.

    Both: panel, role, mean, low, high (of `blind`: -1 the group sense, 1 the other sense), n; profile: layer; scores: control. A layer
    that gives no reading (NaN) has a grey cross at the bottom, and no point.
    """
    panels = list(profile["panel"].unique())
    figure = Figure(figsize=(9.5, 0.9 + 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, width_ratios=(1.3, 1), squeeze=False)
    for i, panel in enumerate(panels):
        for axis in axes[i]:
            axis.panel = panel    # which instrument it is of, for whoever mutes it
        for j, (role, rows) in enumerate(profile[profile["panel"] == panel].groupby("role", sort=False)):
            band(axes[i][0], rows, ROLE_COLOURS.get(str(role), colour_of(j)), marker_of(j), str(role))
            silent = rows.loc[rows["mean"].isna(), "layer"]
            if len(silent):    # a line of no points has no extent, and the layout fails on it
                axes[i][0].plot(silent, [0.04 + 0.06 * j] * len(silent), color=PALE, marker="x", ms=4, ls="none", clip_on=False,
                                transform=axes[i][0].get_xaxis_transform(), label=f"no reading, {role}")
        axes[i][0].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[i][0].set_title(f"{panel}: reading by layer")
        axes[i][0].set_ylabel("group sense (−) to other sense (+)", fontsize=8)
        if profile.loc[profile["panel"] == panel, "mean"].isna().all():
            axes[i][0].text(0.5, 0.5, "no layer gives a reading", transform=axes[i][0].transAxes, ha="center", va="center", color=INK)
            axes[i][0].set_yticks([])
            axes[i][1].set_axis_off()
        else:
            axes[i][0].axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
            axes[i][1].set_title("mean over layers, and controls")
            _controls(axes[i][1], scores[scores["panel"] == panel])
    axes[-1][0].set_xlabel("layer")
    roles = list(profile["role"].unique())
    keys = mark_keys(roles, [ROLE_COLOURS.get(role, colour_of(j)) for j, role in enumerate(roles)], line=True)
    silent = [line_key(PALE, "no reading", marker="x", ls="none")] if profile["mean"].isna().any() else []
    legend_below(figure, [*keys, *silent])
    return figure


@in_style
def qualification_figure(rows: pd.DataFrame) -> Figure:
    """What instruments say of sentences that settle the sense, by layer: each sentence (pale), and the mean of each sense (a panel each).

    rows: those of `measure_instruments`; `test` sentences alone are drawn. -1 is the group sense, 1 the other one.
    """
    tested = rows[(rows["split"] == "test") & rows["blind"].notna()]
    panels = list(tested.groupby(["instrument", "setting"], sort=False))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(9.5, 0.9 + 2.1 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    senses = {"group": colour_of(0), "other": colour_of(1)}
    for axis, ((instrument, setting), panel) in zip(axes, panels, strict=False):
        for j, (sense, colour) in enumerate(senses.items()):
            here = panel[panel["sense"] == sense]
            axis.plot(here["layer"], here["blind"], color=colour, marker=".", ms=4, alpha=0.35, ls="none")
            means = here.groupby("layer")["blind"].mean()
            axis.plot(means.index, means, color=colour, marker=marker_of(j), ms=5, label=sense)
        named = setting if setting != "tuned" else f"tuned: “{panel['question'].iloc[0]}”"
        axis.set_title(f"{str(instrument).replace('_', ' ')} ({named})")
        axis.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axis.set_ylim(-1.08, 1.08)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - across):len(panels)]:
        axis.set_xlabel("layer")
    for axis in axes[::across][:down]:
        axis.set_ylabel("group (−) to other sense (+)", fontsize=8)
    legend_below(figure, mark_keys(["sentences of the group sense", "sentences of the other sense"], list(senses.values()), line=True))
    return figure


def _curves(axis: Axes, table: pd.DataFrame) -> None:
    """Mean change by layer with its band, a line a role; the unpatched probabilities in words.

    Columns: role, layer, mean, low, high, unpatched.
    """
    said = []
    for j, (role, rows) in enumerate(table.groupby("role", sort=False)):
        colour = ROLE_COLOURS.get(str(role), INK)
        band(axis, rows, colour, marker_of(j), str(role))
        said.append(f"{role} {number(rows['unpatched'].iloc[0])}")
    axis.axhline(0, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.16)
    axis.annotate("P unpatched: " + ", ".join(said), (0.01, 0.015), xycoords="axes fraction", fontsize=7.5, color="#444444")
