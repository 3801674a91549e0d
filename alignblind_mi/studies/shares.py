"""One run in several processes that share nothing but a file system: each does its share of the jobs, and the shares make the whole.

Give `Share(1, 3)`, `Share(2, 3)` and `Share(3, 3)` as `execute` to three runs of one configuration, at the same time or one after the
other. In one folder they add up as they go; in folders of their own, `merge` adds them up. Does NOT know what a job computes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from alignblind_mi.borders.reading import is_file, is_folder, named, read_object
from alignblind_mi.borders.settings import Count, File, Listed, check_fields, takes
from alignblind_mi.borders.texts import shown
from alignblind_mi.borders.writing import FOREVER, digest, one_process, write_bytes, write_text
from alignblind_mi.errors import AlignblindError, ResultError
from alignblind_mi.progress import Progress
from alignblind_mi.results import LOCK, PIECES, STUDY, StudyFolder
from alignblind_mi.studies.drawn import drawn_files
from alignblind_mi.studies.jobs import Job, run_job
from alignblind_mi.studies.pieces import PLAN, planned, put_together

SHARES = "shares.json"    # of a folder: what the jobs of the whole run make


class ShareError(AlignblindError):
    """A share that does not exist, or shares that do not make a whole."""


@dataclass(frozen=True)
class Share:
    """The `number`-th of `shares` shares of a run, from 1: an executor (see `jobs.py`).

    Jobs are divided by what they ask, in their order, so that each share holds as few models as can be. What others come after (training
    of adapters) belongs to nobody: whichever share comes first does it, and the others wait for it.

    Errors: ShareError for a share that does not exist.
    """

    number: Count
    shares: Count

    def __post_init__(self) -> None:
        check_fields(self, ShareError)
        if self.number > self.shares:
            raise ShareError(f"share {self.number}/{self.shares} does not exist: give 1/{self.shares} to {self.shares}/{self.shares}.")

    @classmethod
    def of(cls, text: str) -> "Share":
        """From a text such as "1/3". Errors: ShareError for any other."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None or "0" in (found[1].lstrip("0") or "0", found[2].lstrip("0") or "0"):
            raise ShareError(f"{shown(text)} is no share: write its number and how many there are, such as 1/3.")
        return cls(int(found[1]), int(found[2]))

    @property
    def share(self) -> str:
        """Its name."""
        return f"{self.number}-of-{self.shares}"

    def chosen(self, jobs: Sequence[Job]) -> list[Job]:
        """Its jobs, of those that no other comes after."""
        needed = {name for job in jobs for name in job.after}
        divided = [job for job in jobs if job.name not in needed]
        total, before, found = sum(job.cost for job in divided), 0.0, []
        for job in divided:
            if int(self.shares * (before + job.cost / 2) / total) == self.number - 1:
                found.append(job)
            before += job.cost
        return found

    def __call__(self, jobs: Sequence[Job], folder: StudyFolder, progress: Progress) -> None:
        """Run them: first what needs nothing, then what comes after something, which is done here unless another share is at it."""
        write_shares(folder, jobs)
        mine = self.chosen(jobs)
        needed = [job for job in jobs if job.name in {name for one in mine for name in one.after}]
        progress.total = len(mine) + len(needed)
        free = [job for job in needed if any(one.name in job.after and not one.done(folder) for one in jobs)
                or not _alone(job, folder, progress, wait=0.0)]
        for job in mine:
            if not job.after:
                run_job(job, folder, progress)
        for job in free:
            _alone(job, folder, progress, wait=FOREVER)
        for job in mine:
            if job.after:
                run_job(job, folder, progress)


def _alone(job: Job, folder: StudyFolder, progress: Progress, *, wait: float) -> bool:
    """Run a job, or wait until another share has; False where another one is at it and `wait` is 0."""
    busy = ShareError(f"another share is at {job.name}.")
    try:
        with one_process(folder.path / f"{LOCK}-{job.name.replace(' ', '-')}", busy, wait=wait):
            run_job(job, folder, progress)
    except ShareError as error:
        if error is not busy:
            raise
        progress.note(f"{job.name}: another share is at it; the others first.")
        return False
    return True


