"""The one place where a configured run is executed: a study, a comparison and a calibration each make a list of jobs, and hand it over.

A job finishes some saved parts (or an adapter), and they are the same whichever process does it. `serially` runs the jobs here, one after
the other; `shares.Share` those of one share of several; `on_ray` hands them to the processes of a Ray cluster. Jobs are known by their
names, which are the same in every process of one configuration, so that another machine makes the same list from the configuration and
runs the jobs that it is told. This module does NOT know what a job computes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignblind_mi.borders.texts import one_line
from alignblind_mi.progress import Advance, Progress
from alignblind_mi.results import StudyFolder


@dataclass(frozen=True)
class Job:
    """A step of a run.

    `name`: what progress shows; no other job of the run has it. `run` finishes what is not finished in the folder and is given what to call
    with a number of rows; `done` says whether nothing is left to do. `model`: what has to be in memory, so that jobs with the same one
    belong together ("" for none). `after`: names of the jobs that must be finished first. `makes`: what it leaves in the folder, as paths
    in it without an ending (of a result) or of a folder. `cost`: how much it asks, beside the other jobs of the run.
    """

    __repr__ = one_line

    name: str
    run: Callable[[StudyFolder, Advance], None]
    done: Callable[[StudyFolder], bool]
    model: str = ""
    after: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    cost: float = 1.0


Execute = Callable[[Sequence[Job], StudyFolder, Progress], None]


def serially(jobs: Sequence[Job], folder: StudyFolder, progress: Progress) -> None:
    """Run the jobs in this process, in their order; what an earlier run finished is passed over."""
    for job in jobs:
        run_job(job, folder, progress)


def shares_of(execute: Execute) -> int:
    """Among how many processes the jobs are divided: its `shares`, 1 of a plain function. Long parts are split further where there are
    several."""
    return int(getattr(execute, "shares", 1))


def share_of(execute: Execute) -> str:
    """Which of several processes that write in one folder this is: its `share`, "" of a plain function, which is the only one."""
    return str(getattr(execute, "share", ""))


def run_job(job: Job, folder: StudyFolder, progress: Progress) -> None:
    """Announce a job and run it, unless it is finished."""
    done = job.done(folder)
    with progress.part(job.name, done=done) as advance:
        if not done:
            job.run(folder, advance)


def made_files(folder: Path, makes: Iterable[str]) -> Iterator[Path]:
    """The files that jobs have left in a folder, as paths in it: of results the note first, so that rows never lack it."""
    for made in makes:
        place = folder / made
        if place.is_dir():
            yield from sorted(file.relative_to(folder) for file in place.rglob("*") if file.is_file())
        else:
            found = [Path(f"{made}{ending}") for ending in (".json", ".parquet")]
            yield from (file for file in found if (folder / file).is_file())
