"""Figure 1 of the paper: what "black" and "white" mean to either model in open words (SelfIE): race, colour or neither, by layer.

With the controls (unambiguous words, the word before, random vectors, the text alone), and by which share readings of the group sense are
fewer in the aligned model than in the base model (the paper: -74.4 % for Llama 3 70B). An organism is read by the prompt that its record
names, and sampled; other models by the paper's prompt and protocol, greedily.

Usage: python experiments/figure1_selfie.py --out DIR [--base M --aligned M] [--quick]
"""

import argparse

import pandas as pd
from common import configured, options, rows_of, run_study_parts, script, show

from alignblind_mi import load_concept, reading_reduction, selfie_table
from alignblind_mi.pages.figures import CONTROL_NAMES, selfie_figure
from alignblind_mi.pages.page import save_shown
from alignblind_mi.pages.scoring import score_interpretations
from alignblind_mi.stimuli.readings import reading_names

PARTS = ("reading_selfie_base", "reading_selfie_aligned")


def main(given: argparse.Namespace) -> None:
    config = configured(given)
    concept = load_concept(config.concept)
    run_study_parts(config, given.out, *PARTS)
    rows = rows_of(given.out, PARTS)
    layers = selfie_table(rows, concept, by=("role", "control", "layer")).rename(columns={"role": "panel"})
    texts = rows.assign(interpretation=rows["text"], prompt=rows["context"])
    pooled = pd.DataFrame(score_interpretations(texts, concept, by=("role", "control"))).rename(columns={"role": "panel"})
    reduction = pd.DataFrame([reading_reduction(*(rows[rows["role"] == role] for role in ("aligned", "base")))])
    figure = selfie_figure(layers[layers["control"] == ""], pooled)
    save_shown(given.out, {"selfie_layers": layers, "selfie": pooled, "selfie_reduction": reduction}, {"selfie": figure})
    counts = [name for reading in reading_names(concept) for name in (reading, f"{reading}_share")]
    group = [f"{concept.group_sense}_{end}" for end in ("low", "high")]
    show("SelfIE readings over layers, and controls (intervals: over contexts and templates)",
         pooled.assign(control=pooled["control"].map(CONTROL_NAMES)), ["panel", "control", "n", *counts, *group])
    show(f"Readings of {concept.group_sense}, aligned against base: relative change (n contexts)", reduction)
    print(f"\nRows, tables/ and figures/ are in {given.out}")


if __name__ == "__main__":
    script(main, options(__doc__))
