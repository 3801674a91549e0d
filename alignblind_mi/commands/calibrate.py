"""`alignblind calibrate`: every instrument on organisms with known truth."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import Spread, with_options


@with_options
def calibrate(
    *,
    out: Annotated[Path, typer.Option(help="Results folder; a calibration that is in it already is resumed.")] = Path("calibration"),
    quick: Annotated[bool, typer.Option("--quick", help="One seed, fewer organisms, shorter training: to see that it works.")] = False,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of the organisms.")] = "0,1,2",
    jobs: Annotated[int | None, typer.Option(help="Organisms that are built at the same time (default: as many as there are processors; 1 "
                                                  "in shares and on Ray, which build what they measure).")] = None,
    spread: Spread,
) -> None:
    """Measure every instrument on organisms with known truth; write OUT/calibration.json and OUT/calibration.html.

    The organisms are built once and kept in the user's cache folder ($ALIGNBLIND_CACHE). Example: alignblind calibrate --quick --out DIR
    """
    from functools import partial

    from alignblind_mi.pages.calibration_page import write_calibration
    from alignblind_mi.studies.calibration import CalibrationConfig, processors, run_calibration

    config = CalibrationConfig.create(seeds, quick=quick)
    spread.check()
    building = 1 if jobs is None and spread.divides else jobs or processors()
    if spread.carry_out(partial(run_calibration, config, jobs=building), out):
        say(f"The page is {write_calibration(out).resolve()}")
