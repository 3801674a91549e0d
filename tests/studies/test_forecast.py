"""The forecast: sizes that are those of the loaded model, rows that are those of the study, and a time from a measured rate."""

import json

import forked
import pytest
from transformers import AutoModelForCausalLM

from alignblind_mi.mitigations.placebos import SAMPLE, SEEDS
from alignblind_mi.models.configs import load_config
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.stimuli.prompts import worded_assignments
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.forecast import fit, forecast, measured_rate, parameter_count, study_load
from alignblind_mi.studies.parts import MATCHING, study_parts
from alignblind_mi.studies.running import load_study, run_study


@pytest.fixture(scope="module")
def config(tiny_folder, brief) -> StudyConfig:
    return StudyConfig.create(str(tiny_folder), str(tiny_folder), concept=brief, quick=True, dtype="float32", device="cpu")


def test_parameters_are_counted_without_loading(tiny_folder, llama3_folder):
    for folder in (tiny_folder, llama3_folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        total, embedded = parameter_count(load_config(ModelSpec(str(folder))))
        assert total == sum(p.numel() for p in model.parameters())
        tied = model.config.tie_word_embeddings
        assert embedded == (1 if tied else 2) * model.get_input_embeddings().weight.numel()


def test_what_fits_follows_the_memory(llama3_folder):
    import torch

    found = load_config(ModelSpec(str(llama3_folder)))
    total, embedded = parameter_count(found)
    sizes = {n: fit(found, total, embedded, n, 1 << 34, torch.device("cpu")) for n in ("float32", "bfloat16", "4bit")}
    assert sizes["float32"].weights == 4 * total
    assert sizes["bfloat16"].weights == 2 * total
    assert all(one.fits for one in sizes.values())
    assert not fit(found, total, embedded, "float32", sizes["float32"].weights, torch.device("cpu")).fits


@pytest.mark.slow
def test_the_rows_of_the_forecast_are_those_of_the_study(config, tmp_path):
    stages, rows = study_load(config), {}
    run_study(config, tmp_path)
    for name, result in load_study(tmp_path).items():
        if "awareness" not in name:
            stage = name.split("_")[0]
            rows[stage] = rows.get(stage, 0) + len(result.rows)
    assert rows["behaviour"] == stages["behaviour"]["rows"]
    assert rows["balanced"] == stages["balanced"]["rows"]
    assert stages["steering"]["rows"] > rows["steering"], "with the readings of the compared windows"
    matching = 2 * SEEDS * MATCHING * SAMPLE    # two windows
    assert stages["noise"]["rows"] == rows["noise"] + matching


def test_answers_whose_probability_is_read_are_counted(config, race):
    (load,) = (load for part in study_parts(config, load_concept(config.concept)) if part.name == "behaviour_base"
               for load in part.loads() if load.scored)
    assert len(load.scored) == len(load.prompts)
    assert load.scored[0] == [text for both in worded_assignments(race, load.prompts[0]) for text in both]


def test_a_rate_is_measured_and_makes_a_time(config):
    found = forecast(config)
    assert found.rate is not None
    assert found.seconds == pytest.approx(sum(stage["seconds"] for stage in found.stages.values()))
    assert found.seconds > 0
    text = str(found)
    assert "fits" in text
    assert "<- as asked" in text
    assert "At the rate measured here" in text
    silent = forecast(config, measure=False)
    assert (silent.rate, silent.seconds) == (None, None)
    assert "No rate was measured" in str(silent)


def test_a_model_too_large_to_be_tried_gets_no_rate(llama3_folder):
    spec = ModelSpec(str(llama3_folder), dtype="float32", device="cpu")
    assert measured_rate(load_config(spec), spec, 1000) is None


@pytest.mark.slow
def test_the_command_prints_json_alone_and_one_sentence_for_a_missing_model(tiny_folder):
    command = ["-m", "alignblind_mi", "forecast", "--quick", "--no-rate"]
    done = forked.run([*command, "--base", tiny_folder, "--aligned", tiny_folder, "--json"])
    done.check_returncode()
    assert {"parameters", "fits", "stages", "seconds"} <= set(json.loads(done.stdout))
    done = forked.run([*command, "--base", "/no/such/folder"])
    assert done.returncode == 2
    assert done.stderr.startswith("alignblind: the model '/no/such/folder' cannot be found")
    with pytest.raises(ModelError, match="unknown engine"):
        ModelSpec("x", engine="quick")
