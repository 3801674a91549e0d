"""`alignblind report`: a results folder's page, drawn anew."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import OutcomeName
from alignblind_mi.errors import AlignblindError


def report(folder: Annotated[Path, typer.Argument(help="Results folder of a study, comparison or calibration; a log of Inspect (.eval), or "
                                                       "a folder of such.")] = Path("study"), *,
           outcome: OutcomeName = "both",
           out: Annotated[Path | None, typer.Option(help="Of logs of Inspect: the folder for their page (default: served).")] = None
           ) -> None:
    """Draw the page of a study, a comparison or a calibration anew from its saved rows. Example: alignblind report study

    Logs of `inspect eval alignblind/...` have a page, too. Example: alignblind report logs --out served
    """
    from functools import partial

    from alignblind_mi.pages.calibration_page import write_calibration
    from alignblind_mi.pages.comparison_page import write_comparison
    from alignblind_mi.pages.report import write_report
    from alignblind_mi.pages.served_page import are_logs, write_served
    from alignblind_mi.results import folder_kind
    from alignblind_mi.statistics.log_odds import check_outcome

    check_outcome(outcome)
    if are_logs(folder):
        page = write_served(folder, Path("served") if out is None else out, outcome)
        say(f"The report is {page.resolve()}")
        return
    if out is not None:
        raise AlignblindError(f"--out {out} was given for {folder}, whose page lies in it: leave it out (it is for logs of Inspect).")
    kind, pages = folder_kind(folder), {"comparison": write_comparison, "study": write_report}
    if kind == "calibration" and outcome != "both":
        raise AlignblindError(f"--outcome {outcome} was given for {folder}, a calibration, which has no answers to judge: leave it out.")
    write = write_calibration if kind == "calibration" else partial(pages[kind], outcome=outcome)
    say(f"The report is {write(folder).resolve()}")
