"""What the scripts of this folder have in common: their options, the parts of a study that they run, and how tables are shown.

Each script runs some parts of a study into --out, as `alignblind study` does: what is there is not computed again, scripts of the same
options can share a folder, and `alignblind report DIR` or `alignblind score DIR` read it.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi import AlignblindError, StudyConfig, load_concept, load_study, run_parts, study_parts
from alignblind_mi.errors import ResultError
from alignblind_mi.pages.page import save_shown
from alignblind_mi.pages.report import COLUMNS, draw, summary_tables
from alignblind_mi.pages.saved_study import read_study

WITHOUT_SENSES = ("behaviour", "balanced")    # parts that every concept has
PASSED_ON = ("dtype", "device", "device_map", "quantization", "engine")


def options(about: str | None) -> argparse.ArgumentParser:
    """The options of every script."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="organism:base", help="a Hugging Face id, a checkpoint folder, or organism:base (default)")
    parser.add_argument("--aligned", default="organism:aligned", help="the same for the aligned model (default: organism:aligned)")
    parser.add_argument("--concept", default="race", help="a concept by name, or the path of its TOML file")
    parser.add_argument("--cue", default="", help="a cue of the concept (default: its first)")
    parser.add_argument("--out", type=Path, required=True, help="where rows, tables and figures go")
    parser.add_argument("--quick", action="store_true", help="a small share of the prompts: to see that all works")
    parser.add_argument("--protocol", choices=("paper", "best"), help="as in `alignblind study` (default: paper; best for an organism)")
    parser.add_argument("--seed", type=int, default=0)
    for name in PASSED_ON:
        parser.add_argument(f"--{name.replace('_', '-')}", default="auto" if name == "engine" else None, help="as in `alignblind study`")
    return parser


def configured(given: argparse.Namespace, cue: str = "") -> StudyConfig:
    """The configuration of a study with a script's options. Errors: as `StudyConfig.create`."""
    return StudyConfig.create(given.base, given.aligned, concept=given.concept, cue=cue or given.cue, quick=given.quick, seed=given.seed,
                              protocol=given.protocol, **{name: getattr(given, name) for name in PASSED_ON})


def run_study_parts(config: StudyConfig, out: Path, *beginnings: str) -> dict[str, pd.DataFrame]:
    """Run those parts of a study whose names begin so, or read them. Returns the report's tables of what the folder holds.

    Errors: as `run_parts`; ConceptError where parts are asked for that a concept or cue without senses does not have.
    """
    concept = load_concept(config.concept)
    if not all(name.startswith(WITHOUT_SENSES) for name in beginnings):
        concept.both_senses(config.cue)
    run_parts(config, out, [part for part in study_parts(config, concept) if part.name.startswith(beginnings)])
    return summary_tables(read_study(out))


def rows_of(out: Path, names: Iterable[str]) -> pd.DataFrame:
    """The saved rows of some parts, one below the other."""
    found = load_study(out)
    return pd.concat([found[name].rows for name in names], ignore_index=True)


def publish(out: Path, tables: dict[str, pd.DataFrame], *names: str) -> None:
    """Write and print some of the report's tables, and write those of their figures that there are."""
    lacking = [name for name in names if name not in tables]
    if lacking:
        raise ResultError(f"{out} has no rows for the table {lacking[0]!r}.")
    save_shown(out, {name: tables[name] for name in names}, {name: figure for name, figure in draw(tables).items() if name in names})
    for name in names:
        columns = COLUMNS[name]
        cells = [[column.cell(row) for column in columns] for row in tables[name].to_dict("records")]    # type: ignore[arg-type]
        show(name, pd.DataFrame(cells, columns=[column.title for column in columns]))
    print(f"\nRows, tables/ and figures/ are in {out}")


def show(title: str, table: pd.DataFrame, columns: Sequence[str] = ()) -> None:
    """Print a table, numbers with three decimals."""
    shown = table[list(columns)] if columns else table
    print(f"\n{title.replace('_', ' ')}\n{shown.to_string(index=False, float_format='{:.3f}'.format)}")


def script(main: Callable[[Any], None], parser: argparse.ArgumentParser) -> None:
    """Run a script's main with its options: errors of this project are one sentence and exit code 1."""
    try:
        main(parser.parse_args())
    except AlignblindError as error:
        sys.exit(str(error))
