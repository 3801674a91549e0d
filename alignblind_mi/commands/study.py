"""`alignblind study`: the whole study of a pair."""

from pathlib import Path
from typing import Annotated, no_type_check

import typer

from alignblind_mi.borders.ranks import leads
from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import (
    SPREAD,
    Asking,
    Loading,
    OutcomeName,
    Pair,
    Skipped,
    Spread,
    StudyFile,
    configured,
    from_file,
    listed,
    typed,
    with_options,
)


@with_options
@no_type_check
def study(
    *,
    context: typer.Context,
    file: StudyFile = None,
    pair: Pair,
    out: Annotated[Path, typer.Option(help="Results folder; a study that is in it already is resumed.")] = Path("study"),
    skip: Skipped = "",
    outcome: OutcomeName = "both",
    asking: Asking,
    loading: Loading,
    spread: Spread,
) -> None:
    """Run the whole study and write OUT/report.html; its settings are options, or all in a YAML file (see experiments/study.yaml).

    Example: alignblind study --base meta-llama/Meta-Llama-3-8B --aligned meta-llama/Meta-Llama-3-8B-Instruct --out llama3-8b
    """
    from functools import partial

    from alignblind_mi.pages.report import write_report
    from alignblind_mi.statistics.log_odds import check_outcome
    from alignblind_mi.studies.drawn import is_drawn
    from alignblind_mi.studies.running import run_study

    config = configured(pair, asking, loading) if file is None else from_file(file, context, allowed=("out", "skip", "outcome", *SPREAD))
    check_outcome(outcome)
    spread.check(config)
    if not spread.carry_out(partial(run_study, config, skip=listed(skip)), out) or not leads():
        return
    page = out / "report.html"
    if not is_drawn(out, page.name) or typed(context, ["outcome"]):
        write_report(out, outcome)
    say(f"The report is {page.resolve()}")
