"""Template by template: association beside position, in the published design (where they are one) and in the balanced one.

In the paper's released answers the template decides: Llama 3 8B's share of stereotyped answers is 79, 8, 76 and 10 % by template, because
word order and option order change with it. The balanced design crosses the two orders within every template.

Usage: python experiments/table_templates.py --out DIR [--base M --aligned M] [--quick]
"""

import argparse

from common import configured, options, publish, run_study_parts, script


def main(given: argparse.Namespace) -> None:
    tables = run_study_parts(configured(given), given.out, "behaviour_", "balanced_")
    publish(given.out, tables, "position")


if __name__ == "__main__":
    script(main, options(__doc__))
