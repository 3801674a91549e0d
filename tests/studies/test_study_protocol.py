"""A study under either protocol: what it is by default, what a folder says, and that the forecast counts the rows that it has."""

import json
from dataclasses import replace

import pytest

from alignblind_mi.measures.awareness import measure_selfie
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.results import ResultError
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies import parts
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.parts import Load, observations, study_parts
from alignblind_mi.studies.rivals import plan_rivals
from alignblind_mi.studies.running import load_study, run_parts
from alignblind_mi.studies.single import SingleError, SteeringPlan
from alignblind_mi.studies.study_file import read_study_file


@pytest.fixture(scope="module", params=["paper", "best"])
def config(request, llama3_folder, brief) -> StudyConfig:
    return StudyConfig.create(str(llama3_folder), str(llama3_folder), concept=brief, quick=True, protocol=request.param)


def test_real_models_are_studied_as_in_the_paper_and_organisms_as_they_were(llama3_folder, tmp_path):
    assert StudyConfig.create(str(llama3_folder), str(llama3_folder)).protocol == "paper"
    organism = StudyConfig.create("organism:base", "organism:aligned")
    assert organism.protocol == "best"
    assert "protocol" not in organism.identity(), "folders of former versions are of this one"
    assert replace(organism, protocol="paper").identity()["protocol"] == "paper"
    file = tmp_path / "study.yaml"
    file.write_text("base: organism:base\naligned: organism:aligned\nprotocol: paper\n", "utf-8")
    assert read_study_file(file) == replace(organism, protocol="paper")
    file.write_text("base: organism:base\naligned: organism:aligned\nprotocol: papers\n", "utf-8")
    with pytest.raises(ModelError, match="protocol must be paper or best or null, got 'papers'"):
        read_study_file(file)


def test_what_the_forecast_counts_are_the_open_readings_of_the_protocol(config, llama3, brief):
    (part,) = [part for part in observations(config, load_concept(brief), "base") if part.name == "reading_selfie_base"]
    rows = measure_selfie(llama3, load_concept(brief), config.cue, max_new_tokens=1, max_word_pairs=1, protocol=config.protocol)
    layers = llama3.n_layers
    read, written = part.loads()
    of_text = int((rows["control"] == "text").sum())
    assert len(rows) == len(read.prompts) * layers - of_text * (layers - 1)    # the control `text` is asked once, and counted at most
    assert written.times == len(read.prompts) * layers
    assert all(prompt.text.startswith("Question: ") == (config.protocol == "paper") for prompt in read.prompts)


def test_every_steering_part_and_rival_is_of_the_protocol(config, llama3, brief):
    concept, own = load_concept(brief), config.protocol == "paper"
    parts = [part for part in study_parts(config, concept) if part.name.startswith("steering_")]
    assert parts
    assert isinstance(parts[0].loads()[0], Load)
    plan = plan_rivals(ModelSpec(config.aligned.name), concept, config.cue, llama3.n_layers, LoraSettings(), quick=True,
                       protocol=config.protocol)
    replaced = [rival.make(llama3) for rival in plan.rivals if rival.name in ("steer_early", "steer_late") or (
        rival.family == "placebo" and rival.name.endswith("_early") and not rival.name.startswith(("placebo_noise", "lora")))]
    assert len(replaced) >= 3
    assert all(bool(edit.site.ids) == own for treatment in replaced for edit in treatment.edits)
    added = next(rival for rival in plan.rivals if rival.name.startswith("steer_mean_difference")).make(llama3)
    assert not any(edit.site.ids for edit in added.edits)


def test_noise_stands_for_the_steering_of_the_study_s_protocol(config, llama3, brief, monkeypatch):
    class Seen(Exception):
        pass

    def look(model, treatment, prompts, **options):
        raise Seen(all(bool(edit.site.ids) == (config.protocol == "paper") for edit in treatment.edits))

    monkeypatch.setattr(parts, "noise_placebos", look)
    noise = next(part for part in study_parts(config, load_concept(brief)) if part.name.startswith("noise_"))
    with pytest.raises(Seen, match="True"):
        noise.compute(llama3, lambda n: None)


def test_a_folder_says_its_protocol_and_refuses_the_other(llama3_folder, brief, tmp_path):
    config = replace(StudyConfig.create(str(llama3_folder), str(llama3_folder), concept=brief, quick=True), published_pairs=1)
    parts = [part for part in observations(config, load_concept(brief), "base") if part.name == "awareness_base_paper"]
    run_parts(config, tmp_path / "out", parts)
    assert json.loads((tmp_path / "out" / "study.json").read_text("utf-8"))["protocol"] == "paper"
    assert load_study(tmp_path / "out")["awareness_base_paper"].provenance["config"]["protocol"] == "paper"
    with pytest.raises(ResultError, match="protocol is 'paper' there and None here"):
        run_parts(replace(config, protocol="best"), tmp_path / "out", parts)


def test_a_tokenizer_that_does_not_know_the_lead_is_refused_where_it_is_asked(tmp_path):
    config = StudyConfig.create("organism:base", "organism:aligned", quick=True, protocol="paper")
    parts = {part.name: part for part in observations(config, load_concept("race"), "base")}
    with pytest.raises(ModelError, match=r"does not know 'Question:'.*--protocol best"):
        run_parts(config, tmp_path / "a", [parts["reading_selfie_base"]])
    assert not (tmp_path / "a").exists()


def test_a_direction_has_no_protocol_of_the_paper():
    config = StudyConfig.create("organism:base", "organism:aligned", protocol="paper")
    assert SteeringPlan.create(config).method == "replacement"
    with pytest.raises(SingleError, match="the protocol 'paper' has no method 'pca'"):
        SteeringPlan.create(config, method="pca")
