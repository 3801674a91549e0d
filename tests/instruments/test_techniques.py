"""Patchscope, steering and LoRA: each gives rows or a Treatment, checked against doing it by hand."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.instruments.patchscope import patchscope_rows
from alignblind_mi.mitigations.examples import Example
from alignblind_mi.mitigations.lora import awareness_examples, train_lora
from alignblind_mi.mitigations.lora_settings import LoraError, LoraSettings, layer_group
from alignblind_mi.mitigations.steering import layer_windows, sense_steering, steerable, window_size
from alignblind_mi.models.edits import Edit, EditError, Row, Site
from alignblind_mi.models.model import load_model
from alignblind_mi.stimuli.prompts import implicit_prompts, interpretation_prompt, steering_prompt


def test_a_patchscope_onto_itself_is_the_clean_run(race, tiny):
    question = interpretation_prompt(race.interpretation("paper"))
    resid = tiny.record([Row(question)], [Site(2, "placeholder")])[0]
    patched = tiny.next_log_probs(patchscope_rows(resid, question, 2))
    assert torch.allclose(patched, tiny.next_log_probs([Row(question)]), atol=1e-5)


def test_a_patchscope_fills_every_token_of_the_placeholder(race, llama3):
    question = interpretation_prompt(race.interpretation("paper"))
    (row,) = patchscope_rows(torch.ones(1, llama3.d_model), question, 0)
    (item,) = llama3.encode([question])
    assert len(item.positions("placeholder", "all")) > 1
    by_hand = torch.ones(llama3.d_model)
    edited = llama3.next_log_probs([row])
    last_only = llama3.next_log_probs([Row(question, (Edit(Site(0, "placeholder"), by_hand),))])
    assert (edited - last_only).abs().max() > 1e-4


def test_steering_replaces_by_the_phrase_s_own_activations(race, tiny):
    treatment = sense_steering(tiny, race, "default", "race", range(1, 3))
    phrase = steering_prompt(race, race.cue("default"), "race")
    for edit in treatment.edits:
        own = tiny.record([Row(phrase)], [Site(edit.site.layer, edit.site.mark)])[0, 0]
        assert torch.equal(edit.vector, own)
    assert [(e.site.layer, e.site.mark) for e in treatment.edits] == [(1, "marked"), (1, "unmarked"), (2, "marked"), (2, "unmarked")]
    prompt = implicit_prompts(race, "default")[0]
    at = [Site(2, "marked", occurrence=i) for i in (0, 1)]
    assert torch.allclose(tiny.record(treatment.rows([prompt]), at)[0], treatment.edits[2].vector.expand(2, -1))


def test_steering_with_the_phrase_itself_changes_nothing(race, tiny):
    treatment = sense_steering(tiny, race, "default", "color", range(tiny.n_layers))
    phrase = steering_prompt(race, race.cue("default"), "color")
    assert torch.allclose(tiny.next_log_probs([Row(phrase)]), tiny.next_log_probs(treatment.rows([phrase])), atol=1e-5)


def test_windows_are_the_paper_s_share_of_depth():
    assert window_size(32) == 10
    assert len(layer_windows(32)) == 23
    assert [w[0] for w in layer_windows(8)] == list(range(6))
    assert window_size(80) == 25
    assert window_size(1) == 1
    with pytest.raises(EditError, match="does not fit"):
        layer_windows(4, 5)


def test_cues_with_many_identifiers_are_not_steered(race, tiny):
    assert not steerable(race.cue("names"))
    with pytest.raises(EditError, match="draws from several identifiers"):
        sense_steering(tiny, race, "names", "race", [0])
    with pytest.raises(Exception, match="unknown sense or control"):
        sense_steering(tiny, race, "default", "nothing", [0])
    with pytest.raises(EditError, match="layer 40 does not exist"):
        sense_steering(tiny, race, "default", "race", [40])


def test_layer_groups_are_the_paper_s_split():
    groups = {name: layer_group(name, 32) for name in ("early", "middle", "late", "all")}
    assert groups == {"early": range(20), "middle": range(10, 22), "late": range(20, 32), "all": range(32)}
    assert [*layer_group("early", 8), *layer_group("late", 8)] == list(layer_group("all", 8))
    with pytest.raises(LoraError, match="unknown layer group 'deep'"):
        layer_group("deep", 8)


def test_the_awareness_set_is_large_and_has_no_repeats(race):
    examples = awareness_examples(race)
    assert len(examples) >= 400
    assert len({(e.text, e.completion) for e in examples}) == len(examples)
    assert all(e.text.endswith("\nMy Answer: ") and "people" in e.completion for e in examples)
    asked = {p.text for p in implicit_prompts(race, "default")}
    assert not any(e.text in asked for e in examples)


SETTINGS = LoraSettings(epochs=2, batch_size=8, accumulation=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def adapter(race, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "early"
    return folder, train_lora(str(tiny_folder), awareness_examples(race)[::4], layer_group("early", 4), folder, settings=SETTINGS)


def test_training_makes_a_stock_peft_folder_that_learnt(adapter, race, tiny_folder):
    folder, treatment = adapter
    note = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == list(layer_group("early", 4)) == note["layers"]
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 32, ["q_proj", "v_proj"])
    assert note["examples"] == len(awareness_examples(race)[::4]) == 120
    assert note["losses"][-1] < note["losses"][0]
    assert (treatment.adapter, treatment.family) == ("early", "lora")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    peft = PeftModel.from_pretrained(plain, str(folder)).eval()
    model = load_model(str(tiny_folder), adapters=[folder])
    prompt = implicit_prompts(race, "default")[0]
    ids = AutoTokenizer.from_pretrained(tiny_folder)(prompt.text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = peft(ids).logits[0, -1].log_softmax(-1)
    ours = model.under(treatment).next_log_probs([Row(prompt)])[0]
    assert (ours - expected).abs().max() < 1e-5
    assert (ours - model.next_log_probs([Row(prompt)])[0]).abs().max() > 1e-3


def test_training_touches_the_group_s_layers_only(adapter):
    from safetensors.torch import load_file

    names = load_file(adapter[0] / "adapter_model.safetensors")
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in names}
    assert layers == set(layer_group("early", 4))


def test_training_again_gives_the_same_weights_and_keeps_what_is_there(adapter, race, tiny_folder, tmp_path):
    folder, _ = adapter
    again = tmp_path / "again"
    train_lora(str(tiny_folder), awareness_examples(race)[::4], layer_group("early", 4), again, settings=SETTINGS)
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    before = (folder / "training.json").stat().st_mtime_ns
    train_lora(str(tiny_folder), awareness_examples(race)[::4], layer_group("early", 4), folder, settings=SETTINGS)
    assert (folder / "training.json").stat().st_mtime_ns == before


def test_unusable_training_data_is_named(tiny_folder, tmp_path):
    with pytest.raises(LoraError, match="do not fill a batch"):
        train_lora(str(tiny_folder), [Example("a", "b")], [0], tmp_path / "x", settings=SETTINGS)
    with pytest.raises(LoraError, match="no example is left to train on: 9 are not known"):
        train_lora(str(tiny_folder), [Example("zzz", "yyy")] * 9, [0], tmp_path / "x", settings=SETTINGS)
    assert not (tmp_path / "x").exists()


def test_training_is_silent_on_standard_output(tiny_folder, tmp_path):
    code = ("from alignblind_mi import train_lora, awareness_examples, load_concept, LoraSettings; from pathlib import Path; "
            f"train_lora({str(tiny_folder)!r}, awareness_examples(load_concept('race'))[:8], [0], Path({str(tmp_path / 'q')!r}), "
            "settings=LoraSettings(epochs=1))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""
