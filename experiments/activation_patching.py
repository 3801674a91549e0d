"""Where the aligned model carries what settles its answer: activation patching by layer and place, layer and token, layer and head.

Pairs of equal length that differ in the phrase before the question (the group sense against the other sense), patched in both directions:
denoising asks what is enough, noising what is needed. With controls, and with how well the gradient screen agrees with the exact grid.

Usage: python experiments/activation_patching.py --out DIR [--aligned M] [--quick]
"""

import argparse
from functools import partial

import pandas as pd
from common import configured, options, rows_of, script, show

from alignblind_mi import (
    HookedModel,
    Part,
    StudyConfig,
    contrast_pairs,
    depth_profile,
    effect_span,
    grid_sites,
    load_concept,
    measure_patching,
    patch_grid,
    run_parts,
    screen_agreement,
)
from alignblind_mi.instruments.patching import CONTROLS, DIRECTIONS, EVERY_TOKEN
from alignblind_mi.measures.patching import HEAD_MARKS, PARTS, heatmap_table
from alignblind_mi.pages.figures import depth_figure, patch_heatmap
from alignblind_mi.pages.page import save_shown
from alignblind_mi.progress import Advance

WORD_PAIRS, STRONGEST = 2, 5
SAME_TEXT = ("template", "option_order", "word_order")    # what pairs must share for their tokens to stand in the same places


def quick_layers(n_layers: int) -> range:
    """The first layer of each third: what --quick looks at, with one category of words."""
    return range(0, n_layers, max(1, -(-n_layers // 3)))


def grid(config: StudyConfig, model: HookedModel, advance: Advance) -> pd.DataFrame:
    concept = load_concept(config.concept)
    fewer = {"parts": ("residual", "heads", "screen"), "controls": CONTROLS[:2], "layers": quick_layers(model.n_layers),
             "categories": [*concept.categories][:1], "max_word_pairs": 1}
    some = fewer if config.quick else {"parts": PARTS, "max_word_pairs": WORD_PAIRS}
    return measure_patching(model, concept, config.cue, seed=config.seed, progress=advance, **some)


def tokens(config: StudyConfig, model: HookedModel, advance: Advance) -> pd.DataFrame:
    pairs = contrast_pairs(model, load_concept(config.concept), config.cue, max_word_pairs=1 if config.quick else WORD_PAIRS,
                           seed=config.seed)
    same = [pair for pair in pairs if all(pair.labels[name] == pairs[0].labels[name] for name in SAME_TEXT)]
    sites = grid_sites(range(model.n_layers), [EVERY_TOKEN])
    return pd.concat([patch_grid(model, same, sites, direction=direction, controls=("random",), seed=config.seed, progress=advance)
                      for direction in DIRECTIONS], ignore_index=True)


def main(given: argparse.Namespace) -> None:
    config = configured(given)
    load_concept(config.concept).both_senses(config.cue)    # before a model is loaded
    run_parts(config, given.out, [Part("patching_grid", "aligned", False, partial(grid, config)),
                                  Part("patching_tokens", "aligned", False, partial(tokens, config))])
    rows, by_token = (rows_of(given.out, [name]) for name in ("patching_grid", "patching_tokens"))
    maps = {"patching_places": heatmap_table(rows), "patching_tokens": heatmap_table(by_token, "token")}
    maps |= {f"patching_heads_{mark}": heatmap_table(rows, "head", mark=mark) for mark in HEAD_MARKS["context"]}
    depth, screen = depth_profile(rows), screen_agreement(rows)
    across = {"patching_places": "patched place", "patching_tokens": "patched token"}
    drawn = {name: patch_heatmap(table, across=across.get(name, "patched head")) for name, table in maps.items()}
    save_shown(given.out, maps | {"patching_depth": depth, "patching_screen": screen}, drawn | {"patching_depth": depth_figure(depth)})
    tell(maps, depth, screen)
    print(f"\nRows, tables/ and figures/ are in {given.out}")


def tell(maps: dict[str, pd.DataFrame], depth: pd.DataFrame, screen: pd.DataFrame) -> None:
    show("All identifiers patched, residual stream: effect by layer (share of the difference between the runs), and controls",
         depth.drop(columns=["model", "treatment"]))
    for direction, profile in depth.groupby("direction", sort=False):
        span = effect_span(profile)
        print(f"{direction}: " + (f"an effect after layers {span.first} to {span.last}" if span else "no layer above its controls"))
    for name, table in maps.items():
        if "heads" in name:
            real = table[table["panel"].isin(DIRECTIONS)]
            largest = real.reindex(real["mean"].abs().sort_values(ascending=False).index).head(STRONGEST)
            show(f"{name}: the {STRONGEST} largest effects", largest.rename(columns={"panel": "direction", "place": "head"}))
    show("Screen (attribution patching) against the exact grid, nats moved", screen)


if __name__ == "__main__":
    script(main, options(__doc__))
