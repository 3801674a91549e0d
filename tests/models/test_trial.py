"""What is tried when a model is loaded tells rounding from a fault, in numbers of fewer bits too."""

import pytest
import torch
import transformers
from doubles import tiny_llama
from transformers import AutoModelForCausalLM

from alignblind_mi.models.blocks import tolerance
from alignblind_mi.models.engine import Engine
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.models.trial import choose_engine

WORDS = [f"w{i}" for i in range(300)]


@pytest.fixture(scope="module")
def large_logits(tmp_path_factory):
    """A model whose log-probabilities move by .6 nats where bfloat16 rounds otherwise, as those of SmolLM2 do by .25 to .9."""
    folder = tiny_llama(tmp_path_factory.mktemp("large"), WORDS, layers=12, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 10
    model.save_pretrained(folder)
    return str(folder)


def test_a_model_whose_rounding_is_large_is_no_other_model(large_logits):
    model = load_model(ModelSpec(large_logits, dtype="bfloat16"))
    assert isinstance(model.engine, Engine)
    assert tolerance(model.engine.model) > 0.6
    assert model.bridge
    assert model.next_log_probs(["w1 w2"]).isfinite().all()
    exact = load_model(large_logits)
    assert tolerance(exact.engine.model) == 1e-3


def test_a_fault_is_still_found_where_rounding_is_large(large_logits, monkeypatch):
    spec = ModelSpec(large_logits, dtype="bfloat16", engine="fast")
    own = Engine._layer
    monkeypatch.setattr(Engine, "_layer",
                        lambda self, layer, hidden, *rest: own(self, layer, hidden, *rest) + (hidden if layer == 5 else 0))
    with pytest.raises(ModelError, match=r"the fast engine cannot run .*: its log-probabilities differ from the model's own"):
        choose_engine(spec, AutoModelForCausalLM.from_pretrained(large_logits, dtype=torch.bfloat16).eval())


def test_a_model_that_reads_both_ways_is_refused_in_few_bits(tmp_path):
    torch.manual_seed(1)
    tiny_llama(tmp_path, WORDS)
    size = len(transformers.AutoTokenizer.from_pretrained(tmp_path))
    config = transformers.BertConfig(vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                                     initializer_range=0.2)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"BertLMHeadModel\) is not a causal language model"):
        load_model(ModelSpec(str(tmp_path), dtype="bfloat16"))
