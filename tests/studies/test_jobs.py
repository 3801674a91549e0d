"""The one place where runs are executed: what an executor of one's own is given, and that its rows are those of a run in one process."""

from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest

from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies.comparison import run_comparison
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.jobs import serially
from alignblind_mi.studies.parts import study_parts
from alignblind_mi.studies.running import load_study, run_parts, run_study


@pytest.fixture(scope="module")
def config(tiny_folder) -> StudyConfig:
    made = StudyConfig.create(str(tiny_folder), str(tiny_folder), quick=True)
    return replace(made, balanced_pairs=1, published_pairs=1, decoding=Decoding(max_new_tokens=2, temperature=1.0),
                   lora=LoraSettings(epochs=1, batch_size=32, accumulation=1))


def chosen(config: StudyConfig):
    """Some parts, of both models and of adapters."""
    names = ("behaviour_base", "awareness_aligned_paper", "steering_race_01-01", "lora_early_awareness")
    return [part for part in study_parts(config, load_concept("race")) if part.name in names]


@pytest.mark.parametrize("run", [run_study, run_comparison])
def test_jobs_have_names_of_their_own_and_come_after_what_they_need(config, tmp_path, run):
    given = []
    run(config, tmp_path / "out", execute=lambda jobs, folder, progress: given.extend(jobs))
    names = [job.name for job in given]
    assert len(set(names)) == len(names) > 10
    assert all(set(job.after) <= set(names[:i]) for i, job in enumerate(given))
    needy = [job for job in given if job.model == "aligned with adapters"]
    assert needy
    assert all(job.after == tuple(name for name in names if name.startswith("train ")) for job in needy)
    models = [job.model for job in given if job.model]
    assert sum(one != other for one, other in pairwise(models)) == len(set(models)) - 1
    again = []
    run(config, tmp_path / "elsewhere", execute=lambda jobs, folder, progress: again.extend(jobs))
    assert [job.name for job in again] == names


def test_another_order_and_another_process_give_the_same_rows(config, tmp_path):
    run_parts(config, tmp_path / "serial", chosen(config))

    def some(part):
        """Runs every second job that may run, and the later ones first, as machines that share a folder would."""
        def execute(jobs, folder, progress):
            ready = [job for job in jobs if not job.after]
            late = [job for job in jobs if job.after]
            serially(ready[::-1][part::2] if part < 2 else [*ready, *late], folder, progress)
        return execute

    for part in range(3):
        run_parts(config, tmp_path / "shared", chosen(config), execute=some(part))
        assert len(load_study(tmp_path / "shared")) == (2, 3, 4)[part]
    serial, shared = load_study(tmp_path / "serial"), load_study(tmp_path / "shared")
    assert set(serial) == set(shared) == {part.name for part in chosen(config)}
    for name, result in serial.items():
        pd.testing.assert_frame_equal(shared[name].rows, result.rows)
