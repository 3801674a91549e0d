"""Shares of a run, in one folder and in several: together they are the rows of a run in one process, whatever they were cut into."""

import json
import threading
import time
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from alignblind_mi.borders.writing import one_process
from alignblind_mi.errors import ResultError
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.progress import Progress
from alignblind_mi.results import LOCK, PIECES, StudyFolder
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies import pieces
from alignblind_mi.studies.comparison import run_comparison
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.jobs import Job
from alignblind_mi.studies.part import Part
from alignblind_mi.studies.parts import study_parts
from alignblind_mi.studies.running import load_study, run_parts
from alignblind_mi.studies.shares import Share, ShareError, merge, missing_jobs

NAMES = ("behaviour_base", "balanced_base", "awareness_aligned_paper", "steering_race_01-01", "lora_early", "lora_early_awareness")


@pytest.fixture(scope="module")
def config(tiny_folder) -> StudyConfig:
    made = StudyConfig.create(str(tiny_folder), str(tiny_folder), quick=True)
    return replace(made, balanced_pairs=1, published_pairs=1, decoding=Decoding(max_new_tokens=2, temperature=1.0),
                   lora=LoraSettings(epochs=1, batch_size=32, accumulation=1))


def chosen(config: StudyConfig) -> list[Part]:
    """Some parts, of both models and of adapters, in the order of a study; none is a copy of another."""
    return [replace(part, same_as="") for part in study_parts(config, load_concept("race")) if part.name in NAMES]


@pytest.fixture(scope="module")
def serial(config, tmp_path_factory) -> dict[str, pd.DataFrame]:
    out = run_parts(config, tmp_path_factory.mktemp("serial") / "out", chosen(config))
    return {name: result.rows for name, result in load_study(out).items()}


@pytest.fixture
def run(config, monkeypatch):
    """A run of the parts, of which those of many rows are cut small."""
    monkeypatch.setattr(pieces, "FEWEST", 3)
    return partial(run_parts, config, parts=chosen(config))


def same(folder, serial) -> bool:
    """Whether a folder has the serial rows: exactly, but of parts that were cut up to rounding, since they were asked in other batches."""
    found, cut = load_study(folder), json.loads((folder / PIECES / pieces.PLAN).read_text())
    for name, rows in serial.items():
        pd.testing.assert_frame_equal(found[name].rows, rows, **{"rtol": 1e-3, "atol": 1e-4} if name in cut else {"check_exact": True})
    return set(found) == set(serial)


def test_shares_in_one_folder_add_up_to_the_serial_rows(run, serial, tmp_path):
    out = tmp_path / "out"
    for number in (2, 3, 1):
        assert number == 2 or missing_jobs(out)
        run(out=out, execute=Share(number, 3))
    assert missing_jobs(out) == []
    assert same(out, serial)
    cut = json.loads((out / PIECES / pieces.PLAN).read_text())
    assert cut
    assert not list((out / PIECES).glob("*.parquet"))
    notes = {name: (out / f"{name}.json").read_bytes() for name in serial}
    run(out=out, execute=Share(1, 3))
    run(out=out)
    assert all((out / f"{name}.json").read_bytes() == note for name, note in notes.items())


