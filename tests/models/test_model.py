"""The hooked model against an independent oracle: plain Hugging Face, one row at a time, edits by plain forward hooks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doubles import make_adapter
from oracle import Oracle

from alignblind_mi.models.blocks import log_probs_of
from alignblind_mi.models.edits import Edit, EditError, Row, Site, Treatment
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import Prompt, PromptError, implicit_prompts, interpretation_prompt, mark


def rows_with_edits(race: Concept, model: HookedModel, n: int = 12) -> list[Row]:
    """Prompts of different lengths; every operation, one and several sites, none."""
    g = torch.Generator().manual_seed(0)
    vector = lambda: 3 * torch.randn(model.d_model, generator=g)  # noqa: E731
    prompts = implicit_prompts(race, "default")[:: 1680 // n][:n]
    kinds = [
        lambda: (), lambda: (Edit(Site(1, "marked"), vector()),), lambda: (Edit(Site(0, "unmarked"), vector(), "add", -0.5),),
        lambda: (Edit(Site(2, "negative"), vector(), "ablate"),),
        lambda: (Edit(Site(0, "marked"), vector()), Edit(Site(0, "unmarked"), vector()), Edit(Site(2, "marked"), vector(), "add", 2.0)),
        lambda: (Edit(Site(1, "marked"), vector(), "add"), Edit(Site(1, "marked"), vector(), "ablate", 0.7)),
    ]
    rows = [Row(p.prefixed("Consider black and white. " if i % 4 == 3 else ""), kinds[i % len(kinds)]()) for i, p in enumerate(prompts)]
    return rows


@pytest.mark.parametrize("which", ["tiny", "llama3"])
def test_rows_equal_plain_hugging_face_one_at_a_time(which, race, request):
    model, folder = request.getfixturevalue(which), request.getfixturevalue(f"{which}_folder")
    oracle, rows = Oracle(folder), rows_with_edits(race, model)
    batched = model.next_log_probs(rows)
    for row, ours in zip(rows, batched, strict=True):
        assert (oracle.next_log_probs(row) - ours).abs().max() < 1e-5
    for row, ours in zip(rows, model.generate(rows, 12), strict=True):
        ids = oracle.greedy(row, 12, set(model.stop_ids))
        kept = ids[:-1] if ids[-1] in model.stop_ids else ids
        assert ours.text == oracle.tokenizer.decode(kept, skip_special_tokens=True)
        assert ours.finished == (ids[-1] in model.stop_ids)


def test_edits_matter_and_the_empty_edit_is_the_clean_run(race, tiny):
    row = rows_with_edits(race, tiny)[1]
    clean, edited = tiny.next_log_probs([Row(row.prompt)]), tiny.next_log_probs([row])
    assert (clean - edited).abs().max() > 1e-2
    ids = tiny.tokenizer(row.prompt.text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(tiny.bridge.forward(ids)[0, -1].log_softmax(-1), clean[0], atol=1e-5)


def test_patching_a_run_with_itself_changes_nothing(race, tiny):
    prompt = implicit_prompts(race, "default")[0]
    sites = [Site(layer, name, occurrence=0) for layer in range(tiny.n_layers) for name in ("marked", "unmarked")]
    resid = tiny.record([Row(prompt)], sites)[0]
    rows = [Row(prompt, tuple(Edit(s, v) for s, v in zip(sites, resid, strict=True)))]
    assert torch.allclose(tiny.next_log_probs(rows), tiny.next_log_probs([Row(prompt)]), atol=1e-5)


def test_recorded_activations_equal_hidden_states(race, tiny, tiny_folder):
    oracle, prompts = Oracle(tiny_folder), implicit_prompts(race, "default")[:40:9]
    sites = [Site(0, "marked", occurrence=0), Site(2, "unmarked", occurrence=1), Site(1, "negative")]
    ours = tiny.record([Row(p) for p in prompts], sites)
    for prompt, found in zip(prompts, ours, strict=True):
        columns = [oracle.columns(Row(prompt, (Edit(site, found[0]),))).popitem()[1][0] for site in sites]
        with torch.no_grad():
            states = oracle.model(oracle.ids(prompt), output_hidden_states=True).hidden_states
        expected = [states[site.layer + 1][0, column] for site, column in zip(sites, columns, strict=True)]
        assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def test_continuations_equal_teacher_forcing(race, llama3, llama3_folder):
    oracle, rows = Oracle(llama3_folder), rows_with_edits(race, llama3)[:5]
    choices = [(" wallet - white, revolver - black", " wallet - black, revolver"), (" a", " b c")] * 3
    ours = llama3.continuation_log_probs(rows, choices[:5])
    for row, texts, found in zip(rows, choices, ours, strict=False):
        for text, value in zip(texts, found, strict=True):
            assert float(value) == pytest.approx(oracle.log_prob_of(row, text), abs=1e-4)


def test_continuations_do_not_depend_on_the_logit_budget(race, tiny, monkeypatch):
    rows = rows_with_edits(race, tiny)
    choices = [(" wallet - white", " wallet - black, revolver")] * len(rows)
    whole = tiny.continuation_log_probs(rows, choices)
    monkeypatch.setattr("alignblind_mi.models.budget.LOGIT_BYTES", 4 * 5 * 7 * len(tiny.tokenizer))
    assert torch.allclose(tiny.continuation_log_probs(rows, choices), whole, atol=1e-5)


def test_the_double_is_what_llama_3_is(llama3, llama3_folder):
    config = llama3.bridge.original_model.config
    assert len(list(llama3_folder.glob("model-*.safetensors"))) > 1
    assert (config.vocab_size, config.tie_word_embeddings) == (128_256, False)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.rope_parameters["rope_theta"] == 500_000
    assert llama3.tokenizer.convert_ids_to_tokens([128_000, 128_001, 128_009]) == ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def test_answers_and_their_choices_come_from_one_reading(race, tiny):
    rows = rows_with_edits(race, tiny)
    choices = [(" wallet - white", " wallet - black, revolver")] * len(rows)
    both = tiny.generate(rows, 5, continuations=choices)
    assert [replace(one, choices=()) for one in both] == tiny.generate(rows, 5)
    alone = tiny.continuation_log_probs(rows, choices)
    assert torch.allclose(torch.tensor([one.choices for one in both]), alone, atol=1e-5)
    with pytest.raises(ModelError, match="same number of continuations"):
        tiny.generate(rows, 5, continuations=choices[1:])


def test_next_probs_are_the_softmax(race, tiny):
    rows = rows_with_edits(race, tiny)
    ids = [tiny.token_id(" race"), tiny.token_id(" color")]
    assert torch.allclose(tiny.next_probs(rows, [" race", " color"]), tiny.next_log_probs(rows)[:, ids].exp(), atol=1e-6)


def test_greedy_stays_greedy_with_a_sampling_checkpoint(race, llama3):
    config = llama3.bridge.original_model.generation_config
    assert config.do_sample, "the double must sample by default, like Llama 3 Instruct"
    assert llama3.stop_ids == {128_001, 128_009}
    rows = rows_with_edits(race, llama3)[:3]
    assert llama3.generate(rows, 8) == llama3.generate(rows, 8, seed=9)


def test_sampling_does_not_depend_on_the_batch(race, tiny):
    rows = rows_with_edits(race, tiny)
    together = tiny.generate(rows, 6, temperature=1.0, seed=3)
    assert together == [tiny.generate([row], 6, temperature=1.0, seed=3)[0] for row in rows]
    assert together != tiny.generate(rows, 6, temperature=1.0, seed=4)


def test_sampling_follows_the_distribution(tiny):
    prompt = Prompt("Pick either black or white")
    p = tiny.next_log_probs([Row(prompt)])[0].exp()
    firsts = [tiny.generate([Row(prompt)], 1, temperature=1.0, seed=s)[0].text for s in range(400)]
    top = int(p.argmax())
    share = sum(text == tiny.tokenizer.decode([top]) for text in firsts) / len(firsts)
    assert share == pytest.approx(float(p[top]), abs=4 * float(p[top] * (1 - p[top]) / 400) ** 0.5 + 1e-3)


def test_adapters_switch_by_treatment(race, tiny_folder, tmp_path):
    folders = [make_adapter(tiny_folder, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    model, rows = load_model(str(tiny_folder), adapters=folders), rows_with_edits(race, load_model(str(tiny_folder)))
    assert model.adapters == ("one", "two")
    for treatment, oracle in ((Treatment("one", adapter="one"), Oracle(tiny_folder, folders[0])), (Treatment("none"), Oracle(tiny_folder)),
                              (Treatment("two", adapter="two"), Oracle(tiny_folder, folders[1]))):
        ours = model.under(treatment).next_log_probs(rows)
        for row, found in zip(rows, ours, strict=True):
            assert (oracle.next_log_probs(row) - found).abs().max() < 1e-5, treatment.name


def test_one_set_of_weights(race, tiny):
    view = tiny.under(Treatment("steered", edits=(Edit(Site(0, "marked"), torch.ones(tiny.d_model)),)))
    assert view.bridge is tiny.bridge


def test_identifiers_of_several_tokens_take_the_last(llama3):
    prompt = mark("Pick either Zebediah or Quentin.", marked="Zebediah", unmarked="Quentin")
    (item,) = llama3.encode([prompt])
    every, last = item.positions("marked", "all"), item.positions("marked")
    assert len(every) > 1
    assert last == every[-1:]


def test_bos_once(llama3):
    raw = Prompt("black and white")
    chat = Prompt(llama3.tokenizer.apply_chat_template([{"role": "user", "content": "black and white"}], tokenize=False))
    for item in llama3.encode([raw, chat, raw]):
        assert item.ids.count(128_000) == 1
        assert item.ids[0] == 128_000


def test_marks_survive_tokenisation(race, llama3, tiny):
    for model in (llama3, tiny):
        for item in model.encode([*implicit_prompts(race, "default")[::60], interpretation_prompt(race.interpretation("paper"))]):
            for name, spans in item.prompt.marks.items():
                for span in spans:
                    text = model.tokenizer.decode([item.ids[i] for i in item.tokens_of(span)])
                    assert item.prompt.text[span.start : span.end] in text, name


def test_attention_patterns_are_cached_and_masked(race, tiny):
    prompts = [implicit_prompts(race, "default")[0], "Race: black and white"]
    name = "blocks.1.attn.hook_pattern"
    cached = tiny.cache(prompts, [name])
    alone = tiny.cache(prompts[1], [name])
    pattern, n = cached[name], alone[name].shape[-1]
    assert torch.allclose(pattern.sum(-1)[cached.mask.bool()[:, None, :].expand(pattern.shape[:3])], torch.ones(()), atol=1e-5)
    assert torch.allclose(pattern[1, :, -n:, -n:], alone[name][0], atol=1e-5)


@pytest.mark.parametrize(("make", "error", "said"), [
    (lambda m: m.under(Treatment("t", edits=(Edit(Site(99, "marked"), torch.ones(32)),))), EditError, "layer 99 does not exist"),
    (lambda m: m.under(Treatment("t", adapter="nobody")), ModelError, "'nobody' is not loaded"),
    (lambda m: m.generate([Row(Prompt("black"), (Edit(Site(0, "marked"), torch.ones(32)),))], 2), PromptError, "has no mark 'marked'"),
    (lambda m: m.token_id("unheard"), ModelError, "does not know 'unheard'"),
    (lambda m: m.check_known([Prompt("Pick either Zebra or white.")]), ModelError, "does not know 'Zebra'"),
    (lambda m: m.cache("black", ["blocks.0.nothing"]), ModelError, "unknown hook point"),
    (lambda m: m.next_probs([Row(Prompt("black"), (Edit(Site(0, "x"), torch.ones(3)),))], [" race"]), EditError, "shape"),
    (lambda m: m.record([Row(mark("black or black", marked="black"))], [Site(0, "marked")]), EditError, "choose one"),
])
def test_bad_input_is_named(make, error, said, tiny):
    with pytest.raises(error, match=said):
        make(tiny)


@pytest.mark.parametrize(("spec", "said"), [
    ("no/such-model", "cannot be found or reached"), ("organism:nobody", "no embedded model .nobody.: give organism:base"),
    ("/no/such/folder", "cannot be found or reached")])
def test_unknown_models_are_one_sentence(spec, said):
    with pytest.raises(Exception, match=said) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_a_broken_checkpoint_is_one_sentence(tiny_folder, tmp_path):
    import shutil
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(folder))
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_model(str(tiny_folder), adapters=[tmp_path])


def test_dtype_is_checked_and_recorded(tiny_folder):
    with pytest.raises(ModelError, match="unknown dtype"):
        ModelSpec("x", dtype="float8")
    model = load_model(replace(ModelSpec(str(tiny_folder)), dtype="bfloat16"))
    assert model.provenance()["dtype"] == "bfloat16"
    assert model.next_log_probs([Row(Prompt("black"))]).dtype == torch.float32


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_loading_says_nothing(engine, tiny_folder):
    code = ("import sys, alignblind_mi as ab\n"
            f"for name in (sys.argv[1], 'organism:aligned'): ab.load_model(ab.ModelSpec(name, engine='{engine}')).generate('black', 1)")
    done = subprocess.run([sys.executable, "-c", code, str(tiny_folder)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of", ["every row", "each row"])
def test_log_probabilities_in_parts_of_the_vocabulary_are_those_of_the_whole(bias, of):
    torch.manual_seed(0)
    norm, head, hidden = torch.nn.LayerNorm(8), torch.nn.Linear(8, 50, bias=bias).requires_grad_(False), 5 * torch.randn(7, 8)
    model = SimpleNamespace(base_model=SimpleNamespace(norm=norm.requires_grad_(False)), get_output_embeddings=lambda: head)
    ids = torch.tensor([3, 11, 0]) if of == "every row" else torch.arange(21).view(7, 3) * 5 % 50
    whole = head(norm(hidden)).log_softmax(-1)
    expected = whole[:, ids] if of == "every row" else whole.gather(1, ids)
    for block in ((2, 7), (100, 10_000)):
        torch.testing.assert_close(log_probs_of(model, hidden, ids, block), expected, atol=1e-5, rtol=1e-5)
    head._hf_hook = object()    # as of a head that is not wholly in memory
    torch.testing.assert_close(log_probs_of(model, hidden, ids, (2, 7)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_continuations_of_any_lengths_are_scored_alike_however_many_at_a_time(race, tiny_folder, engine, monkeypatch):
    model = load_model(ModelSpec(str(tiny_folder), engine=engine))
    rows = model.rows(implicit_prompts(race, "default", max_word_pairs=1)[:9])
    choices = [(" wallet - white, revolver - black", " wallet", " revolver - black")] * 9
    whole = model.continuation_log_probs(rows, choices)
    for at_a_time in (1, 7, 50):
        monkeypatch.setattr(model.engine, "scored", at_a_time)
        torch.testing.assert_close(model.continuation_log_probs(rows, choices), whole, atol=1e-5, rtol=1e-5)
    alone = [[float(model.continuation_log_probs([row], [[choice]])[0, 0]) for choice in choices[0]] for row in rows]
    torch.testing.assert_close(whole, torch.tensor(alone), atol=1e-5, rtol=1e-5)
