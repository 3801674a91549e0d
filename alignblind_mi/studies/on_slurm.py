"""The shares of a run as jobs of a Slurm cluster, by submitit: nothing but `Share`, submitted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignblind_mi.borders.settings import Count, File, takes
from alignblind_mi.studies.shares import Share, ShareError


@takes(ShareError)
def submit_shares(run: Callable[..., Any], out: File, *, shares: Count, executor: Any) -> list[Any]:
    """Submit `shares` shares of `run` into the one folder `out`. Returns submitit's jobs, whose `result()` waits for a share.

    run: all of a run but its folder, such as `partial(run_study, config)`. executor: one of submitit's, with what each job may use:
    `executor = submitit.AutoExecutor("log"); executor.update_parameters(gpus_per_node=1, timeout_min=240)`. When all have ended, the same
    run without shares finds everything there. A share that was cut off is submitted again as it was.

    Errors: ShareError for what is no executor.
    """
    if not hasattr(executor, "map_array"):
        raise ShareError(f"{type(executor).__name__} is no executor: give one of submitit's (pip install 'alignblind-mi[slurm]'), such as "
                         "submitit.AutoExecutor(\"log\").")
    return list(executor.map_array(_share, *zip(*((run, Path(out), number, shares) for number in range(1, shares + 1)), strict=True)))


def _share(run: Callable[..., Any], out: Path, number: int, shares: int) -> None:
    run(out=out, execute=Share(number, shares))
