"""Other families than Llama: whatever engine is chosen gives the model's own numbers, and what would be wrong is refused."""

from pathlib import Path

import families
import pytest
import torch
import transformers
from doubles import tiny_llama

from alignblind_mi.models.edits import Edit, EditError, Row, Site
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.prompts import mark

pytestmark = pytest.mark.slow
WORDS = [f"w{i}" for i in range(60)]
LONG = mark(" ".join(WORDS), here="w30", end="w59")
# name -> (class, options beyond the common ones, engine expected of `auto`, whether the streams inside a layer are known)
FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": None}, "fast", True),
    "qwen2": ("Qwen2", {}, "fast", True),
    "qwen3": ("Qwen3", {"head_dim": 16}, "fast", True),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}, "fast", True),
    "olmo, clipped": ("Olmo", {"clip_qkv": 0.5}, "fast", True),
    "granite": ("Granite", {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 2.0}, "plain", False),
    "granite, scaled inside only": ("Granite", {"residual_multiplier": 0.3}, "fast", False),
    "cohere": ("Cohere", {"logit_scale": 0.25}, "plain", False),
    "gemma2": ("Gemma2", {"head_dim": 16}, "plain", False),
    "phi": ("Phi", {}, "plain", False),
    "gpt_neox": ("GPTNeoX", {}, "plain", False),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}, "plain", False),
    "bloom": ("Bloom", {"n_layer": 3, "n_head": 4}, "plain", False),
}

LENS_REFUSED = {"granite": "would be wrong", "cohere": "would be wrong", "gemma2": "would be wrong", "opt": "no final norm"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(tiny_llama(tmp_path_factory.mktemp("words"), WORDS))


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch, words):
    """The word-level tokenizer for all of them: some families' folders would be given a tokenizer class of their own."""
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: words)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, words, tmp_path_factory):
    name, options, engine, inside = FAMILIES[request.param]
    torch.manual_seed(1)
    common = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**common, **options}))
    folder = tmp_path_factory.mktemp("family")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder, engine, inside


def test_the_engine_of_auto_gives_the_model_s_own_numbers(family):
    folder, engine, _ = family
    model, plain = load_model(str(folder)), load_model(ModelSpec(str(folder), engine="plain"))
    assert model.engine.name == engine
    g = torch.Generator().manual_seed(0)
    rows = [Row(LONG), Row(mark("w5 w6 w7", end="w7"))]
    rows += [Row(LONG, (Edit(Site(layer, place), 2 * torch.randn(32, generator=g)),)) for layer in range(3) for place in ("here", "end")]
    assert (model.next_log_probs(rows) - plain.next_log_probs(rows)).abs().max() < 1e-4
    own = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for row in rows[:2]:
            ids = torch.tensor([model.encode([row.prompt])[0].ids])
            assert (own(ids).logits[0, -1].log_softmax(-1) - model.next_log_probs([row])[0]).abs().max() < 1e-4
            expected = own.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
            made = model.generate([row], 4)[0]
            assert made.text == model.tokenizer.decode([i for i in expected if i != 2], skip_special_tokens=True)
    half = [load_model(ModelSpec(str(folder), dtype="bfloat16", engine=name)) for name in (engine, "plain")]
    found = [one.next_log_probs(rows) for one in half]
    assert (found[0] - found[1]).abs().mean() < 0.05


def test_inside_streams_are_those_of_the_layer_or_refused(family):
    folder, _, inside = family
    for engine in ("auto", "plain"):
        model = load_model(ModelSpec(str(folder), engine=engine))
        sites = [Site(1, "here", stream) for stream in ("resid_mid", "mlp_out", "resid_post")]
        if inside:
            mid, mlp, post = model.record([Row(LONG)], sites)[0]
            assert torch.allclose(mid + mlp, post, atol=1e-4)
        else:
            with pytest.raises(EditError, match=r"not .*a pre-norm block"):
                model.record([Row(LONG)], sites)


def test_the_lens_at_the_last_layer_is_the_answer_or_refused(family):
    folder, _, _ = family
    model = load_model(str(folder))
    kind = model.engine.model.config.model_type
    refused = LENS_REFUSED.get(kind) if kind != "granite" or model.engine.name == "plain" else None
    last = model.n_layers - 1
    ask = lambda: model.lens_log_probs([Row(LONG)], [Site(last, "end")], [" w1", " w2"])[0, 0]  # noqa: E731
    if refused:
        with pytest.raises((ModelError, EditError), match=refused):
            ask()
    else:
        answer = model.next_log_probs([Row(LONG)])[0, [model.token_id(" w1"), model.token_id(" w2")]]
        assert torch.allclose(ask(), answer, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("GPT2", {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
                                               ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
                                               ("GPTJ", {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4})])
def test_positions_that_end_are_said_before_a_row_is_run(name, options, words, tmp_path):
    torch.manual_seed(1)
    common = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1,
              "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**{**common, **options})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert model.next_log_probs([Row(mark(" ".join(WORDS)))]).isfinite().all()    # 61 tokens
    assert len(model.generate([Row(mark(" ".join(WORDS)))], 4)) == 1    # the last one is not read
    with pytest.raises(ModelError, match=r"can read 64 tokens.*61 and 4 that follow.*fewer new tokens"):
        model.generate([Row(mark(" ".join(WORDS)))], 5)
    with pytest.raises(ModelError, match=r"can read 64 tokens.*the longest row has 121: give shorter prompts\."):
        model.next_log_probs([Row(mark(" ".join(WORDS + WORDS)))])


def test_the_table_of_architectures_is_made_by_trying_them(monkeypatch):
    monkeypatch.undo()
    with families.one_tokenizer() as tokenizer:
        found = {name: families.row_of(name, tokenizer) for name in ("qwen3", "gpt2", "bert", "git")}
    assert all(found["qwen3"][column] == "right" for column in families.COLUMNS)
    assert found["gpt2"]["plain chat"] == found["gpt2"]["bridge"] == "right"
    assert families.short(found["gpt2"]["fast raw"]).startswith("no: its layers")
    assert "is not a causal language model" in found["bert"]["plain raw"]
    assert "million parameters" in found["git"]["made"]
    committed = (Path(families.__file__).parents[1] / "docs" / "families.md").read_text("utf-8")
    assert families.PAGE.split("transformers")[0] in committed
    assert "CRASH" not in committed
    assert "WRONG" not in committed
    assert committed.count("| right") > 100
