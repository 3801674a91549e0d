"""Models that keep a state instead of keys and values, layers that give tuples, and what is no causal language model.

What works gives transformers' own numbers, one row at a time; what does not is one sentence when the model is loaded.
"""

import logging

import pytest
import torch
import transformers
from doubles import tiny_llama

from alignblind_mi.instruments.gradients import log_odds_gradients
from alignblind_mi.models.edits import Edit, Row, Site
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.prompts import mark

pytestmark = pytest.mark.slow
WORDS = [f"w{i}" for i in range(60)]
# name -> options beyond the common ones, whether rows of different lengths run together, whether a cache can be used
FAMILIES: dict[str, tuple[dict, bool, bool]] = {
    "Mamba": ({"state_size": 8}, True, False),
    "Rwkv": ({"attention_hidden_size": 32}, False, False),
    "Lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, True, False),
    "FalconH1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}, True, False),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6}, True, True),
}
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(tiny_llama(tmp_path_factory.mktemp("words"), WORDS))


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch, words):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: words)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, words, tmp_path_factory):
    options, padded, cached = FAMILIES[request.param]
    torch.manual_seed(1)
    kind = getattr(transformers, f"{request.param}Config")
    common = {name: value for name, value in COMMON.items() if hasattr(kind(), name)}    # no more than its own: Mamba has no heads
    config = kind(**{**common, "vocab_size": len(words), **options})
    folder = tmp_path_factory.mktemp("family")
    getattr(transformers, f"{request.param}ForCausalLM")(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder, padded, cached


@pytest.fixture
def model(family) -> HookedModel:
    return load_model(str(family[0]))


def rows() -> list[Row]:
    """Rows of different lengths, with and without edits, some of which go on behind the prompt."""
    prompts = [mark(" ".join(WORDS[:n]), here="w2", end=WORDS[n - 1]) for n in (20, 3, 11)]
    vector = 2 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    edits = [(), (Edit(Site(1, "here"), vector),), (Edit(Site(2, "here"), vector, "add"), Edit(Site(1, "generated"), vector, "add"))]
    return [Row(prompt, some) for prompt in prompts for some in edits]


@pytest.fixture
def own(family, monkeypatch):
    """The model as transformers loads it, with a row's edits as hooks of our own: log-probabilities after every token of a text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(family[0]).eval()
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)

    def run(hooked: HookedModel, row: Row, more: list[int]) -> torch.Tensor:
        item = hooked.encode([row.prompt])[0]
        ids, handles = [*item.ids, *more], []
        for edit in row.edits:
            where = list(range(len(item.ids), len(ids))) if edit.site.mark == "generated" else item.positions(edit.site.mark)

            def act(module, args, output, where=where, edit=edit):
                value = (output[0] if isinstance(output, tuple) else output).clone()
                value[0, where] = value[0, where] + edit.vector if edit.how == "add" else edit.vector
                return (value, *output[1:]) if isinstance(output, tuple) else value

            handles.append(layers[edit.site.layer].register_forward_hook(act))
        with torch.no_grad():
            found = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return found

    return run


def test_what_is_switched_off_is_what_the_model_does_not_bear(family, model):
    _, padded, cached = family
    assert isinstance(model.engine, PlainEngine)
    assert (model.engine.padded, model.engine.cached) == (padded, cached)


def test_next_tokens_continuations_and_answers_are_the_model_s_own(model, own):
    some = rows()
    found = model.next_log_probs(some)
    choices = [" w1 w2 w3", " w4"]
    scored = model.continuation_log_probs(some, [choices] * len(some))
    made = model.generate(some, 4)
    for row, log_probs, values, generation in zip(some, found, scored, made, strict=True):
        n = len(model.encode([row.prompt])[0].ids)
        assert (own(model, row, [])[-1] - log_probs).abs().max() < 1e-4
        for text, value in zip(choices, values, strict=True):
            ids = model.word_ids(text)
            whole = own(model, row, ids)
            assert float(value) == pytest.approx(sum(float(whole[n - 1 + k, i]) for k, i in enumerate(ids)), abs=1e-3)
        ids: list[int] = []
        for _ in range(4):
            ids.append(int(own(model, row, ids)[-1].argmax()))
            if ids[-1] in model.stop_ids:
                break
        assert generation.text == model.tokenizer.decode([i for i in ids if i not in model.stop_ids], skip_special_tokens=True)


def test_readings_are_the_layers_own(model, family):
    prompt = mark(" ".join(WORDS[:12]), here="w2")
    own = transformers.AutoModelForCausalLM.from_pretrained(family[0]).eval()
    layers = next(m for m in own.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    kept = []
    handle = layers[1].register_forward_hook(lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        own(torch.tensor([model.encode([prompt])[0].ids]), use_cache=False)
    handle.remove()
    at = model.encode([prompt])[0].positions("here")[0]
    found = model.record([Row(mark("w1", here="w1")), Row(prompt)], [Site(1, "here")])[1, 0]
    assert torch.allclose(found, kept[0][0, at], atol=1e-4)


def test_the_log_says_what_is_slow(family, caplog):
    with caplog.at_level(logging.WARNING):
        load_model(str(family[0]))
    assert ("read from the beginning at every token" in caplog.text) == (not family[2])


def test_gradients_where_rows_cannot_be_padded(family, model):
    row = Row(mark("w5 w6 w7", here="w6"))
    if family[1]:
        assert log_odds_gradients(model, row, (" w1 w2", " w3"), [(1, "resid_post")])
    else:
        assert log_odds_gradients(model, row, (" w1", " w3"), [(1, "resid_post")])
        with pytest.raises(ModelError, match="answers of the same number of tokens"):
            log_odds_gradients(model, row, (" w1 w2", " w3"), [(1, "resid_post")])


@pytest.mark.parametrize("engine", ["auto", "plain", "fast"])
def test_a_model_that_reads_both_ways_is_refused(words, tmp_path, engine):
    torch.manual_seed(1)
    transformers.BertLMHeadModel(transformers.BertConfig(**{**COMMON, "vocab_size": len(words)})).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"BertLMHeadModel\) is not a causal language model"):
        load_model(ModelSpec(str(tmp_path), engine=engine))
