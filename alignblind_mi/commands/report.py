"""`alignblind report`: a results folder's page, drawn anew."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say


def report(folder: Annotated[Path, typer.Argument(help="Results folder of a study, comparison or calibration.")] = Path("study")) -> None:
    """Draw the page of a study, a comparison or a calibration anew from its saved rows. Example: alignblind report study"""
    from alignblind_mi.pages.calibration_page import write_calibration
    from alignblind_mi.pages.comparison_page import write_comparison
    from alignblind_mi.pages.report import write_report
    from alignblind_mi.results import folder_kind

    write = {"comparison": write_comparison, "calibration": write_calibration}.get(folder_kind(folder), write_report)
    say(f"The report is {write(folder).resolve()}")
