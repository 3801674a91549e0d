"""The one place where a configured run is executed: a study, a comparison and a calibration each make a list of jobs, and hand it over.

A job finishes some saved parts (or an adapter), and they are the same whichever process does it. `serially` runs the jobs here, one after
the other. To run them elsewhere (other processes, other machines), give `run_study`, `run_parts`, `run_comparison` or `run_calibration`
another function of the same form: jobs are known by their names, which are the same in every process of one configuration, so that another
machine makes the same list from the configuration and runs the jobs that it is told. This module does NOT know what a job computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignblind_mi.borders.texts import one_line
from alignblind_mi.progress import Advance, Progress
from alignblind_mi.results import StudyFolder


@dataclass(frozen=True)
class Job:
    """A step of a run.

    `name`: what progress shows; no other job of the run has it. `run` finishes what is not finished in the folder and is given what to call
    with a number of rows; `done` says whether nothing is left to do. `model`: what has to be in memory, so that jobs with the same one
    belong together ("" for none). `after`: names of the jobs that must be finished first.
    """

    __repr__ = one_line

    name: str
    run: Callable[[StudyFolder, Advance], None]
    done: Callable[[StudyFolder], bool]
    model: str = ""
    after: tuple[str, ...] = ()


Execute = Callable[[Sequence[Job], StudyFolder, Progress], None]


def serially(jobs: Sequence[Job], folder: StudyFolder, progress: Progress) -> None:
    """Run the jobs in this process, in their order; what an earlier run finished is passed over."""
    for job in jobs:
        done = job.done(folder)
        with progress.part(job.name, done=done) as advance:
            if not done:
                job.run(folder, advance)
