"""The paper's table of cues: implicit and explicit bias by how the groups are named (colour words, capitals, names, dialects).

Each cue has a folder of its own in DIR. A cue that a model's tokenizer does not know is said to be refused, and left out.

Usage: python experiments/table_cues.py --out DIR [--base M --aligned M] [--quick]
"""

import argparse

import pandas as pd
from common import configured, options, run_study_parts, script, show

from alignblind_mi import load_concept
from alignblind_mi.models.spec import ModelError
from alignblind_mi.pages.page import percent, save_shown
from alignblind_mi.pages.study_tables import POOLED
from alignblind_mi.studies.running import check_vocabulary

SHOWN = ["cue", "kind", "category", "role", "n", "stereotyped", "reversed", "rejected", "invalid", "rate", "low", "high", "template_min",
         "template_max", "worst", "best"]
SHARES = SHOWN[9:]


def main(given: argparse.Namespace) -> None:
    concept, found, refused = load_concept(given.concept), [], []
    for cue in concept.cues:
        config = configured(given, cue)
        try:
            check_vocabulary(config, concept)
        except ModelError as error:
            refused.append(f"refused: {error}")
            continue
        found.append(run_study_parts(config, given.out / cue, "behaviour_")["behaviour"].assign(cue=cue))
    if not found:
        raise ModelError(f"none of the cues can be asked. {refused[0]}")
    table = pd.concat(found, ignore_index=True)
    save_shown(given.out, {"cues": table}, {})
    pooled = table[table["category"] == POOLED]
    show("Cues, pooled over categories (rates in % of valid answers; by category: tables/cues.csv)",
         pooled.assign(**{name: pooled[name].map(percent) for name in SHARES}), [name for name in SHOWN if name != "category"])
    print("\n".join(["", *refused, f"Rows and tables/ are in {given.out}"]))


if __name__ == "__main__":
    script(main, options(__doc__))
