"""Figure 2 of the paper: implicit and explicit bias of the base and the aligned model, by category.

Three outcomes, rates of valid answers with their interval, bounds over the invalid ones, and the log-odds of the two
complete answers.

Usage: python experiments/figure2_behaviour.py --out DIR [--base M --aligned M] [--quick]
"""

import argparse

from common import configured, options, publish, run_study_parts, script


def main(given: argparse.Namespace) -> None:
    tables = run_study_parts(configured(given), given.out, "behaviour_")
    publish(given.out, tables, "behaviour")


if __name__ == "__main__":
    script(main, options(__doc__))
