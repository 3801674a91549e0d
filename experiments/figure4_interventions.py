"""Figure 4 of the paper: implicit bias of the aligned model, steered window by window, or fine-tuned group of layers by group.

Steering towards the group sense stands beside its placebos (the other sense, "Random: ...", and draws of noise that does as much, as a
band), LoRA beside the untreated model; all of
them side by side, with explicit bias and r_blind, in the table "comparison".

Usage: python experiments/figure4_interventions.py --out DIR [--aligned M] [--quick]     (--quick: the two compared windows alone)
"""

import argparse

from common import configured, options, publish, run_study_parts, script

from alignblind_mi.pages.study_tables import QUESTION


def main(given: argparse.Namespace) -> None:
    treated = ("steering_", "noise_", "lora_")
    tables = run_study_parts(configured(given), given.out, "behaviour_aligned", f"awareness_aligned_{QUESTION}", *treated)
    publish(given.out, tables, *(name for name in ("steering", "lora", "lora_training", "comparison") if name in tables))


if __name__ == "__main__":
    script(main, options(__doc__))
