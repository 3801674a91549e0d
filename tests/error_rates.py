"""How often do the intervals hold the truth, and how often do the tests find what is not there? By simulation, former procedures beside.

Writes docs/error_rates.json, the numbers that the statistics page of the documentation shows, and docs/error_rates.png, its figure.

    python tests/error_rates.py [--simulations 1000]    # --redraw: the figure alone, from the numbers that are there
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from worlds import CHANGES, RATES, World, change_rates, rate_coverage

from alignblind_mi.intervals.clustered import mean_interval
from alignblind_mi.pages.figures.style import INK, SERIES_COLOURS, in_style, legend_below, marker_of

DOCS = Path(__file__).parents[1] / "docs"
NUMBERS = DOCS / "error_rates.json"
SPREADS = (0.0, 0.5, 1.0, 2.0)
RATE_WORLDS: dict[str, list[World]] = {    # a panel each; along it the templates' standard deviation grows
    **{f"{k} templates, rate 50 %": [World(templates=k, template_sd=sd) for sd in SPREADS] for k in (2, 3, 4, 6)},
    "3 templates, words differ (sd 1)": [World(word_sd=1.0, template_sd=sd) for sd in SPREADS],
    "3 templates, rate 90 %": [World(rate=0.9, template_sd=sd) for sd in SPREADS],
    "6 templates, rate 90 %": [World(rate=0.9, templates=6, template_sd=sd) for sd in SPREADS],
    "4 templates, 10 word pairs, 1 order": [World(pairs=10, templates=4, orders=1, template_sd=sd) for sd in SPREADS],
    "4 templates, 5 word pairs, 1 order": [World(pairs=5, templates=4, orders=1, template_sd=sd) for sd in SPREADS],
    "3 templates, 50 word pairs": [World(pairs=50, template_sd=sd) for sd in SPREADS],
    "3 templates, 30 % valid, unequally": [World(valid=0.3, valid_sd=1.0, template_sd=sd) for sd in SPREADS],
    "3 templates, 10 % valid": [World(valid=0.1, template_sd=sd) for sd in SPREADS],
}
EFFECTS = (0.0, 0.5, 1.0)
NULLS: dict[str, list[World]] = {    # no difference on average; along it the effect's spread between templates grows
    f"{name}, {share}": [replace(world, rate=rate, effect=None, effect_sd=sd) for sd in EFFECTS]
    for name, world in {"2 templates, 30 word pairs": World(templates=2), "3 templates, 10 word pairs": World(pairs=10),
                        "3 templates, 30 word pairs": World(), "4 templates, 30 word pairs, 1 order": World(templates=4, orders=1),
                        "6 templates, 50 word pairs, 1 order": World(pairs=50, templates=6, orders=1),
                        "3 templates, 30 word pairs, half valid": World(valid=0.5, valid_sd=1.0)}.items()
    for share, rate in (("many discordant (rate 50 %)", 0.5), ("few discordant (rate 95 %)", 0.95))
}
DIFFERENCES: dict[str, list[World]] = {    # a true difference
    name: [replace(world, effect=-1.0, effect_sd=sd) for sd in EFFECTS]
    for name, world in {"from 80 %, 3 templates": World(rate=0.8), "from 95 %, 4 templates": World(rate=0.95, templates=4),
                        "from 95 %, 6 templates that differ (sd 1)": World(rate=0.95, templates=6, template_sd=1.0),
                        "from 70 %, 4 templates, 1 order": World(rate=0.7, templates=4, orders=1)}.items()
}


def simulate(simulations: int) -> None:
    rates = {panel: {name: [rate_coverage(world, procedure, simulations if name != "clustered bootstrap" else simulations // 4)
                            for world in worlds] for name, procedure in RATES.items()} for panel, worlds in RATE_WORLDS.items()}
    found = {"simulations": simulations, "spreads": SPREADS, "effects": EFFECTS, "rates": rates, "nulls": _changes(NULLS, simulations),
             "differences": _changes(DIFFERENCES, simulations), "readings": _readings(simulations)}
    NUMBERS.write_text(json.dumps(_rounded(found), indent=1) + "\n", "utf-8")


def _changes(panels: dict[str, list[World]], simulations: int) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    return {panel: {name: [change_rates(world, procedure, simulations) for world in worlds] for name, procedure in CHANGES.items()}
            for panel, worlds in panels.items()}


def _readings(simulations: int) -> dict[str, dict[str, float]]:
    """Coverage of a mean of readings: 6 contexts of 3 templates, 4 readings each; and of values of word pairs x 3 templates x 4."""
    random, found = np.random.default_rng(0), dict[str, dict[str, float]]()
    nested = np.repeat(np.arange(6), 4), np.repeat(np.arange(3), 8)
    crossed = {k: tuple(index.ravel() for index in np.indices((k, 3, 4))[:2]) for k in (3, 6)}
    for name, (unit, template), unit_sd, template_sd in (
            ("readings, contexts differ", nested, 1.0, 0.0), ("readings, both differ", nested, 0.7, 0.7),
            ("readings, templates differ", nested, 0.3, 1.0), ("patches of 6 word pairs, both differ", crossed[6], 1.0, 0.7),
            ("patches of 3 word pairs", crossed[3], 1.0, 0.0)):
        held = np.zeros(2)
        for _ in range(simulations):
            values = random.normal(0, unit_sd, 6)[unit] + random.normal(0, template_sd, 3)[template] + random.normal(0, 0.3, len(unit))
            ends = mean_interval(values, [unit]), mean_interval(values, [unit, template])
            held += [low <= 0 <= high for low, high in ends]
        found[name] = dict(zip(("one unit", "ours"), (held / simulations).tolist(), strict=True))
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


@in_style
def _draw(rates: dict[str, Any], nulls: dict[str, Any]) -> Figure:
    """Above: coverage of rates by panel; below: size of the test of a difference, p < .05 where there is none."""
    figure = Figure(figsize=(12, 11.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    axes = list(above.subplots(3, 4, sharex=True, sharey=True).flat)
    for axis, (panel, found) in zip(axes, rates.items(), strict=True):
        _lines(axis, panel, SPREADS, {name: [one[0] for one in points] for name, points in found.items()})
        axis.axhspan(0.93, 0.97, color="#DDDDDD", zorder=0)
        axis.set_ylim(0, 1.03)
    above.supylabel("intervals of 95 % that hold the rate", fontsize=9)
    above.supxlabel("how much templates differ (standard deviation, logits)", fontsize=9)
    legend_below(above, axes[0].get_legend_handles_labels()[0])
    lower = list(below.subplots(2, 6, sharex=True, sharey=True).T.flat)
    for axis, (panel, found) in zip(lower, nulls.items(), strict=True):
        _lines(axis, panel.replace(", ", "\n").replace(" (", "\n("), EFFECTS,
               {name: [one[1] for one in points] for name, points in found.items()})
        axis.axhline(0.05, color=INK, lw=0.9, ls=(0, (4, 3)))
    below.supylabel("p < .05 where there is no difference", fontsize=9)
    below.supxlabel("how much the effect differs between templates (standard deviation, logits; 0 on average)", fontsize=9)
    legend_below(below, lower[0].get_legend_handles_labels()[0])
    return figure


def _lines(axis: Axes, title: str, x: tuple[float, ...], found: dict[str, list[float]]) -> None:
    for name, values in found.items():
        j = [*RATES, "former"].index(name)
        axis.plot(x, values, color=INK if name == "ours" else SERIES_COLOURS[j % len(SERIES_COLOURS)], lw=2.0 if name == "ours" else 1.1,
                  marker=marker_of(j), ms=4.5, label=name)
    axis.set_title(title, fontsize=8, loc="left")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000, help="worlds drawn of each kind")
    parser.add_argument("--redraw", action="store_true", help="draw the numbers that are there, without simulating")
    given = parser.parse_args()
    if not given.redraw:
        simulate(given.simulations)
    numbers = json.loads(NUMBERS.read_text("utf-8"))
    _draw(numbers["rates"], numbers["nulls"]).savefig(DOCS / "error_rates.png", dpi=110)
