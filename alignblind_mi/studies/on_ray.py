"""One run on a Ray cluster: actors that each hold one loaded model pull the jobs that are left, and this process alone writes the folder.

An actor runs the same configuration in a scratch folder of its own, makes the same list of jobs from it, and is told which to do. It sends
back the files that the job made, and the driver puts each in its place (whole or not at all), so a shared file system is not needed, and
the folder looks as after a run in one process. A job whose actor or node is lost is done again; a driver that was killed goes on
where it was, when it is started again. This module does NOT know what a job computes, and leaves to Ray where an actor runs.
"""

import contextlib
import logging
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignblind_mi.borders.settings import Count, File, Positive, takes
from alignblind_mi.borders.texts import shown
from alignblind_mi.borders.writing import write_bytes
from alignblind_mi.errors import AlignblindError
from alignblind_mi.progress import Progress, counted
from alignblind_mi.results import PIECES, STUDY, StudyFolder
from alignblind_mi.studies.jobs import Job, made_files
from alignblind_mi.studies.pieces import PLAN
from alignblind_mi.studies.shares import write_shares

LOCAL = "local"    # a cluster on this machine alone, which ends with the run
TRIES = 3    # of a job whose actor is lost: then something is wrong with the job
SHIPPED = (STUDY, f"{PIECES}/{PLAN}")    # what an actor must know of the folder to make the same jobs

MOST_ACTORS = 1000
PATIENCE = 60.0    # seconds without any actor, after which it is said

Files = Mapping[str, bytes]


class RayError(AlignblindError):
    """A cluster that cannot be had, or a job that is lost with every actor that tries it."""


@takes(RayError)
def run_on_ray(run: Callable[..., Any], out: File, *, address: str = LOCAL, actors: Count | None = None, cpus: Count = 1,
               gpus: Positive | None = None) -> Path:
    """Run or resume `run` in `out` on a Ray cluster. Returns `out`.

    run: all of a run but its folder, such as `partial(run_study, config)`, `partial(run_comparison, config)` or
    `partial(run_calibration, config)`. address: "local" (a cluster on this machine alone, which ends with the run), "auto" (that which
    this machine belongs to), or an address that `ray.init` takes. actors: how many models are in memory at the same time (default: as
    many as the cluster has room for). cpus, gpus: of each actor (gpus: 1 by default where the cluster has any; several, or "--device-map
    auto", for a model that needs them).

    Errors: RayError without Ray or a cluster, for actors that have no room, and for a job whose actors are lost three times; as `run`.
    """
    with _cluster(address):
        size, each = _room(actors, cpus, gpus)
        return Path(run(out=Path(out), execute=_Driver(run, size, cpus, each)))


