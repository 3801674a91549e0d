"""Results folders that a former version wrote: they load, and a part that is missing from them is computed as it was then."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignblind_mi.pages.comparison_page import write_comparison
from alignblind_mi.pages.report import write_report
from alignblind_mi.results import load_result
from alignblind_mi.statistics.log_odds import alike
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies.comparison import run_comparison
from alignblind_mi.studies.comparison_verdicts import comparison_tables, read_comparison
from alignblind_mi.studies.config import StudyConfig, as_begun
from alignblind_mi.studies.jobs import serially
from alignblind_mi.studies.parts import study_parts
from alignblind_mi.studies.running import load_study, run_parts

FORMER = Path(__file__).parents[1] / "data" / "former"
CONFIG = StudyConfig.create("organism:base", "organism:aligned", quick=True)


@pytest.fixture
def former(tmp_path):
    """Copies a folder of the former version."""
    def copied(name: str) -> Path:
        return Path(shutil.copytree(FORMER / name, tmp_path / name))
    return copied


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".parquet" or file.name == "study.json"}


def same_rows(found: pd.DataFrame, then: pd.DataFrame) -> None:
    """Numbers to a machine's rounding, all else as it was. Sampled texts hang on the last bit of a probability: one may differ.

    What has been added since stands beside it; log-odds were of one wording.
    """
    found = alike(pd.concat([found, then], ignore_index=True))[list(then.columns)].iloc[: len(found)] if "log_odds" in then else found
    numbers = then.select_dtypes(np.number).columns
    assert list(found.columns) == list(then.columns)
    texts = [name for name in then.columns if name not in numbers]
    differ = (found[texts].fillna("") != then[texts].fillna("")).any(axis=1)
    assert differ.sum() <= 1
    pd.testing.assert_frame_equal(found.loc[~differ, numbers], then.loc[~differ, numbers], rtol=1e-3, atol=1e-4)


def test_a_study_loads_and_is_drawn(former):
    folder = former("study")
    parts = load_study(folder)
    assert set(parts) == {"behaviour_base", "behaviour_aligned", "awareness_aligned_paper", "steering_race_01-03"}
    assert all(len(part.rows) and part.provenance["model"].startswith("organism:") for part in parts.values())
    assert "organism:aligned" in write_report(folder).read_text("utf-8")


def test_a_study_resumes_with_the_rows_that_it_had(former):
    folder = former("study")
    then = load_result(folder / "behaviour_aligned.parquet")
    kept = files(folder)
    for file in folder.glob("behaviour_aligned.*"):
        file.unlink()
    run_parts(CONFIG, folder, [part for part in study_parts(CONFIG, load_concept("race")) if f"{part.name}.parquet" in kept])
    found = load_result(folder / "behaviour_aligned.parquet")
    same_rows(found.rows, then.rows)
    assert set(found.provenance) >= set(then.provenance) - {"versions", "made"}
    changed = {name for name, content in files(folder).items() if content != kept[name]}
    assert changed <= {"behaviour_aligned.parquet"}


def test_a_comparison_loads_and_is_drawn(former):
    folder = former("comparison")
    compared = read_comparison(folder)
    assert set(comparison_tables(compared)["comparison"]["treatment"]) == {"base", "untreated", "steer_early"}
    assert "organism:aligned" in write_comparison(folder).read_text("utf-8")


def test_a_comparison_resumes_with_the_rows_that_it_had(former):
    folder = former("comparison")
    kept, plan = files(folder), (folder / "plan.json").read_bytes()
    then = load_result(folder / "base_untreated_answers.parquet")
    effects = load_result(folder / "base_untreated_effects.parquet")    # on sentences that the concept has no more
    for name in ("answers", "effects"):
        for file in folder.glob(f"base_untreated_{name}.*"):
            file.unlink()
    asked = []

    def only_the_base_model(jobs, folder, progress):
        asked.extend(jobs)
        serially([job for job in jobs if job.name == "untreated (base)"], folder, progress)

    run_comparison(CONFIG, folder, execute=only_the_base_model)
    same_rows(load_result(folder / "base_untreated_answers.parquet").rows, then.rows)
    same_rows(load_result(folder / "base_untreated_effects.parquet").rows, effects.rows)
    changed = {name for name, content in files(folder).items() if content != kept.get(name)}
    new = {"base_untreated_competence.parquet", "base_untreated_qualified.parquet"}    # the former version did not qualify
    assert changed <= {"base_untreated_answers.parquet", "base_untreated_effects.parquet"} | new
    then_planned, now = ([rival["treatment"] for rival in json.loads(text)["rivals"]] for text in (
        plan, (folder / "plan.json").read_text("utf-8")))
    assert now == ["untreated", *(job.name.removesuffix(" (aligned)") for job in asked[-len(now) + 1:])]
    norms = {name for name in then_planned if name.startswith("placebo_noise_")}    # noise of the norms of vectors, which is made no more
    assert norms
    assert set(then_planned) - norms <= set(now)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("make", [getattr(os, "mkfifo", None), lambda path: path.write_text("[" * 100_000),
                                  lambda path: path.write_text('{"concept_digest": []}')])
def test_what_is_no_note_of_a_study_is_not_waited_for(tmp_path, make):
    make(tmp_path / "study.json")
    assert as_begun(CONFIG, tmp_path) == CONFIG    # claiming the folder says what is wrong
