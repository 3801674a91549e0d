"""Shares by submitit, with its executor that runs jobs on this machine."""

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.on_slurm import submit_shares
from alignblind_mi.studies.parts import study_parts
from alignblind_mi.studies.running import load_study, run_parts
from alignblind_mi.studies.shares import ShareError

submitit = pytest.importorskip("submitit", reason="the extra [slurm] is not installed")


def test_submitted_shares_add_up(tiny_folder, tmp_path):
    config = StudyConfig.create(str(tiny_folder), str(tiny_folder), quick=True)
    some = [replace(part, same_as="") for part in study_parts(config, load_concept("race")) if part.name.startswith("view_")]
    run = partial(run_parts, config, parts=some)
    jobs = submit_shares(run, tmp_path / "out", shares=2, executor=submitit.AutoExecutor(tmp_path / "log", cluster="local"))
    assert [job.result() for job in jobs] == [None, None]
    run(out=tmp_path / "serial")
    serial, shared = load_study(tmp_path / "serial"), load_study(tmp_path / "out")
    assert set(serial) == set(shared) == {part.name for part in some}
    for name, result in serial.items():
        pd.testing.assert_frame_equal(shared[name].rows, result.rows, check_exact=True)


def test_what_is_no_executor_is_refused(tmp_path):
    with pytest.raises(ShareError, match=r"str is no executor.*submitit\.AutoExecutor"):
        submit_shares(print, tmp_path, shares=2, executor="slurm")
