"""The paper's own numbers from its released answers, by both answer rules, with what its invalid answers leave open.

Usage: python experiments/released_answers.py FOLDER...   (folders that hold the released JSON files)
"""

import sys
from pathlib import Path

import pandas as pd

from alignblind_mi.errors import AlignblindError
from alignblind_mi.pages.scoring import score

SHOWN = ["model", "cue", "rule", "n", "stereotyped", "reversed", "invalid", "rate", "low", "high", "worst", "best"]


def main(folders: list[Path]) -> None:
    """Print one row per model, cue and rule: implicit answers, pooled over categories and templates."""
    records = [record for rule in ("published", "robust") for record in score(folders, rule=rule, by=["model", "cue"])]
    table = pd.DataFrame(records).query("kind == 'implicit'").sort_values(["cue", "model", "rule"])
    print(table[SHOWN].to_string(index=False, float_format=lambda share: f"{100 * share:.1f} %"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main([Path(folder) for folder in sys.argv[1:]])
    except AlignblindError as error:
        sys.exit(f"{error}")
