"""Figures of mitigations: steering by layers, LoRA by groups, treatments side by side, benefit against damage, doses."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignblind_mi.pages.figures.style import (
    INK,
    PALE,
    ROLE_COLOURS,
    SERIES_COLOURS,
    UNBIASED,
    colour_of,
    counts,
    forest,
    in_style,
    interval_keys,
    legend_below,
    line_key,
    mark_keys,
    marker_of,
    offset,
    patch_key,
    rate_bars,
    share_axis,
    swatches,
    whiskers,
)


@in_style
def steering_figure(table: pd.DataFrame) -> Figure:
    """Implicit rate by the first layer of the steered window, a line a sense or control (after figure 4 of the paper).

    Columns: family ("untreated" for the one untreated row), sense, start, n, rate, low, high, template_min, template_max, invalid_share,
    and, where there is noise, draws, draw_low and draw_high: what was drawn several times is a band from its least to its largest rate.
    """
    untreated, steered = table[table["family"] == "untreated"], table[table["family"] != "untreated"]
    senses, starts = list(steered["sense"].unique()), sorted(steered["start"].astype(int).unique())
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axis, strip = figure.subplots(2, 1, height_ratios=(4, 1.1), sharex=True)
    labels = []
    for j, sense in enumerate(senses):
        rows = steered[steered["sense"] == sense].sort_values("start")
        x = [int(start) + offset(j, len(senses), 0.12) for start in rows["start"]]
        labels.append(sense if rows["family"].iloc[0] == "steering" else f"placebo: {sense}")
        line = "-" if j == 0 else "--"
        axis.plot(x, rows["rate"], color=colour_of(j), marker=marker_of(j), ms=5, lw=1.4, ls=line, label=labels[-1], zorder=3)
        several = "draws" in rows and bool((rows["draws"] > 1).any())
        if several:
            axis.fill_between(x, rows["draw_low"], rows["draw_high"], color=colour_of(j), alpha=0.25, lw=0, zorder=1)
        for at, (_, row) in zip(x, rows.iterrows(), strict=True) if not several else ():
            whiskers(axis, at, row, colour_of(j))
        strip.plot(x, rows["invalid_share"], color=colour_of(j), marker=marker_of(j), ms=4, lw=1.2, ls=line)
    for _, row in untreated.iterrows():
        axis.axhline(row["rate"], color=ROLE_COLOURS["aligned"], lw=1.4, label="untreated")
        strip.axhline(row["invalid_share"], color=ROLE_COLOURS["aligned"], lw=1.2)
    share_axis(axis, headroom=0.04)
    share_axis(strip, ticks=(0.0, 1.0), line=False)
    axis.set_ylabel("implicit: stereotyped, % of valid")
    strip.set_ylabel("invalid")
    strip.set_xlabel(f"first layer of the steered window ({counts(steered.assign(group=''), '')} answers a point)")
    strip.set_xticks(starts if len(starts) <= 24 else starts[::4])
    strip.set_xlim(min(starts) - 0.6, max(starts) + 0.6)
    keys = mark_keys(labels, [colour_of(j) for j in range(len(senses))], line=True)
    legend_below(figure, keys + ([line_key(ROLE_COLOURS["aligned"], "untreated")] if len(untreated) else []) + interval_keys())
    return figure


@in_style
def lora_figure(table: pd.DataFrame) -> Figure:
    """Implicit and explicit rates of each layer group that was fine-tuned, beside the untreated model; invalid shares below.

    Columns: label, kind, n, rate, low, high, template_min, template_max, invalid_share.
    """
    colours = {"implicit": SERIES_COLOURS[0], "explicit": SERIES_COLOURS[1]}
    shown = table.rename(columns={"label": "group", "kind": "series"})
    figure = Figure(figsize=(2.6 + 1.4 * shown["group"].nunique(), 4.4), layout="constrained")
    axis, strip = figure.subplots(2, 1, height_ratios=(4, 1.1), sharex=True)
    rate_bars(axis, strip, shown, colours)
    axis.set_ylabel("stereotyped, % of valid")
    strip.set_ylabel("invalid")
    legend_below(figure, swatches(colours, list(shown["series"].unique())) + interval_keys())
    return figure


@in_style
def comparison_figure(table: pd.DataFrame) -> Figure:
    """All treatments in one picture, a row each: implicit and explicit rates, invalid share, r_blind.

    Columns: label, n, implicit, low, high, template_min, template_max, worst, best, invalid_share and, where measured, explicit,
    explicit_low, explicit_high, r_blind, r_blind_low, r_blind_high.
    """
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(table)), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.25, 1, 0.8, 1), squeeze=False)[0]
    y = [float(i) for i in range(len(table))]
    axes[0].barh(y, table["best"] - table["worst"], left=table["worst"], height=0.62, color=PALE, zorder=1)
    axes[0].hlines([at + 0.2 for at in y], table["template_min"], table["template_max"], color=SERIES_COLOURS[0], lw=0.9, zorder=2)
    forest(axes[0], y, table["implicit"], table["low"], table["high"], SERIES_COLOURS[0], "o", "implicit")
    axes[2].barh(y, table["invalid_share"], height=0.62, color="#FFFFFF", edgecolor=INK, hatch="////", lw=0.7)
    for axis, name, colour in ((axes[1], "explicit", SERIES_COLOURS[1]), (axes[3], "r_blind", SERIES_COLOURS[3])):
        if name in table:
            forest(axis, y, table[name], table[f"{name}_low"], table[f"{name}_high"], colour, "o", name)
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
    legend_below(figure, [patch_key(PALE, "bounds over invalid answers"), *interval_keys()])
    return figure


FAMILY_COLOURS = {"untreated": INK, "steering": "#0072B2", "lora": "#E69F00", "unlearning": "#CC79A7", "prompt": "#009E73",
                  "placebo": "#999999", "combined": "#56B4E9"}
DAMAGE_NAMES = {"kl_neutral": "divergence on neutral text (nats a token)", "kl_mentions": "divergence where the other sense is settled",
                "wrong": "right answers lost, of the kind that loses most", "invalid": "answers that became invalid (share)"}


@in_style
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
            axis.plot(some["damage"], some["benefit"], color=FAMILY_COLOURS[family], marker=marker_of(j), ms=6, ls="none", zorder=3)
        _name_points(axis, front, max(float(rows["damage"].max()), 0.05))
        axis.axhline(0, color=INK, lw=0.8)
        axis.set_xlabel(DAMAGE_NAMES.get(measure, measure))
        axis.set_ylabel("benefit: nearer to 50 % by")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" points"))
        axis.margins(x=0.08, y=0.12)
        axis.set_xlim(right=max(axis.get_xlim()[1], 0.05), left=min(-0.02 * axis.get_xlim()[1], -0.004))
    for axis in axes[len(measures):]:
        axis.set_visible(False)
    legend_below(figure, [*mark_keys(families, [FAMILY_COLOURS[name] for name in families]),
                          line_key(INK, "best for its damage", ls="--", width=0.8)])
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


@in_style
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
            axes[1][j].plot(rows["dose"], rows[name], color=colour_of(k + 1), marker=marker_of(k), ms=4.5, lw=1.2)
        axes[1][j].set_xlabel("dose (0: untreated)")
        for axis in (axes[0][j], axes[1][j]):
            axis.set_ylim(-0.04, 1.04)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes[0][0].set_ylabel("stereotyped, % of valid")
    axes[1][0].set_ylabel("right answers, %")
    legend_below(figure, mark_keys(list(lost.values()), [colour_of(k + 1) for k in range(len(lost))], line=True))
    return figure
