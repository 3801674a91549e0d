"""Figures of a calibration: what was planted, and what instruments found of it."""

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignblind_mi.pages.figures.style import INK, PALE, colour_of, forest, in_style, legend_below, mark_keys, marker_of, offset


@in_style
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
            axis.vlines(rows["planted"], rows["low"], rows["high"], color=colour_of(j), lw=2.0)
            axis.plot(rows["planted"], rows["estimate"], color=colour_of(j), marker=marker_of(j), ms=4, lw=1.1, label=f"seed {seed}")
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel(f"planted {recovery.loc[recovery['instrument'] == name, 'knob'].iloc[0]}", fontsize=8)
        axis.set_xlim(0, 1)
    for axis in axes[len(names):]:
        axis.set_visible(False)
    legend_below(figure, mark_keys([f"seed {seed}" for seed in seeds], [colour_of(j) for j in range(len(seeds))], line=True))
    return figure


@in_style
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
            axis.axvspan(rows["onset"].iloc[0] - 0.5, rows["last"].iloc[0] + 0.5, color=colour_of(j), alpha=0.12, lw=0)
            for _, one in rows.groupby("seed"):
                axis.plot(one["layer"], one["value"], color=colour_of(j), lw=0.7, alpha=0.7)
            mean = rows.groupby("layer")["value"].mean()
            axis.plot(mean.index, mean, color=colour_of(j), marker=marker_of(j), ms=3.5, lw=1.6)
        axis.axhline(0, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=1)
        axis.set_title(name.replace("_", " "))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("layer", fontsize=8)
    for axis in axes[len(names):]:
        axis.set_visible(False)
    spans = {kind: profile[profile["kind"] == kind].iloc[0] for kind in kinds}
    labels = [f"planted in {int(row['onset'])}–{int(row['last'])} (shaded)" for row in spans.values()]
    legend_below(figure, mark_keys(labels, [colour_of(j) for j in range(len(kinds))], line=True))
    return figure


@in_style
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
        at = [names.index(name) + offset(j, len(kinds), 0.28) for name in rows["instrument"]]
        axes[0].plot(rows["value"], at, color=colour_of(j), marker=marker_of(j), ms=5, ls="none")
    axes[0].axvline(0, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes[0].set_title("Shown where the sense is used, and not")
    axes[0].set_xlabel("a point a seed", fontsize=8)
    known = records["false_alarm_rate"].astype(float)
    forest(axes[1], y, known, records["false_alarm_low"].astype(float), records["false_alarm_high"].astype(float), colour_of(0), "o", "")
    axes[1].axvline(0.05, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes[1].set_title("False alarms")
    axes[1].set_xlabel("% of trials (dashed: 5)", fontsize=8)
    axes[2].axvspan(0.93, 0.97, color=PALE, lw=0)
    axes[2].plot(records["coverage"].astype(float), y, color=colour_of(0), marker="o", ms=5.5, ls="none")
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
    legend_below(figure, mark_keys(labels, [colour_of(j) for j in range(len(kinds))]))
    return figure


@in_style
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
