"""`alignblind calibrate`: every instrument on organisms with known truth."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say


def calibrate(
    out: Annotated[Path, typer.Option(help="Results folder; a calibration that is in it already is resumed.")] = Path("calibration"),
    quick: Annotated[bool, typer.Option("--quick", help="One seed, fewer organisms, shorter training: to see that it works.")] = False,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of the organisms.")] = "0,1,2",
    jobs: Annotated[int, typer.Option(help="Organisms that are built at the same time (0: as many as there are processors).")] = 0,
) -> None:
    """Measure every instrument on organisms with known truth; write OUT/calibration.json and OUT/calibration.html.

    The organisms are built once and kept in the user's cache folder ($ALIGNBLIND_CACHE). Example: alignblind calibrate --quick --out DIR
    """
    from alignblind_mi.pages.calibration_page import write_calibration
    from alignblind_mi.studies.calibration import CalibrationConfig, processors, run_calibration

    config = CalibrationConfig.create(seeds, quick=quick)
    page = write_calibration(run_calibration(config, out, jobs=jobs or processors()))
    say(f"The page is {page.resolve()}")