def test_shares_in_folders_of_their_own_are_merged(run, serial, tmp_path):
    folders = [tmp_path / str(number) for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        run(out=folder, execute=Share(number, 3))
    assert set(load_study(folders[0])) < set(serial)
    left = merge(folders[:2], tmp_path / "out")
    assert left
    assert all(name in missing_jobs(tmp_path / "out") for name in left)
    assert merge(folders, tmp_path / "out") == []
    assert same(tmp_path / "out", serial)
    assert merge(folders, folders[0]) == []
    assert same(folders[0], serial)


def test_a_run_goes_on_with_the_pieces_that_shares_have_left(run, serial, tmp_path):
    out = tmp_path / "out"
    run(out=out, execute=Share(2, 9))
    kept = {file.name: file.stat().st_mtime_ns for file in (out / PIECES).glob("*.parquet")}
    assert kept
    asked = []

    def rest(jobs, folder, progress):
        asked.extend(jobs)
        for job in jobs:
            if not job.done(folder):
                job.run(folder, lambda rows: None)
    run(out=out, execute=rest)
    assert {f"{PIECES}/{name.removesuffix('.parquet')}" for name in kept} <= {made for job in asked for made in job.makes}
    assert same(out, serial)


def test_merging_refuses_what_does_not_belong_together(config, run, tmp_path):
    run(out=tmp_path / "1", execute=Share(1, 2))
    run_parts(replace(config, seed=5), tmp_path / "other", chosen(config)[:1], execute=Share(1, 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShareError, match="another configuration"):
        merge([tmp_path / "1", tmp_path / "other"], tmp_path / "out")
    for name in ("empty", "nowhere"):
        with pytest.raises(ShareError, match=f"{name}.*holds no share"):
            merge([tmp_path / "1", tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_refuses_results_that_differ(run, tmp_path):
    for name in ("1", "2"):
        run(out=tmp_path / name, execute=Share(1, 3))
    file = next((tmp_path / "2").glob("**/*.parquet"))
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ShareError, match=r"differs from .*share one folder"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")


def test_a_share_keeps_out_its_like_and_who_wants_the_whole(tmp_path):
    identity = {"n": 1}
    with StudyFolder.claim(tmp_path / "out", identity, "1-of-2"):
        with StudyFolder.claim(tmp_path / "out", identity, "2-of-2"):
            pass
        for share in ("1-of-2", ""):
            with pytest.raises(ResultError, match="another process"), StudyFolder.claim(tmp_path / "out", identity, share):
                pass
    with StudyFolder.claim(tmp_path / "out", identity), pytest.raises(ResultError, match="another process"):    # noqa: SIM117
        with one_process(tmp_path / "out" / LOCK, ResultError("another process")):
            pass


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_shares_are_balanced_and_hold_every_job_once(shares):
    costs = [5.0, 1.0, 1.0, 8.0, 2.0, 2.0, 2.0, 4.0, 4.0, 1.0, 3.0, 3.0]
    jobs = [Job(str(i), print, bool, cost=cost) for i, cost in enumerate(costs)]    # type: ignore[arg-type]
    jobs.append(Job("train", print, bool))    # type: ignore[arg-type]
    jobs.append(Job("late", print, bool, after=("train",)))    # type: ignore[arg-type]
    taken = [Share(number, shares).chosen(jobs) for number in range(1, shares + 1)]
    assert [job.name for some in taken for job in some] == [job.name for job in jobs if job.name != "train"]
    loads = [sum(job.cost for job in some) for some in taken]
    assert max(loads) <= sum(loads) / shares + max(costs)


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "a/b", "1/3/5", "-1/3", "1/" + "9" * 50, "１/３"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ShareError):
        Share.of(text)


def test_shares_of_a_comparison_hold_every_rival_once_and_train_before(config, tmp_path):
    given = []
    run_comparison(config, tmp_path / "out", execute=lambda jobs, folder, progress: given.extend(jobs))
    rivals = [job.name for job in given if not job.name.startswith("train ")]
    assert [job.name for number in (1, 2, 3) for job in Share(number, 3).chosen(given)] == rivals
    assert all(job.makes for job in given)


def test_an_adapter_that_is_made_of_another_comes_after_it(config, tmp_path):
    given = []
    run_comparison(replace(config, quick=False), tmp_path / "out", execute=lambda jobs, folder, progress: given.extend(jobs))
    made_of = {job.name: job.after for job in given if job.name.startswith("train ") and job.after}
    assert made_of == {f"train {source} x{scale}": (f"train {source}",) for source in ("lora early", "unlearn npo")
                       for scale in ("0p25", "0p5")}


def test_a_share_waits_for_what_another_is_at_before_it_makes_something_of_it(tmp_path):
    """The first step is in another share's hands: what is made of it comes only when it is there."""
    done = []

    def job(name, *after):
        return Job(name, lambda folder, advance: done.append(name), lambda folder: name in done, after=after)

    jobs = [job("train whole"), job("train half", "train whole"), job("alone"), job("measure", "train whole", "train half")]
    with StudyFolder.claim(tmp_path / "out", {"seed": 1}, share="1-of-1") as folder:
        held = threading.Event()

        def another():
            with one_process(folder.path / f"{LOCK}-train-whole", ShareError("busy")):
                held.set()
                time.sleep(1)
                done.append("train whole")

        thread = threading.Thread(target=another)
        thread.start()
        assert held.wait(10)
        Share(1, 1)(jobs, folder, Progress(4))
        thread.join()
    assert done == ["alone", "train whole", "train half", "measure"]