# ---- what there is, and what is missing ----------------------------------------------------------------------------------


def write_shares(folder: StudyFolder, jobs: Sequence[Job]) -> None:
    """Note in the folder what the whole run makes, so that whoever looks knows what is missing."""
    makes = {job.name: list(job.makes) for job in jobs}
    known = _noted(folder.path)
    if known != known | makes:    # a run of fewer parts, or of parts that were whole by then, takes nothing away
        write_text(folder.path / SHARES, json.dumps(known | makes, indent=1))


def _noted(folder: Path) -> dict[str, list[str]]:
    note = folder / SHARES
    return read_object(note, "", ResultError, advice="delete it; the next share writes it again") if is_file(note) else {}


@takes(ShareError)
def missing_jobs(folder: File) -> list[str]:
    """The jobs of a run in shares that are not finished in a folder; none of a folder that no share has been at."""
    folder = Path(folder)
    return [name for name, makes in _noted(folder).items() if not all(_is_made(folder, made) for made in makes)]


def _is_made(folder: Path, made: str) -> bool:
    place, part = folder / made, made.removeprefix(f"{PIECES}/").rpartition(".")[0]
    if made.startswith(f"{PIECES}/") and is_file(folder / f"{part}.parquet"):
        return True
    return is_file(Path(f"{place}.parquet")) or (place.is_dir() and any(place.iterdir()))


Folders = Annotated[Sequence[File], Listed(some=True)]


@takes(ShareError)
def merge(folders: Folders, out: File) -> list[str]:
    """Bring the results of shares that ran in folders of their own together in `out`, which may be one of them. Returns what is missing
    yet (see `missing_jobs`).

    Errors: ShareError for a folder that no share has been at, shares of another configuration, an adapter that was trained to different
    weights, and a part whose rows differ; `out` then has what it had.
    """
    places, out = [Path(folder) for folder in folders], Path(out)
    others = [place for place in dict.fromkeys(places) if place.absolute() != out.absolute()]
    for place in (*others, *([out] if out in places else [])):
        if not is_folder(place) or not is_file(place / SHARES):
            raise ShareError(f"{named('', place)} holds no share: give the folders that --shard wrote into.")
    identity = read_object(places[0] / STUDY, "", ResultError)
    wanted: dict[str, Path] = {}
    for place in others:
        if read_object(place / STUDY, "", ResultError) != identity:
            raise ShareError(f"{place} holds a share of another configuration than {places[0]}: merge what belongs together.")
        for file in _to_copy(place):
            known = wanted.get(file, out / file)
            if is_file(known) and not _same(known, place / file):
                raise ShareError(f"{place / file} differs from {known}: shares that trained or computed the same thing apart came to "
                                 "different results. Let them share one folder instead (one --out), or delete one of the two.")
            wanted.setdefault(file, place / file)
    with StudyFolder.claim(out, identity) as folder:
        for file, source in wanted.items():
            if not is_file(out / file):
                write_bytes(out / file, source.read_bytes())
        for place in others:
            write_text(out / SHARES, json.dumps(_noted(out) | _noted(place), indent=1))
        put_together(folder, planned(folder))
    return missing_jobs(out)


def _to_copy(place: Path) -> Iterator[str]:
    """The files of a share's results, as paths in its folder: notes before their rows; nothing that was drawn from them."""
    left = {STUDY, SHARES, *drawn_files(place)}
    kinds = ("*.json", "*.parquet")
    for pattern in (f"{PIECES}/{PLAN}", *(f"{PIECES}/{kind}" for kind in kinds), *kinds, "adapters/*/*"):
        for file in sorted(place.glob(pattern)):
            name = str(file.relative_to(place))
            if file.is_file() and not file.is_symlink() and name not in left:
                yield name


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold the same result: the same bytes, or (of a note) a result that was made at another time."""
    return one.suffix == ".json" or digest(one.read_bytes()) == digest(other.read_bytes())