def _room(actors: int | None, cpus: int, gpus: float | None) -> tuple[int, float]:
    """How many actors, and the GPUs of each. Errors: RayError where they have no room."""
    has = _ray().cluster_resources()
    each = gpus if gpus is not None else float(has.get("GPU", 0) >= 1)
    most = int(min(has.get("CPU", 0) // cpus, has.get("GPU", 0) // each if each else MOST_ACTORS, MOST_ACTORS))
    if most < (actors or 1):
        raise RayError(f"the Ray cluster has {has.get('CPU', 0):.0f} CPUs and {has.get('GPU', 0):.0f} GPUs: {actors or 1} actors of {cpus} "
                       f"CPUs and {each:g} GPUs each have no room there; ask for fewer, or for less each.")
    return actors or most, each


@dataclass(frozen=True)
class _Driver:
    """The executor of the process that writes: among how many actors, and what each of them has."""

    run: Callable[..., Any]
    shares: int
    cpus: int
    gpus: float
    share: str = ""

    def __call__(self, jobs: Sequence[Job], folder: StudyFolder, progress: Progress) -> None:
        """Run the jobs."""
        write_shares(folder, jobs)
        left = [job for job in jobs if not job.done(folder)]
        if left:
            with counted("jobs", len(left), "jobs") as advance:
                crew = _Crew(self, left, jobs, folder, progress, min(self.shares, len(left)))
                try:
                    crew.work(advance)
                finally:
                    crew.leave()


@dataclass
class _Crew:
    """The actors of one run, and the jobs that are left for them. An actor gets a job only when it is there."""

    driver: _Driver
    left: list[Job]
    jobs: Sequence[Job]
    folder: StudyFolder
    progress: Progress
    size: int
    coming: dict[Any, Any] = field(default_factory=dict)    # actors that have no room yet, or are starting, by what Ray promises
    idle: list[tuple[Any, str]] = field(default_factory=list)    # with the model that each holds
    running: dict[Any, tuple[Any, Job]] = field(default_factory=dict)    # by what Ray promises
    lost: Counter[str] = field(default_factory=Counter)    # how often a job's actor was lost

    def work(self, advance: Callable[[int], None]) -> None:
        """Until nothing is left. Errors: those of a job, RayError."""
        ray = _ray()
        while self.left or self.running:
            wanted = min(self.size, len(self.left) + len(self.running))
            while len(self.coming) + len(self.idle) + len(self.running) < wanted:
                actor = self._actor()
                self.coming[actor.ready.remote()] = actor
            self._assign()
            done, _ = ray.wait([*self.running, *self.coming], num_returns=1, timeout=None if self.running else PATIENCE)
            if not done:
                self.progress.note("waiting for room on the Ray cluster; its nodes: ray status")
                continue
            promise = done[0]
            if promise in self.coming:
                self._arrived(promise)
                continue
            actor, job = self.running.pop(promise)
            try:
                files = ray.get(promise)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, AlignblindError) else error from None
            except ray.exceptions.RayError as error:    # the actor, or its node, is gone
                self._again(job, error)
                continue
            for name, data in files.items():
                write_bytes(self.folder.path / name, data)
            self.idle.append((actor, job.model))
            advance(1)
            self.progress.begun += 1
            self.progress.note(f"[{self.progress.begun}/{self.progress.total}] {job.name}: done")

    def leave(self) -> None:
        """Have the actors that are idle clear their scratch folders away; one that is killed, or at work when a run ends, cannot."""
        ray = _ray()
        with contextlib.suppress(ray.exceptions.RayError):    # an actor that is lost just now
            ray.get([actor.leave.remote() for actor, _ in self.idle], timeout=PATIENCE)

    def _actor(self) -> Any:
        shipped = {name: (self.folder.path / name).read_bytes() for name in SHIPPED if (self.folder.path / name).is_file()}
        worker = _ray().remote(num_cpus=self.driver.cpus, num_gpus=self.driver.gpus, max_restarts=0)(_Worker)
        return worker.remote(self.driver.run, self.driver.shares, shipped)

    def _arrived(self, promise: Any) -> None:
        ray, actor = _ray(), self.coming.pop(promise)
        try:
            ray.get(promise)
        except ray.exceptions.RayActorError as error:
            said = [line for line in str(error).splitlines() if line.strip()]
            if error.actor_init_failed:
                raise RayError(f"an actor could not begin: {said[-1]} Every node needs this package, and the models, as this machine has "
                               "them.") from error
            self._again(None, error)
            return
        self.idle.append((actor, ""))

    def _assign(self) -> None:
        """Give every idle actor a job that may begin: of the model that it holds, else of one that nobody else is at, if there is one."""
        while self.idle:
            unfinished = {job.name for job in self.left} | {job.name for _, job in self.running.values()}
            ready = [job for job in self.left if not unfinished & set(job.after)]
            if not ready:
                return
            taken = {job.model for _, job in self.running.values()}
            pairs = [(held == job.model, job.model not in taken, -i, at, job) for at, (_, held) in enumerate(self.idle)
                     for i, job in enumerate(ready)]
            *_, at, job = max(pairs, key=lambda pair: pair[:3])
            actor, _ = self.idle.pop(at)
            self.left.remove(job)
            needed = [made for one in self.jobs if one.name in job.after for made in one.makes]
            files = {str(file): (self.folder.path / file).read_bytes() for file in made_files(self.folder.path, needed)}
            self.running[actor.do.remote(job.name, files)] = (actor, job)

    def _again(self, job: Job | None, error: Exception) -> None:
        """A job is done again, and another actor takes the lost one's place. Errors: RayError where that happens again and again."""
        what = job.name if job is not None else "its first step"
        self.lost[what] += 1
        if self.lost[what] >= TRIES:
            raise RayError(f"the actors that tried {what} were lost {TRIES} times ({str(error).splitlines()[0]}): give each more memory "
                           "(fewer actors), or look into Ray's own log. What is finished is kept.") from error
        self.progress.note(f"{what}: its actor was lost; it is done again.")
        if job is not None:
            self.left.insert(0, job)


class _Worker:
    """An actor: the jobs of a run, in a scratch folder of its own."""

    def __init__(self, run: Callable[..., Any], shares: int, shipped: Files) -> None:
        self.scratch = TemporaryDirectory(prefix="alignblind-")
        for name, data in shipped.items():
            write_bytes(Path(self.scratch.name) / name, data)
        self.jobs: dict[str, Job] = {}
        self.folder: StudyFolder
        run(out=Path(self.scratch.name), execute=_Kept(self, shares))

    def ready(self) -> None:
        """Say that it is there."""

    def leave(self) -> None:
        """Clear the scratch folder away."""
        self.scratch.cleanup()

    def do(self, name: str, files: Files) -> dict[str, bytes]:
        """Do a job, with what others have made for it. Returns the files that it made."""
        for path, data in files.items():
            if not (self.folder.path / path).exists():
                write_bytes(self.folder.path / path, data)
        job = self.jobs[name]
        job.run(self.folder, lambda rows: None)
        return {str(file): (self.folder.path / file).read_bytes() for file in made_files(self.folder.path, job.makes)}


@dataclass(frozen=True)
class _Kept:
    """An executor that keeps the jobs for later, with the number of threads that the run wants for them."""

    worker: _Worker
    shares: int
    share: str = ""

    def __call__(self, jobs: Sequence[Job], folder: StudyFolder, progress: Progress) -> None:
        import torch

        threads = torch.get_num_threads()    # the run puts it back when it ends; the jobs come after that
        self.worker.folder = folder
        self.worker.jobs = {job.name: Job(job.name, _threaded(job, threads), job.done, job.model, job.after, job.makes) for job in jobs}


def _threaded(job: Job, threads: int) -> Callable[..., None]:
    def run(folder: StudyFolder, advance: Callable[[int], None]) -> None:
        import torch

        torch.set_num_threads(threads)
        job.run(folder, advance)
    return run


# ---- the cluster -------------------------------------------------------------------------------------------------------


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RayError("Ray is not installed: pip install 'alignblind-mi[ray]', or divide the run with --shard.") from error
    return ray


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    """Be connected to a cluster; one that was begun for it ends with it."""
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    try:
        _reach(address)
        ray.init(address=address, include_dashboard=False if address == LOCAL else None, log_to_driver=False,
                 logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise RayError(f"no Ray cluster at {shown(address)}: {str(error).splitlines()[0]} Start one (ray start --head), or give 'local'."
                       ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Errors: ValueError for what is no address, OSError for a machine and port where nobody listens; Ray itself tries such for minutes."""
    if address in (LOCAL, "auto"):
        return
    found = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})", address)
    if found is None:
        raise ValueError("that is no address: host:port, ray://host:port, auto or local.")
    socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=10).close()
