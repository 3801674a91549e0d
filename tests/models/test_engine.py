"""Exactness, as a matrix: every row equals plain Hugging Face run one row at a time in fp32 (see oracle.py), on both engines."""

import functools
from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
from doubles import make_adapter, tiny_llama
from hypothesis import HealthCheck, given, settings, strategies as st
from oracle import Oracle

from alignblind_mi.models import engine, stems
from alignblind_mi.models.budget import Budget, OutOfMemoryError, RowCost, cheapest_cuts
from alignblind_mi.models.edits import EVERYWHERE, GENERATED, LAST, PROMPT, Edit, EditError, Row, Site, Treatment
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.models.stems import common_stems
from alignblind_mi.models.tokens import Place, Taps, TokenEdit, TokenRow
from alignblind_mi.stimuli.prompts import Prompt, PromptError, Span

WORDS = [f"w{i}" for i in range(60)]
D, LAYERS, CLOSE = 32, 4, 1e-5
HEADS, NEURONS = 4, 48
TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10 w11 w12 w13 w14 w15", "w20 w21 w22 w23 w24 w25", "w30 w31 w32"]
PLACES = {"end": -1, "middle": None, "first": 0}
STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def prompt_of(text: str, chat: bool) -> Prompt:
    """A prompt with a mark on its last, a middle and its first token (the BOS itself where a chat template has written it)."""
    text = f"<bos>{text}" if chat else text
    words = text.split(" ")
    starts = [sum(len(w) + 1 for w in words[:i]) for i in range(len(words))]
    spans = [Span(start, start + len(word)) for start, word in zip(starts, words, strict=True)]
    first = Span(0, 5) if chat else spans[0]
    return Prompt(text, {"end": (spans[-1],), "middle": (spans[len(spans) // 2],), "first": (first,), "two": (first, spans[-1])})


def cells(chat: bool, seed: int = 0) -> list[Row]:
    """Every operation x place, several sites in one row, and no edit, on prompts that are shared by many rows, by two, and by none."""
    g = torch.Generator().manual_seed(seed)
    vector = lambda: 2 * torch.randn(D, generator=g)  # noqa: E731
    prompts = [prompt_of(text, chat) for text in TEXTS]
    rows = [Row(prompts[0])]
    rows += [Row(prompts[0], (Edit(Site(1, place), vector(), how, 1.0 if how == "replace" else 0.7),))
             for how, place in product(("replace", "add", "ablate"), PLACES)]
    rows += [Row(prompts[1], tuple(Edit(Site(layer, name), vector()) for layer, name in product((0, 1, 2), ("first", "middle")))),
             Row(prompts[1], (Edit(Site(3, "end"), vector()), Edit(Site(0, "middle", "resid_pre"), vector(), "add", -1.5))),
             Row(prompts[1], (Edit(Site(2, "two"), vector(), "add"), Edit(Site(2, "two"), vector(), "ablate"),
                              Edit(Site(2, "end"), vector()))),
             Row(prompts[2], (Edit(Site(3, "middle"), vector()),)), Row(prompts[3]), Row(prompts[3], (Edit(Site(3, "first"), vector()),))]
    rows += [Row(prompts[i % 2], (Edit(Site(i % LAYERS, "middle", stream), vector(), how),))
             for i, (stream, how) in enumerate(product(STREAMS, ("replace", "add", "ablate")))]
    rows += [Row(prompts[i % 2], (Edit(at, 2 * torch.randn(size, generator=g), how, 1.0 if how == "replace" else 0.7),))
             for i, ((at, size), how) in enumerate(product(unit_sites("middle"), ("replace", "add", "ablate")))]
    whole, heads = Site(2, "end", "z"), Site(2, "end", "z", units=(0, 3))
    rows += [Row(prompts[1], (Edit(heads, 2 * torch.randn(16, generator=g)), Edit(whole, vector(), "add"),
                              Edit(Site(2, "end", "attn_out"), vector(), "ablate"), Edit(heads, vector()[:16], "ablate"))),
             Row(prompts[0], (Edit(Site(LAYERS - 1, "two", "post", units=(7, 1)), torch.tensor([9.0, -9.0])),
                              Edit(Site(0, "middle"), vector()), Edit(Site(1, "end", "resid_mid"), vector(), "add")))]
    rows += [Row(prompts[i % 3], (Edit(Site(i % LAYERS, mark, stream, tokens="all"), vector(), how, 1.0 if how == "replace" else 0.7),))
             for i, (mark, (stream, how)) in enumerate(product(EVERYWHERE, zip(STREAMS, ("replace", "add", "ablate", "add", "add"),
                                                                               strict=True)))]
    drawn = [(at, 2 * torch.randn(size, generator=g)) for at, size in unit_sites(GENERATED)]
    rows += [Row(prompts[1], (Edit(at, vectors, "add"), Edit(Site(1, "middle"), vector()))) for at, vectors in drawn]
    rows += [Row(prompts[0], (Edit(Site(0, LAST), vector(), "add"), Edit(Site(0, GENERATED), vector(), "add"),
                              Edit(Site(2, GENERATED), vector(), "ablate")))]
    return rows


def unit_sites(mark: str) -> list[tuple[Site, int]]:
    """Heads and neurons, some and all of them, in several layers, and the sizes of their vectors."""
    return [(Site(1, mark, "z", units=(2,)), D // HEADS), (Site(LAYERS - 1, mark, "z", units=(3, 0)), 2 * D // HEADS),
            (Site(0, mark, "z"), D), (Site(2, mark, "post", units=(5, 47, 11)), 3), (Site(LAYERS - 1, mark, "post"), NEURONS)]


class Checkpoint:
    """A checkpoint and two adapters; what several tests ask of it is loaded and computed once."""

    def __init__(self, folder: Path, adapters: list[Path]):
        self.folder, self.adapters = folder, adapters
        self.oracle, self.model, self.expected = map(functools.cache, (self._oracle, self._model, self._expected))

    def _oracle(self, adapter: str | None) -> Oracle:
        return Oracle(self.folder, dict(zip(("one", "two"), self.adapters, strict=True)).get(adapter))

    def _model(self, engine: str, n_adapters: int) -> HookedModel:
        return load_model(ModelSpec(str(self.folder), engine=engine), adapters=self.adapters[:n_adapters])

    def _expected(self, adapter: str | None, chat: bool) -> list[tuple[torch.Tensor, list[int]]]:
        """Of every cell: log-probabilities of the next token, and five greedy tokens."""
        return [self.oracle(adapter).answer(row, 5, {2}, cached=i % 2 == 0) for i, row in enumerate(cells(chat))]


@pytest.fixture(scope="module", params=list(product((True, False), (1, 2, 4))), ids=lambda p: f"{'tied' if p[0] else 'untied'}-kv{p[1]}")
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    """Tied / untied embeddings x one, two or four (as many as heads) key-value heads, and two adapters for each."""
    tied, kv_heads = request.param
    folder = tiny_llama(tmp_path_factory.mktemp("cell"), WORDS, layers=LAYERS, kv_heads=kv_heads, tied=tied, seed=kv_heads)
    return Checkpoint(folder, [make_adapter(folder, tmp_path_factory.mktemp("adapters") / name, seed)
                               for seed, name in enumerate(("one", "two"))])


@pytest.mark.parametrize("adapters", ["none loaded", "off", "one", "two"])
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
@pytest.mark.usefixtures("stems_at_any_price")
def test_every_cell_equals_the_oracle(checkpoint, adapters, chat):
    loaded = {"none loaded": 0, "off": 2, "one": 1, "two": 2}[adapters]
    name = adapters if adapters in ("one", "two") else None
    rows = cells(chat)
    expected, tokens = zip(*checkpoint.expected(name, chat), strict=True)
    for name_of in ("fast", "plain"):
        model = checkpoint.model(name_of, loaded).under(Treatment("t", adapter=name))
        assert model.engine.name == name_of
        for part in (rows, *[[row] for row in rows[::4]], rows[2:4], rows[:1] * 3):
            wanted = torch.stack([expected[rows.index(row)] for row in part])
            assert (model.next_log_probs(part) - wanted).abs().max() < CLOSE, name_of
        for row, made, ids in zip(rows, model.generate(rows, 5), tokens, strict=True):
            kept = [i for i in ids if i != 2]
            assert made.text == model.tokenizer.decode(kept, skip_special_tokens=True), (name_of, row.edits)
            assert made.finished == (2 in ids)


def test_continuations_are_scored_under_edits_of_what_follows(checkpoint):
    oracle, rows = checkpoint.oracle(None), [row for row in cells(False) if any(edit.site.mark in EVERYWHERE for edit in row.edits)]
    choices = [[" w4 w5 w6", " w7"] for _ in rows]
    wanted = torch.tensor([[oracle.log_prob_of(row, text) for text in texts] for row, texts in zip(rows, choices, strict=True)])
    for name in ("fast", "plain"):
        found = checkpoint.model(name, 0).continuation_log_probs(rows, choices)
        assert (found - wanted).abs().max() < CLOSE, name


def test_texts_are_treated_as_if_the_model_had_written_them(pair):
    g = torch.Generator().manual_seed(1)
    vector, text = torch.randn(D, generator=g), prompt_of(TEXTS[1], False)
    edits = (Edit(Site(1, LAST), vector, "add"), Edit(Site(1, GENERATED), vector, "add"), Edit(Site(0, "absent"), vector))
    (row,) = Treatment("t", edits).text_rows([text])
    assert [(edit.site.mark, edit.site.tokens) for edit in row.edits] == [(PROMPT, "all")]
    everywhere = Row(text, (Edit(Site(1, PROMPT, tokens="all"), vector, "add"),))
    assert torch.equal(pair[0].next_log_probs([row]), pair[0].next_log_probs([everywhere]))
    with pytest.raises(PromptError, match="no mark 'absent'"):
        pair[0].next_log_probs(Treatment("t", edits).rows([text]))


def test_every_stream_of_the_bridge_equals_the_engines(checkpoint):
    """The twin: same weights, and the same numbers whatever is edited, read at other hook points than the edited ones."""
    model = checkpoint.model("fast", 2)
    own = {p.data_ptr() for p in model.engine.model.parameters()}
    assert {p.data_ptr() for p in model.bridge.original_model.parameters()} == own
    rows, sites = cells(False), [Site(2, "end"), Site(LAYERS - 1, "end")]
    one_by_one = [(adapter, row) for adapter in (None, "two") for row in rows]
    vectors = [read for adapter in (None, "two") for read in model.under(Treatment("t", adapter=adapter)).record(rows, sites)]
    for (adapter, row), read in zip(one_by_one, vectors, strict=True):
        view = model.under(Treatment("t", edits=row.edits, adapter=adapter))
        cached = view.cache(row.prompt, [f"blocks.{LAYERS - 1}.hook_resid_post", "blocks.2.hook_resid_post"])
        assert torch.allclose(cached["blocks.2.hook_resid_post"][0, -1], read[0], atol=1e-4)
        assert torch.allclose(cached[f"blocks.{LAYERS - 1}.hook_resid_post"][0, -1], read[1], atol=1e-4)


def test_recording_equals_the_bridge_s_cache_in_every_stream(checkpoint):
    model = checkpoint.model("fast", 0)
    prompts = [prompt_of(text, False) for text in TEXTS]
    for stream, place in product(STREAMS, PLACES):
        found = model.record([Row(p) for p in prompts], [Site(layer, place, stream) for layer in range(LAYERS)])
        for prompt, vectors in zip(prompts, found, strict=True):
            (item,) = model.encode([prompt])
            at = item.positions(place)[0]
            cached = model.cache(prompt, [f"blocks.{layer}.hook_{stream}" for layer in range(LAYERS)])
            expected = torch.stack([cached[f"blocks.{layer}.hook_{stream}"][0, at] for layer in range(LAYERS)])
            assert torch.allclose(vectors, expected, atol=1e-5), (stream, place)


def test_heads_and_neurons_are_transformer_lens_s(checkpoint):
    model = checkpoint.model("fast", 0)
    prompts = [prompt_of(text, False) for text in TEXTS]
    for site, size in unit_sites("middle"):
        found = model.record([Row(p) for p in prompts], [site])
        assert found.shape == (len(prompts), 1, size)
        for prompt, (vector,) in zip(prompts, found, strict=True):
            at = model.encode([prompt])[0].positions("middle")[0]
            units = model.cache(prompt, [site.hook])[site.hook][0, at]
            units = units[list(site.units)] if site.units else units
            assert torch.allclose(vector, units.flatten(), atol=1e-5), site


def test_units_with_their_own_activations_are_the_clean_run(pair):
    prompt = prompt_of(TEXTS[1], False)
    for model, (site, _) in product(pair[:2], unit_sites("middle")):
        own = model.record([Row(prompt)], [site])[0, 0]
        assert (model.next_log_probs([Row(prompt, (Edit(site, own),))]) - model.next_log_probs([Row(prompt)])).abs().max() < CLOSE


def test_no_heads_is_no_attention_and_no_neurons_no_mlp(pair):
    """What is nothing before the mixing projection (which has no bias here) is nothing after it, named one by one or all together."""
    prompt = prompt_of(TEXTS[1], False)
    for model, (mark, layer) in product(pair[:2], (("middle", 1), ("end", 1), ("end", LAYERS - 1))):
        for inner, added, n, size in (("z", "attn_out", HEADS, D), ("post", "mlp_out", NEURONS, NEURONS)):
            wanted = model.next_log_probs([Row(prompt, (Edit(Site(layer, mark, added), torch.zeros(D)),))])
            for units in ((), tuple(reversed(range(n)))):
                found = model.next_log_probs([Row(prompt, (Edit(Site(layer, mark, inner, units=units), torch.zeros(size)),))])
                assert (found - wanted).abs().max() < CLOSE, (inner, units)
            half = model.next_log_probs([Row(prompt, (Edit(Site(layer, mark, inner, units=(0,)), torch.zeros(size // n)),))])
            assert (half - wanted).abs().max() > 1e-4


def test_readings_of_units_see_the_edits_of_their_row(pair):
    prompt, site = prompt_of(TEXTS[0], False), Site(1, "middle", "z", units=(2, 1))
    row = Row(prompt, (Edit(Site(1, "middle", "z"), torch.arange(float(D))),))
    for model in pair[:2]:
        assert torch.equal(model.record([row], [site])[0, 0], torch.cat([torch.arange(16.0, 24), torch.arange(8.0, 16)]))


@pytest.mark.parametrize(("ask", "said"), [
    (lambda: Site(0, "end", units=(1,)), "resid_post has no units"),
    (lambda: Site(0, "end", "z", units=(1, 1)), "named once each"),
    (lambda: Site(0, "end", "post", units=(-1,)), "counted from 0"),
])
def test_units_that_make_no_sense_are_named(ask, said):
    with pytest.raises(EditError, match=said):
        ask()


@pytest.mark.parametrize(("sites", "said"), [
    ([Site(0, "end", "z", units=(0, HEADS))], f"head {HEADS} of layer 0 does not exist: .* has the heads 0 to {HEADS - 1}"),
    ([Site(0, "end", "post", units=(NEURONS,))], f"neuron {NEURONS} of layer 0 does not exist"),
    ([Site(0, "end", "z"), Site(1, "end", "z", units=(1,))], "different sizes .*z of layer 1 has 8, z of layer 0 has 32"),
])
def test_units_that_a_model_does_not_have_are_named(pair, sites, said):
    with pytest.raises(EditError, match=said):
        pair[0].record([Row(prompt_of(TEXTS[0], False))], sites)
    with pytest.raises(EditError, match=r"at z \(units 1, 2\) needs a vector of shape \(16,\), got \(32,\)"):
        pair[0].next_log_probs([Row(prompt_of(TEXTS[0], False), (Edit(Site(0, "end", "z", units=(1, 2)), torch.ones(D)),))])
    with pytest.raises(EditError, match="reads residual streams, not z"):
        pair[0].lens_log_probs([Row(prompt_of(TEXTS[0], False))], [Site(0, "end", "z")], [" w1"])


def test_rows_without_inner_streams_put_no_hooks_into_a_layer(pair, monkeypatch):
    fast, made = pair[0], []
    for layer in fast.engine.model.model.layers:
        for module in layer.modules():
            monkeypatch.setattr(module, "register_forward_pre_hook", lambda *args, **kwargs: made.append(args))
            monkeypatch.setattr(module, "register_forward_hook", lambda *args, **kwargs: made.append(args))
    fast.next_log_probs([row for row in cells(False) if all(e.site.stream.startswith("resid_p") for e in row.edits)])
    assert not made


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("one"), WORDS, layers=LAYERS, tied=False, seed=9)


@pytest.fixture(scope="module")
def pair(one):
    """Both engines on one checkpoint, and its oracle."""
    return load_model(ModelSpec(str(one), engine="fast")), load_model(ModelSpec(str(one), engine="plain")), Oracle(one)


def edits_of(draw, prompt: Prompt, g: torch.Generator) -> tuple[Edit, ...]:
    how = st.sampled_from(("replace", "add", "ablate"))
    made = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(how)
        layer, name = draw(st.integers(0, LAYERS - 1)), draw(st.sampled_from(sorted(prompt.marks)))
        streams = st.sampled_from([(Site(layer, name, stream), D) for stream in STREAMS])
        site, size = draw(st.one_of(streams, st.sampled_from(unit_sites(name))))
        made.append(Edit(site, 2 * torch.randn(size, generator=g), kind, 1.0 if kind == "replace" else draw(st.floats(-2, 2))))
    return tuple(made)


@st.composite
def row_lists(draw) -> list[Row]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)
    begin, ends = draw(words), draw(st.lists(words, min_size=1, max_size=4))
    prompts = [prompt_of(" ".join([*begin[: draw(st.integers(0, 8))], *end]), draw(st.booleans())) for end in ends]
    shared = edits_of(draw, prompts[0], g)
    if draw(st.booleans()):
        return [Row(p, shared if {e.site.mark for e in shared} <= set(p.marks) else ()) for p in prompts]
    return [Row(p := draw(st.sampled_from(prompts)), edits_of(draw, p, g)) for _ in range(draw(st.integers(1, 8)))]


@pytest.fixture
def stems_at_any_price(monkeypatch):
    """Beginnings are shared however little that saves (the real price is restored afterwards)."""
    monkeypatch.setattr(stems, "STEM_COST", -1)


@pytest.mark.usefixtures("stems_at_any_price")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=row_lists(), tokens=st.sampled_from([3, 16, 4096]), stem_cost=st.sampled_from([-1, 3]))
def test_any_rows_in_any_batches_equal_the_oracle(pair, rows, tokens, stem_cost):
    fast, plain, oracle = pair
    fast.engine.budget.tokens, stems.STEM_COST = tokens, stem_cost
    expected = torch.stack([oracle.next_log_probs(row) for row in rows])
    assert (fast.next_log_probs(rows) - expected).abs().max() < CLOSE
    assert (plain.next_log_probs(rows) - expected).abs().max() < CLOSE
    assert fast.generate(rows, 4) == plain.generate(rows, 4)
    choices = [(" w1 w2", " w3")] * len(rows)
    found = fast.continuation_log_probs(rows, choices)
    for row, texts, values in zip(rows, choices, found.tolist(), strict=True):
        assert values == pytest.approx([oracle.log_prob_of(row, text) for text in texts], abs=1e-4)


# ---- named pitfalls (engine.md) ------------------------------------------------------------------------------------------


def test_pitfall_padding_without_a_mask_is_impossible(pair):
    """Rows of different lengths run together as they run alone: padding is never attended to, by either engine."""
    for model in pair[:2]:
        rows = [Row(prompt_of(text, False)) for text in TEXTS]
        alone = torch.cat([model.next_log_probs([row]) for row in rows])
        assert (model.next_log_probs(rows) - alone).abs().max() < CLOSE


def test_pitfall_left_padding_shifts_edit_columns(pair):
    row = Row(prompt_of(TEXTS[3], False), (Edit(Site(0, "first"), torch.ones(D)),))
    for model in pair[:2]:
        together = model.next_log_probs([Row(prompt_of(TEXTS[1], False)), row])[1]
        assert (together - pair[2].next_log_probs(row)).abs().max() < CLOSE


def test_pitfall_edits_fire_on_the_prompt_only(pair):
    """With a cache every later step has one column: an edit of position 0 must not hit it, nor an edit of the prompt's last token."""
    fast, _, oracle = pair
    for place in ("first", "end"):
        row = Row(prompt_of(TEXTS[0], False), (Edit(Site(1, place), 3 * torch.ones(D)),))
        ids = oracle.greedy(row, 8, {2}, cached=False)
        assert fast.generate([row], 8)[0].text == fast.tokenizer.decode([i for i in ids if i != 2], skip_special_tokens=True)


def test_pitfall_a_masked_suffix_without_a_mask_is_causal_from_the_wrong_key(pair):
    """Rows that begin behind a prefix need a mask even without padding: sdpa aligns its own causal mask with the first key."""
    prompt = prompt_of(TEXTS[1], False)
    rows = [Row(prompt, (Edit(Site(0, "middle"), k * torch.ones(D)),)) for k in (1.0, 2.0)]
    expected = torch.stack([pair[2].next_log_probs(row) for row in rows])
    assert (pair[0].next_log_probs(rows) - expected).abs().max() < CLOSE


def test_pitfall_cached_activations_survive_later_edits(pair):
    fast = pair[0]
    prompt = prompt_of(TEXTS[0], False)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    clean = fast.cache(prompt, names)
    kept = {name: clean[name].clone() for name in names}
    fast.under(Treatment("t", edits=(Edit(Site(1, "middle"), torch.ones(D)),))).cache(prompt, names)
    fast.next_log_probs([Row(prompt, (Edit(Site(1, "middle"), torch.ones(D)),))] * 2)
    assert all(torch.equal(clean[name], kept[name]) for name in names)


def test_pitfall_the_last_layer_s_residual_is_before_the_final_norm(pair):
    fast, _, oracle = pair
    prompt = prompt_of(TEXTS[0], False)
    resid = fast.record([Row(prompt)], [Site(LAYERS - 1, "end")])[0, 0]
    with torch.no_grad():
        after = oracle.model(oracle.ids(prompt), output_hidden_states=True).hidden_states[-1][0, -1]
        assert torch.allclose(oracle.model.model.norm(resid), after, atol=1e-5)
    assert not torch.allclose(resid, after, atol=1e-2)


def test_pitfall_the_bridge_s_resid_mid_misses_the_skip_connection(pair):
    """An edit at the bridge's own hook_resid_mid changes the MLP's input alone; ours changes the stream, in all three paths."""
    fast, plain, oracle = pair
    row = Row(prompt_of(TEXTS[0], False), (Edit(Site(1, "middle", "resid_mid"), 3 * torch.ones(D)),))
    expected = oracle.next_log_probs(row)
    for model in (fast, plain):
        assert (model.next_log_probs([row])[0] - expected).abs().max() < CLOSE
    (item,) = fast.encode([row.prompt])
    at = item.positions("middle")[0]

    def hook(value, hook):
        value = value.clone()
        value[:, at] = 3.0
        return value

    with torch.no_grad():
        naive = fast.bridge.run_with_hooks(torch.tensor([item.ids]), fwd_hooks=[("blocks.1.hook_resid_mid", hook)])
    assert (naive[0, -1].log_softmax(-1) - expected).abs().max() > 1e-2, "transformer-lens has changed: the detour may go"


def test_pitfall_no_full_prompt_logits(pair, monkeypatch):
    """The head sees one column a row, whatever the length of the prompts."""
    fast, seen = pair[0], []
    head = fast.engine.model.lm_head
    run = head.forward
    monkeypatch.setattr(head, "forward", lambda x: (seen.append(x.shape), run(x))[1])
    fast.next_log_probs([Row(prompt_of(text, False)) for text in TEXTS])
    fast.generate([Row(prompt_of(TEXTS[0], False))], 3)
    assert all(shape.numel() // D <= len(TEXTS) for shape in seen)


def test_shared_trunks_do_less_work(pair):
    """What the engine is for, counted and not timed: token-layers of a sweep, against running every row whole."""
    fast, prompt, counted = pair[0], prompt_of(TEXTS[1], False), []
    handles = [layer.register_forward_pre_hook(lambda m, args: counted.append(args[0].shape[0] * args[0].shape[1]))
               for layer in fast.engine.model.model.layers]
    rows = [Row(prompt, (Edit(Site(layer, "middle"), torch.ones(D)),)) for layer in range(LAYERS)] + [Row(prompt)]
    fast.next_log_probs(rows)
    for handle in handles:
        handle.remove()
    whole = len(rows) * 10 * LAYERS
    assert 10 * LAYERS <= sum(counted) < 0.5 * whole


@pytest.mark.usefixtures("stems_at_any_price")
def test_questions_that_begin_alike_share_their_beginning_with_its_edits(pair, race):
    """Steered rows of different words: one stem, edits in it included; then what is left of each row. Readings stay what they are."""
    fast, _, oracle = pair
    vectors = 2 * torch.randn(3, D, generator=torch.Generator().manual_seed(5))
    texts = [f"w1 w2 w3 w4 w5 w6 w7 w8 w{20 + i} w{30 + 2 * i}{' w9' * (i % 2)}" for i in range(6)]
    steered = [Row(prompt_of(t, False), (Edit(Site(1, "first"), vectors[0]), Edit(Site(0, "end"), vectors[1 + i % 2], "add")))
               for i, t in enumerate(texts)]
    counted = []
    handles = [layer.register_forward_pre_hook(lambda m, args: counted.append(args[0].shape[0] * args[0].shape[1]))
               for layer in fast.engine.model.model.layers]
    found = fast.next_log_probs(steered)
    for handle in handles:
        handle.remove()
    assert (found - torch.stack([oracle.next_log_probs(row) for row in steered])).abs().max() < CLOSE
    assert sum(counted) < 0.5 * LAYERS * sum(len(fast.encode([row.prompt])[0].ids) for row in steered)
    at = [Site(2, "first"), Site(2, "end")]
    together = fast.record(steered, at)
    alone = torch.cat([fast.record([row], at) for row in steered])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.usefixtures("stems_at_any_price")
def test_beginnings_with_different_edits_are_not_shared(pair):
    """The same tokens, the same places, other vectors, strengths or operations: nothing of it is one beginning."""
    fast, _, oracle = pair
    vectors = 2 * torch.randn(4, D, generator=torch.Generator().manual_seed(6))
    kinds = [(vectors[0], "replace", 1.0), (vectors[1], "replace", 1.0), (vectors[2], "add", 1.0), (vectors[2], "add", -1.0),
             (vectors[2], "ablate", 1.0), (vectors[3], "add", 1.0)]
    rows = [Row(prompt_of(f"w1 w2 w3 w4 w5 w6 w{20 + i}", False), (Edit(Site(1, "first"), *kind),)) for i, kind in enumerate(kinds)]
    assert (fast.next_log_probs(rows) - torch.stack([oracle.next_log_probs(row) for row in rows])).abs().max() < CLOSE


@pytest.mark.parametrize("shared", [True, False], ids=["one prompt", "a prompt each"])
def test_edits_of_the_last_layer_where_only_the_last_column_is_computed(pair, shared):
    fast, _, oracle = pair
    g = torch.Generator().manual_seed(7)
    edits = [(), *((Edit(Site(layer, place), 2 * torch.randn(D, generator=g)),) for layer in (1, LAYERS - 1) for place in PLACES)]
    rows = [Row(prompt_of(TEXTS[1] if shared else f"w{i} {TEXTS[1]}", False), edit) for i, edit in enumerate(edits)]
    seen = []
    handle = fast.engine.model.model.layers[-1].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    found = fast.next_log_probs(rows)
    handle.remove()
    assert seen
    assert set(seen) <= ({1, 10} if shared else {1}), "a trunk may be whole; rows are not"
    assert (found - torch.stack([oracle.next_log_probs(row) for row in rows])).abs().max() < CLOSE


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "plain"])
def test_rows_that_end_leave_the_batch_and_the_others_go_on_as_alone(pair, which):
    """A third of the vocabulary ends an answer: rows end at different steps, and the batch is compacted more than once."""
    model = replace(pair[which], stop_ids=frozenset(range(0, 120, 3)))
    rows = [Row(prompt_of(f"w{i} w{i + 3} w{2 * i}", False)) for i in range(24)]
    together = model.generate(rows, 12)
    assert len({answer.n_tokens for answer in together}) > 3
    assert together == [model.generate([row], 12)[0] for row in rows]
    for row, answer in zip(rows[:6], together, strict=False):
        ids = pair[2].greedy(row, 12, set(model.stop_ids))
        assert answer.n_tokens == len([i for i in ids if i not in model.stop_ids])


def test_stems_are_grown_while_they_save():
    rows = [TokenRow((1, 2, 3, 4, 5, 10 + i)) for i in range(8)] + [TokenRow((9, 8, 7)), TokenRow((1, 2))]
    before, stems.STEM_COST = stems.STEM_COST, 0
    try:
        groups = {stem: sorted(group) for stem, group in common_stems(rows, range(10)) if stem}
    finally:
        stems.STEM_COST = before
    assert groups == {5: list(range(8))}
    assert all(stem == 0 for stem, _ in common_stems(rows, range(10))), "too little to be saved"


def test_batches_are_cut_where_that_is_cheapest():
    lengths = [40, 39, 38, 10, 9, 8, 1]
    order = list(range(7))
    for overhead in (0.0, 5.0, 20.0, 1000.0):
        cuts = cheapest_cuts(order, lengths, {}, overhead)
        assert [i for part in cuts for i in part] == order
        cost = lambda parts, each=overhead: sum(lengths[part[0]] * len(part) + each for part in parts)  # noqa: E731
        every = [[order[a:b] for a, b in pairwise((0, *where, 7))] for k in range(7) for where in combinations(range(1, 7), k)]
        assert cost(cuts) == min(cost(parts) for parts in every)
    assert len(cheapest_cuts(order, lengths, {}, 1000.0)) == 1
    assert len(cheapest_cuts(order, lengths, {}, 0.0)) == 7


# ---- memory ------------------------------------------------------------------------------------------------------------


def test_out_of_memory_goes_on_with_smaller_batches_and_loses_nothing(pair, monkeypatch):
    fast, rows, done = replace(pair[0]), cells(False), []
    expected, layer = fast.generate(rows, 3), fast.engine.model.model.layers[1]
    run, failures = layer.forward, []

    def forward(hidden, **kwargs):
        if hidden.shape[0] * hidden.shape[1] > 40:
            failures.append(hidden.shape)
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return run(hidden, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    monkeypatch.setattr(fast.engine, "budget", Budget(RowCost.of(fast.engine.model.config, 4), "cpu"))
    assert fast.generate(rows, 3, progress=done.append) == expected
    assert failures
    assert sum(done) == len(rows), "each row is finished once"
    assert fast.engine.budget.tokens < 40 * 16


@pytest.mark.usefixtures("stems_at_any_price")
def test_out_of_memory_in_shared_beginnings_goes_on_too(pair, monkeypatch):
    fast = replace(pair[0])
    rows = [Row(prompt_of(f"w{i} w1 w2 w3 w4 w5 w6 w{k}", False)) for i in range(20) for k in (8, 9)]
    expected, layer = fast.next_log_probs(rows), fast.engine.model.model.layers[1]
    run = layer.forward

    def forward(hidden, **kwargs):
        if hidden.shape[0] * hidden.shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return run(hidden, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    monkeypatch.setattr(fast.engine, "budget", Budget(RowCost.of(fast.engine.model.config, 4), "cpu"))
    assert torch.allclose(fast.next_log_probs(rows), expected, atol=1e-5)


def test_one_batch_s_cache_exists_at_a_time(pair, monkeypatch):
    import gc
    import weakref

    fast, stores, alive = pair[0], [], []
    monkeypatch.setattr(fast.engine.budget, "rows", 1)
    layer = fast.engine.model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda m, args, kwargs: alive.append(sum(ref() is not None for ref in stores[:-1])),
                                             with_kwargs=True)
    init = engine.Store.__init__

    def remember(self, *args):
        init(self, *args)
        stores.append(weakref.ref(self))

    monkeypatch.setattr(engine.Store, "__init__", remember)
    gc.disable()
    fast.generate([Row(prompt_of(text, False)) for text in TEXTS], 3)
    gc.enable()
    handle.remove()
    assert len(stores) == len(TEXTS)
    assert max(alive) == 0


def test_bfloat16_ablation_leaves_no_residue():
    direction, value = torch.randn(4096, generator=torch.Generator().manual_seed(0)), 10 * torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    taps = Taps([TokenRow((1,), (TokenEdit(Place(0, "resid_post", 0), direction, "ablate", 1.0),))], [0])
    left = taps.touch(0, "resid_post", value)[0, 0].float() @ direction / direction.norm()
    assert abs(float(left)) < 0.1


@pytest.mark.parametrize(("ask", "said"), [
    (lambda m, row: m.generate([row], 3, temperature=-1.0), "temperature is 0"),
    (lambda m, row: m.generate([row], 3, stop=[""]), "empty stop string"),
    (lambda m, row: m.continuation_log_probs([row], [[]]), "at least one"),
    (lambda m, row: m.continuation_log_probs([row], []), "lists of none"),
])
def test_questions_without_an_answer_are_named(pair, ask, said):
    with pytest.raises(ModelError, match=said):
        ask(pair[0], Row(prompt_of(TEXTS[0], False)))


def test_nothing_asked_is_nothing_found(pair):
    row = Row(prompt_of(TEXTS[0], False))
    for model in pair[:2]:
        assert model.generate([], 3) == []
        assert model.next_log_probs([]).shape[0] == 0
        assert model.next_probs([row], []).shape == (1, 0)
        assert model.record([row], []).shape == (1, 0, D)
        assert model.generate([row], 0)[0].text == ""
        one = Row(Prompt("w1", {"it": (Span(0, 2),)}), (Edit(Site(LAYERS - 1, "it"), torch.ones(D)),))
        assert (model.next_log_probs([one])[0] - pair[2].next_log_probs(one)).abs().max() < CLOSE


def test_beginnings_within_beginnings_within_beginnings():
    rows = [TokenRow(tuple(range(10, 12 + n))) for n in range(1200)]
    assert sorted(i for _, group in common_stems(rows, range(1200)) for i in group) == list(range(1200))


def test_a_row_that_never_fits_is_one_sentence(pair, monkeypatch):
    def forward(hidden, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    monkeypatch.setattr(pair[0].engine.model.model.layers[0], "forward", forward)
    monkeypatch.setattr(pair[0].engine, "budget", Budget(RowCost.of(pair[0].engine.model.config, 4), "cpu"))
    with pytest.raises(OutOfMemoryError, match="not even one row fits"):
        pair[0].next_log_probs(cells(False))


def test_other_errors_are_not_taken_for_memory(pair, monkeypatch):
    def forward(hidden, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(pair[0].engine.model.model.layers[0], "forward", forward)
    with pytest.raises(RuntimeError, match="something else"):
        pair[0].next_log_probs(cells(False))


def test_the_budget_follows_the_free_memory(pair):
    cost = RowCost.of(pair[0].engine.model.config, 4)
    small, large = Budget(cost, "cpu", free=1 << 20), Budget(cost, "cpu", free=1 << 34)
    assert small.tokens < large.tokens
    assert 1 == Budget(cost, "cpu", free=1).most_rows(50, 90, keep=True) < small.most_rows(50, 90, keep=True)
    parts = list(small.parts(list(range(40)), [30] * 40, [30] * 40, 20))
    assert [i for part in parts for i in part] == list(range(40))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1, "batches of one length are of one size"


# ---- where the fast engine is not for ------------------------------------------------------------------------------------


def test_a_model_that_is_not_llama_like_runs_on_the_plain_engine(tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tiny_llama(tmp_path / "words", WORDS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
                    ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = load_model(str(tmp_path / "gpt2"))
    assert model.provenance()["engine"] == "plain"
    rows = [Row(prompt_of(text, False), (Edit(Site(1, "middle"), torch.ones(D)),)) for text in TEXTS]
    alone = torch.cat([model.next_log_probs([row]) for row in rows])
    assert (model.next_log_probs(rows) - alone).abs().max() < CLOSE
    ids = torch.tensor([model.encode([rows[0].prompt])[0].ids])
    with torch.no_grad():
        expected = model.engine.model(ids).logits[0, -1].log_softmax(-1)
    assert torch.allclose(expected, model.next_log_probs([Row(rows[0].prompt)])[0], atol=1e-5)
    with pytest.raises(ModelError, match="fast engine cannot run"):
        load_model(ModelSpec(str(tmp_path / "gpt2"), engine="fast"))
    heads = Edit(Site(1, "end", "z", units=(3, 1)), torch.arange(16.0))
    block = model.engine.model.transformer.h[1]

    def by_hand(module, args):
        value = args[0].clone()
        value[0, -1, 24:32], value[0, -1, 8:16] = torch.arange(8.0), torch.arange(8.0, 16)
        return (value,)

    found = model.next_log_probs([Row(rows[0].prompt, (heads,)), Row(prompt_of("w1", False))])[0]
    handle = block.attn.c_proj.register_forward_pre_hook(by_hand)
    with torch.no_grad():
        assert torch.allclose(model.engine.model(ids).logits[0, -1].log_softmax(-1), found, atol=1e-5)
    handle.remove()
    assert model.n_units(0, "post") == 128
    with pytest.raises(EditError, match="not a pre-norm block"):
        model.next_log_probs([Row(rows[0].prompt, (Edit(Site(1, "middle", "mlp_out"), torch.ones(D)),))])


def test_layers_without_a_known_projection_are_named(tmp_path):
    """A mixture of experts has no one down projection: its neurons are no stream, its heads are."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(tmp_path / "words", WORDS))
    tokenizer.save_pretrained(tmp_path / "moe")
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)).save_pretrained(tmp_path / "moe")
    model, row = load_model(ModelSpec(str(tmp_path / "moe"), engine="plain")), Row(prompt_of(TEXTS[0], False))
    assert model.record([row], [Site(1, "end", "z", units=(3,))]).shape == (1, 1, 8)
    with pytest.raises(EditError, match="no projection of a known name behind post"):
        model.record([row], [Site(1, "end", "post")])


def test_sliding_windows_are_not_run_on_the_fast_engine(tmp_path):
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    folder = tiny_llama(tmp_path / "words", WORDS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = MistralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, sliding_window=4, bos_token_id=1, eos_token_id=2)
    for name, window in (("sliding", 4), ("full", None)):
        config.sliding_window = window
        MistralForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert load_model(str(tmp_path / "sliding")).engine.name == "plain"
    assert load_model(str(tmp_path / "full")).engine.name == "fast"


def test_a_model_whose_numbers_differ_is_sent_to_the_plain_engine(one, monkeypatch):
    """Llama's names with another computation inside: the trial at loading sees it."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def scaled(self, input_ids=None, inputs_embeds=None, **kwargs):
        return forward(self, inputs_embeds=3 * self.embed_tokens(input_ids), **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    assert load_model(str(one)).engine.name == "plain"
    with pytest.raises(ModelError, match="differ from the model's own"):
        load_model(ModelSpec(str(one), engine="fast"))


# ---- placement and other numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_placed_and_offloaded_models_give_the_same_rows(where, llama3_folder, race, tmp_path):
    """Llama 3's double, sharded: through accelerate's placement, and with layers that lie on the disk until they run."""
    from alignblind_mi.stimuli.prompts import implicit_prompts

    prompts = implicit_prompts(race, "default")[:400:57]
    rows = [Row(p, (Edit(Site(1, "marked"), torch.ones(32)),) * (i % 2)) for i, p in enumerate(prompts * 2)]
    expected = load_model(str(llama3_folder)).next_log_probs(rows)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": where, "model.layers.2": where, "model.norm": "cpu",
               "model.rotary_emb": "cpu", "lm_head": where}
    spec = ModelSpec(str(llama3_folder), dtype="float32", device_map=devices, offload_folder=str(tmp_path))
    placed = load_model(spec)
    assert placed.engine.name == "fast"
    assert (placed.next_log_probs(rows) - expected).abs().max() < CLOSE
    assert placed.generate(rows[:3], 4) == load_model(str(llama3_folder)).generate(rows[:3], 4)
    name = "blocks.2.hook_resid_post"
    assert torch.allclose(placed.cache(prompts[0], [name])[name], load_model(str(llama3_folder)).cache(prompts[0], [name])[name], atol=1e-4)


def test_bfloat16_goes_through_the_same_path(one):
    """Agreement is reported, not asserted token by token: rounding differs between batches."""
    rows = cells(False)
    full, half = load_model(str(one)), load_model(ModelSpec(str(one), dtype="bfloat16"))
    assert half.engine.name == "fast"
    same = sum(a.text == b.text for a, b in zip(full.generate(rows, 3), half.generate(rows, 3), strict=True)) / len(rows)
    print(f"bfloat16 gives the greedy texts of float32 in {same:.0%} of {len(rows)} rows")
    assert (full.next_log_probs(rows).argmax(-1) == half.next_log_probs(rows).argmax(-1)).float().mean() > 0.5
    assert torch.isfinite(half.next_log_probs(rows)).all()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_models_run_on_both_engines_and_the_bridge(quantization, tmp_path):
    """bitsandbytes' packed weights (on a CPU here): the engines agree, the bridge shows the same activations, the weights are shared."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(tmp_path / "words", WORDS))
    tokenizer.save_pretrained(tmp_path / "wide")    # packing wants widths in multiples of 64
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, bos_token_id=1,
                                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=2)).save_pretrained(tmp_path / "wide")
    models = [load_model(ModelSpec(str(tmp_path / "wide"), quantization=quantization, engine=engine)) for engine in ("auto", "plain")]
    assert [model.engine.name for model in models] == ["fast", "plain"]
    assert models[0].provenance()["quantization"] == quantization
    rows = [Row(prompt_of(text, False), (Edit(Site(0, "middle"), torch.ones(128)),)) for text in TEXTS * 2]
    found = [model.next_log_probs(rows) for model in models]
    assert (found[0] - found[1]).abs().max() < 0.05
    assert (found[0] - load_model(str(tmp_path / "wide")).next_log_probs(rows)).abs().max() < 1.0, "packing changes numbers, not the model"
    cached = models[0].cache(rows[0].prompt, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"][0, -1]
    assert torch.allclose(cached.float(), models[0].record([Row(rows[0].prompt)], [Site(1, "end")])[0, 0], atol=0.05)


def test_quantisation_without_its_package_is_one_sentence(one, monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModelError, match=r"needs bitsandbytes: pip install 'alignblind-mi\[quantized\]'"):
        load_model(ModelSpec(str(one), quantization="4bit"))
    with pytest.raises(ModelError, match="unknown quantization"):
        ModelSpec(str(one), quantization="2bit")


def test_a_bridge_that_shows_something_else_is_refused(one, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    forward = TransformerBridge.forward
    monkeypatch.setattr(TransformerBridge, "forward", lambda self, *args, **kwargs: 2 * forward(self, *args, **kwargs))
    model = load_model(str(one))
    assert model.next_log_probs([Row(prompt_of(TEXTS[0], False))]).isfinite().all()
    with pytest.raises(ModelError, match=r"view of .* differs from the model"):
        _ = model.bridge


def test_stop_strings_end_an_answer_and_are_cut(pair):
    rows = cells(False)[:6]
    whole = pair[0].generate(rows, 12)
    for row, answer in zip(rows, whole, strict=True):
        words = answer.text.split(" ")
        if len(words) > 3:
            stop = f" {words[2]}"
            (cut,) = pair[0].generate([row], 12, stop=[stop])
            assert cut.text == answer.text[: answer.text.index(stop)]
            assert cut.finished
            assert cut.n_tokens < answer.n_tokens


def test_lens_log_probs_are_those_of_the_whole_vocabulary(pair, monkeypatch):
    prompts = [prompt_of(text, False) for text in TEXTS]
    sites = [Site(layer, place) for layer, place in product(range(LAYERS), PLACES)]
    for model in pair[:2]:
        monkeypatch.setattr(model.engine.budget, "lens_block", (5, 7))
        found = model.lens_log_probs([Row(p) for p in prompts], sites, [" w1", " w2"])
        resid = model.record([Row(p) for p in prompts], sites)
        with torch.no_grad():
            logits = model.engine.model.lm_head(model.engine.model.model.norm(resid))
        expected = logits.log_softmax(-1)[..., [model.token_id(" w1"), model.token_id(" w2")]]
        assert torch.allclose(found, expected, atol=1e-5)
        answer = model.next_log_probs([Row(p) for p in prompts])[:, model.token_id(" w1")]
        at_last = found[:, sites.index(Site(LAYERS - 1, "end")), 0]
        assert torch.allclose(at_last, answer, atol=1e-5), "the lens at the last layer is the answer"
