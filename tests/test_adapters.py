"""Adapters: off until asked for, the right one on, back to what was before, and nothing trainable on the way."""

import pytest
import torch
from doubles import make_adapter, tiny_llama
from oracle import Oracle
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignblind_mi.edits import Row, Treatment
from alignblind_mi.loading import ModelError
from alignblind_mi.model import load_model
from alignblind_mi.prompts import mark

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
