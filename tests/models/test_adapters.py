"""Adapters: off until asked for, the right one on, back to what was before, and nothing trainable on the way."""

import pytest
import torch
from doubles import make_adapter, tiny_llama
from oracle import Oracle
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignblind_mi.models.adapters import merge_adapter, unmerge_adapter
from alignblind_mi.models.edits import Row, Treatment
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.prompts import mark

WORDS = [f"w{i}" for i in range(20)]
ROW = Row(mark("w1 w2 w3 w4", here="w2"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("base"), WORDS)
    return base, [make_adapter(base, tmp_path_factory.mktemp("adapters") / name, seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def model(folders):
    return load_model(str(folders[0]), adapters=folders[1])


@pytest.fixture(scope="module")
def expected(folders):
    base, both = folders
    return {name: Oracle(base, folder).next_log_probs(ROW) for name, folder in zip((None, "one", "two"), (None, *both), strict=True)}


def bridge_log_probs(view):
    ids = torch.tensor([view.encode([ROW.prompt])[0].ids])
    with torch.no_grad():
        return view.bridge.forward(ids)[0, -1].log_softmax(-1)


def test_the_bridge_has_the_adapter_of_its_view_and_none_at_first(model, expected):
    assert torch.allclose(bridge_log_probs(model), expected[None], atol=1e-4)
    for name in ("two", "one", None):
        view = model.under(Treatment("t", adapter=name))
        assert torch.allclose(bridge_log_probs(view), expected[name], atol=1e-4), name
        assert torch.allclose(view.next_log_probs([ROW])[0], expected[name], atol=1e-5), name


def test_a_run_inside_another_view_s_run_has_its_own_adapter(model, expected):
    two, inner = model.under(Treatment("t", adapter="two")), []
    model.generate([ROW], 2, progress=lambda n: inner.append(two.next_log_probs([ROW])[0]))
    assert torch.allclose(inner[0], expected["two"], atol=1e-5)
    two.generate([ROW], 2, progress=lambda n: inner.append(model.next_log_probs([ROW])[0]))
    assert torch.allclose(inner[1], expected[None], atol=1e-5)
    assert torch.allclose(model.next_log_probs([ROW])[0], expected[None], atol=1e-5)


def test_no_weight_becomes_trainable(model):
    for name in ("one", None, "two", None):
        model.under(Treatment("t", adapter=name)).next_log_probs([ROW])
        assert not any(p.requires_grad for p in model.engine.model.parameters())


def test_gradients_reach_the_bridge_s_activations(model):
    """transformer-lens' own tools need them: an activation of the twin has a gradient, on the shared weights."""
    ids, kept = torch.tensor([model.encode([ROW.prompt])[0].ids]), []

    def hook(value, hook):
        value = value.detach().requires_grad_(True)
        kept.append(value)
        return value

    with torch.enable_grad(), model.bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", hook)]):
        model.bridge.forward(ids)[0, -1, 5].backward()
    assert kept[0].grad.abs().sum() > 0


def test_folders_that_cannot_be_switched_are_named(folders, tmp_path):
    base, both = folders
    twice = tmp_path / "elsewhere" / "one"
    make_adapter(base, twice, 7)
    with pytest.raises(ModelError, match="same name"):
        load_model(str(base), adapters=[both[0], twice])
    plain = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(plain, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ModelError, match="type PROMPT_TUNING"):
        load_model(str(base), adapters=[tmp_path / "tuned"])


def test_merged_weights_are_the_model_with_its_adapter_and_unmerged_ones_the_model(folders, expected, tmp_path):
    base, (one, _) = folders
    merged = merge_adapter(str(base), one, tmp_path / "merged")
    assert not any(file.suffix in (".bin", ".pt") or file.name.startswith("adapter") for file in merged.iterdir())
    model = load_model(str(merged))
    assert (model.next_log_probs([ROW])[0] - expected["one"]).abs().max() < 1e-4
    assert (expected["one"] - expected[None]).abs().max() > 1e-2
    back = unmerge_adapter(str(merged), one, tmp_path / "back")
    assert (load_model(str(back)).next_log_probs([ROW])[0] - expected[None]).abs().max() < 1e-5
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (back, base))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in theirs)
    touched = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert all("q_proj" in name or "v_proj" in name for name in touched)


def test_a_tied_head_and_the_generation_config_survive_a_merge(folders, tmp_path):
    base, (one, _) = folders
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(str(base), one, tmp_path / "merged"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.generation_config.eos_token_id == AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id


def test_a_merge_that_cannot_be_exact_or_would_overwrite_is_refused(folders, tmp_path):
    base, (one, _) = folders
    with pytest.raises(ModelError, match="quantised weights cannot carry"):
        merge_adapter(ModelSpec(str(base), quantization="8bit"), one, tmp_path / "x")
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="there already"):
        merge_adapter(str(base), one, tmp_path / "there")
    with pytest.raises(ModelError, match=r"no adapter_config.json"):
        merge_adapter(str(base), tmp_path, tmp_path / "x")
    assert {p.name for p in tmp_path.iterdir()} == {"there"}
