"""Figure 3 of the paper: how "black" and "white" are read, layer by layer, by a patchscope; with r_blind and its controls.

One row of panels per interpretation question of the concept. Beside r_blind: by which share P(group word) is lower in the aligned model
than in the base model (the paper: -52.2 % for Llama 3 8B), contexts drawn together.

Usage: python experiments/figure3_patching.py --out DIR [--base M --aligned M] [--quick]
"""

import argparse

import pandas as pd
from common import configured, options, publish, rows_of, run_study_parts, script, show

from alignblind_mi import load_concept, reading_reduction
from alignblind_mi.pages.page import save_shown


def main(given: argparse.Namespace) -> None:
    config = configured(given)
    tables = run_study_parts(config, given.out, "awareness_")
    found = []
    for question in load_concept(config.concept).interpretations:
        base, aligned = (rows_of(given.out, [f"awareness_{role}_{question}"]) for role in ("base", "aligned"))
        found.append({"question": question, **reading_reduction(aligned, base)})
    reduction = pd.DataFrame(found)
    save_shown(given.out, {"reduction": reduction}, {})
    show("P(group word), aligned against base: relative change (n contexts)", reduction)
    publish(given.out, tables, "awareness", "awareness_layers")


if __name__ == "__main__":
    script(main, options(__doc__))
