"""Patching: identities that must hold, plain Hugging Face hooks one row at a time, and what was planted in the organism."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

import alignblind_mi as ab
from alignblind_mi.instruments.attribution import attribution_patching, screen_agreement, top_neuron_sites, unit_attribution
from alignblind_mi.instruments.contrast import Pair, PatchError, contrast_pairs
from alignblind_mi.instruments.patching import (
    CONTROLS,
    DIRECTIONS,
    _wrong_tokens,
    cases,
    grid_sites,
    head_sites,
    log_odds,
    outcome,
    patch_grid,
    patches,
    record_each,
    summarise_patching,
)
from alignblind_mi.instruments.path_patching import path_patch
from alignblind_mi.measures.patching import depth_profile, effect_span, heatmap_table, measure_patching
from alignblind_mi.models.edits import Edit, EditError, Row, Site, Treatment, random_like
from alignblind_mi.models.tokens import Encoded
from alignblind_mi.pages.figures import patch_heatmap
from alignblind_mi.stimuli.concept import ConceptError
from alignblind_mi.stimuli.prompts import PromptError, Span, assignments

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "post")
MARKS = ["all_identifiers", ("marked", 0), "context", "last_token"]


@pytest.fixture(scope="module")
def contexts(race) -> dict[str, list[str]]:
    """Two phrases a sense: the steering phrase, and an awareness sentence after it is told apart by the sense's own words."""
    return {name: [race.steering_phrase(name) + ".", f"{sense.word.strip()} {{x}} and {sense.word.strip()} {{y}}."]
            for name, sense in race.senses.items()}


@pytest.fixture(scope="module")
def pairs(race, tiny, contexts) -> list[Pair]:
    return contrast_pairs(tiny, race, "default", contexts=contexts, categories=["weapon"], max_word_pairs=2)[::11]


# ---- pairs ---------------------------------------------------------------------------------------------------------------


def test_contexts_differ_in_the_sense_alone_and_are_marked(race, tiny, pairs):
    assert {pair.labels["clean_phrase"] for pair in pairs} == {"Race: {marked} and {unmarked}.", "race {x} and race {y}."}
    for pair in pairs:
        clean, corrupt = tiny.encode([pair.clean, pair.corrupt])
        differing = [i for i, (a, b) in enumerate(zip(clean.ids, corrupt.ids, strict=True)) if a != b]
        assert differing
        assert set(differing) <= set(clean.positions("context", "all"))
        assert not set(differing) & set(clean.positions("all_identifiers"))
        assert pair.answers == assignments(race, pair.clean) == assignments(race, pair.corrupt)
        words = {name: [pair.clean.text[s.start : s.end] for s in pair.clean.spans(name)] for name in pair.clean.marks}
        assert words["context_marked"] == [pair.labels["marked"]]
        assert words["context_unmarked"] == [pair.labels["unmarked"]]
        assert words["all_identifiers"] == words["context_identifiers"] + words["identifiers"]
        assert words["context"][0] + " " + pair.clean.text.split(". ", 1)[1] == pair.clean.text
        assert sorted(words["identifiers"]) == sorted(words["marked"] + words["unmarked"])
    first = ["marked", "unmarked"] if pairs[0].labels["option_order"] == "marked_first" else ["unmarked", "marked"]
    assert [pairs[0].clean.text[s.start : s.end] for s in pairs[0].clean.spans("identifiers")[:2]] == [pairs[0].labels[r] for r in first]


def test_swapped_identifiers_are_the_other_order_of_options(race, tiny):
    found = contrast_pairs(tiny, race, "default", swap="identifiers", max_word_pairs=1)
    assert len(found) == 3 * 3 * 2
    for pair in found:
        marked, unmarked = pair.labels["marked"], pair.labels["unmarked"]
        swapped = pair.clean.text.replace(marked, "@").replace(unmarked, marked).replace("@", unmarked)
        assert swapped == pair.corrupt.text != pair.clean.text
    assert len({pair.labels["pair"] for pair in found}) == len(found)


def test_references_say_the_same_in_another_phrase(pairs):
    for pair in pairs:
        assert set(pair.references) == {"clean_sense", "corrupt_sense", "control_phrase"}
        assert pair.references["clean_sense"].text not in (pair.clean.text, pair.corrupt.text)
        assert pair.references["control_phrase"].text.startswith("Random: ")
    others = {pair.clean.text for pair in pairs} | {pair.references["clean_sense"].text for pair in pairs}
    assert len(others) > len({pair.clean.text for pair in pairs}) / 2


@pytest.mark.parametrize(("given", "error", "said"), [
    ({"swap": "colours"}, PatchError, "unknown swap 'colours'"),
    ({"clean": "nothing"}, ConceptError, "unknown sense or control"),
    ({"contexts": {"race": ["{x} and {y}."], "color": ["{x} or {y}.", "{y} and {x}."]}}, PatchError, "1 phrases for 'race' and 2 for"),
    ({"contexts": {"race": ["Race: words."], "color": ["Color: words."]}}, PatchError, "names no identifier"),
    ({"contexts": {"race": ["{x} and {y}."], "color": ["{x} and and {y}."]}}, PatchError, r"is \d+ tokens and .* is \d+ .*equal length"),
])
def test_pairs_that_cannot_be_compared_are_named(race, tiny, given, error, said):
    with pytest.raises(error, match=said):
        contrast_pairs(tiny, race, "default", **{"max_word_pairs": 1, **given})


# ---- the grid ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_run_patched_with_itself_is_the_run(tiny, pairs, direction):
    """Every stream, every kind of place, single heads and neurons; also under a treatment with edits and a prefix."""
    same = [replace(pair, corrupt=pair.clean, references={}) for pair in pairs[:2]]
    sites = grid_sites([2], ["all_identifiers", ("identifiers", 1), "every_token"], STREAMS)
    sites += head_sites(tiny, [1], ["context"]) + grid_sites([3], ["last_token"], ["post"], units=(5, 2))
    treated = tiny.under(Treatment("t", edits=(Edit(Site(1, "marked"), torch.ones(tiny.d_model), "add"),), prefix="Consider black. "))
    for model in (tiny, treated):
        rows = patch_grid(model, same, sites, direction=direction, controls=())
        assert len(rows) > 2 * len(sites)
        assert rows["log_odds"].to_numpy() == pytest.approx(rows["clean"].to_numpy(), abs=1e-4)
        assert rows["effect"].isna().all()
        assert rows["flipped"].isna().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_that_follows_from_a_source_is_the_source(tiny, pairs, direction):
    """Every token before the first layer: nothing of the patched run is left. The last token after the last layer: nothing of its next one
    (the answer's later tokens still read the patched run's other tokens)."""
    some = [replace(pair, clean=with_text(pair.clean), corrupt=with_text(pair.corrupt)) for pair in pairs[:3]]
    name = "clean" if direction == "denoise" else "corrupt"
    rows = patch_grid(tiny, some, [Site(0, "text", "resid_pre", "all")], direction=direction, controls=(), min_difference=1e-3)
    assert rows["effect"].tolist() == pytest.approx([1.0] * 3, abs=1e-2)
    assert rows["log_odds"].tolist() == pytest.approx(rows[name].tolist(), abs=1e-4)
    (last,) = grid_sites([tiny.n_layers - 1], ["last_token"])
    for case in cases(tiny, pairs[:3], direction):
        site = patches(case, [last])[0].at(len(case.encoded.ids) - 1)
        edit = Edit(site, tiny.record([case.sources[""]], [site])[0, 0])
        patched, clean = tiny.next_log_probs([Row(case.target.prompt, (edit,)), case.sources[""]])
        assert (patched - clean).abs().max() < 1e-5
        assert (tiny.next_log_probs([case.target])[0] - clean).abs().max() > 1e-3
    words = [replace(pair, answers=(f" {pair.labels['negative']}", f" {pair.labels['positive']}")) for pair in some]
    first = patch_grid(tiny, words, [last], direction=direction, controls=(), min_difference=1e-3)
    assert first["effect"].tolist() == pytest.approx([1.0] * 3, abs=1e-2)


def with_text(prompt):
    """The prompt with a mark on the whole of it."""
    return replace(prompt, marks={**prompt.marks, "text": (Span(0, len(prompt.text)),)})


def by_hand(model, layer, stream, positions, units, vectors):
    """A plain Hugging Face hook that puts vectors at positions of one module's input or output."""
    block = model.model.layers[layer]
    size = {"z": 8, "post": 1}.get(stream)

    def put(value):
        value = value.clone()
        for position, vector in zip(positions, vectors, strict=True):
            if units:
                value[0].view(value.shape[1], -1, size)[position, list(units)] = vector.view(len(units), size)
            else:
                value[0, position] = vector
        return value

    if stream in ("z", "post"):
        module = block.self_attn.o_proj if stream == "z" else block.mlp.down_proj
        return module.register_forward_pre_hook(lambda m, args: (put(args[0]),))
    module = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[stream]
    return module.register_forward_hook(lambda m, args, out: (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out))


def seen(model, ids, layer, stream):
    """What a module has for a prompt: [token, size]."""
    block, found = model.model.layers[layer], []
    if stream in ("z", "post"):
        module = block.self_attn.o_proj if stream == "z" else block.mlp.down_proj
        handle = module.register_forward_pre_hook(lambda m, args: found.append(args[0][0]))
    else:
        module = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[stream]
        handle = module.register_forward_hook(lambda m, args, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return found[0]


def odds_by_hand(model, tokenizer, ids, answers):
    scores = []
    for answer in answers:
        more = tokenizer(answer, add_special_tokens=False).input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([[*ids, *more]]), use_cache=False).logits[0].log_softmax(-1)
        scores.append(sum(float(log_probs[len(ids) - 1 + i, token]) for i, token in enumerate(more)))
    return scores[0] - scores[1]


def test_the_grid_equals_plain_hooks_one_row_at_a_time(tiny, tiny_folder, pairs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)
    streams = (("resid_post", ()), ("attn_out", ()), ("mlp_out", ()), ("z", (2,)), ("z", (3, 0)), ("post", (7, 30)))
    marks = ["all_identifiers", "context", "last_token"]
    sites = [site for stream, units in streams for site in grid_sites([1], marks, [stream], units=units)]
    for direction, pair in product(DIRECTIONS, pairs[:2]):
        rows = patch_grid(tiny, [pair], sites, direction=direction, controls=(), min_difference=0.0)
        ids = {name: tokenizer(prompt.text).input_ids for name, prompt in (("clean", pair.clean), ("corrupt", pair.corrupt))}
        source, target = ("clean", "corrupt") if direction == "denoise" else ("corrupt", "clean")
        spans = {"last_token": None, **pair.clean.marks}
        offsets = tokenizer(pair.clean.text, return_offsets_mapping=True)["offset_mapping"]
        for (_, row), site in zip(rows.iterrows(), sites, strict=True):
            where = [i for i, (a, b) in enumerate(offsets)
                     if (site.mark == "last_token" and i == len(offsets) - 1)
                     or (spans[site.mark] is not None and any(a < s.end and b > s.start for s in spans[site.mark]))]
            values = seen(plain, ids[source], site.layer, site.stream)[where]
            if site.units:
                values = values.view(len(where), -1, {"z": 8, "post": 1}[site.stream])[:, list(site.units)].flatten(1)
            hook = by_hand(plain, site.layer, site.stream, where, site.units, values)
            expected = odds_by_hand(plain, tokenizer, ids[target], pair.answers)
            hook.remove()
            assert row["log_odds"] == pytest.approx(expected, abs=1e-4), (direction, site)
            assert row["n_tokens"] == len(where)
            assert row[target] == pytest.approx(odds_by_hand(plain, tokenizer, ids[target], pair.answers), abs=1e-4)
        assert rows["moved"].abs().max() > 1e-3


def test_how_many_pairs_run_together_changes_nothing(tiny, pairs, monkeypatch):
    sites, done = grid_sites([1], ["context", "last_token"]), []
    together = patch_grid(tiny, pairs[:3], sites)
    monkeypatch.setattr("alignblind_mi.instruments.patching.ROWS_AT_ONCE", 1)
    alone = patch_grid(tiny, pairs[:3], sites, progress=done.append)
    assert done == [len(together) / 3] * 3
    assert alone["log_odds"].tolist() == pytest.approx(together["log_odds"].tolist(), abs=1e-4)
    assert alone.drop(columns=[*alone.columns[-7:]]).equals(together.drop(columns=[*together.columns[-7:]]))


def test_rows_say_where_and_whose_they_are(tiny, pairs):
    rows = patch_grid(tiny, pairs[:1], grid_sites([1], [("marked", 1), "all_identifiers"]) + head_sites(tiny, [0], ["last_token"])[2:3],
                      controls=["random"])
    assert rows["control"].tolist() == ["", "random"] * 3
    assert rows["occurrence"].tolist()[::2] == ["1", "all", "all"]
    assert rows["token"].tolist()[0] == pairs[0].labels["marked"]
    assert rows["n_tokens"].tolist()[::2] == [1, 6, 1]
    assert (rows["head"].tolist()[::2], rows["units"].tolist()[::2]) == ([-1, -1, 2], ["", "", "2"])
    (item,) = tiny.encode([pairs[0].corrupt])
    assert rows["position"].tolist()[::4] == [item.positions("marked", occurrence=1)[0], len(item.ids) - 1]
    assert {name: rows[name].iloc[0] for name in ("word_pair", "clean_sense", "treatment")} == {
        "word_pair": pairs[0].labels["word_pair"], "clean_sense": "race", "treatment": "untreated"}


def test_every_token_is_patched_but_those_that_stand_for_nothing(tiny, llama3, race, pairs):
    for model, some in ((tiny, pairs[:1]), (llama3, contrast_pairs(llama3, race, "default", max_word_pairs=1)[:1])):
        rows = patch_grid(model, some, grid_sites([1], ["every_token"]), controls=())
        (item,) = model.encode([some[0].corrupt])
        assert rows["position"].tolist() == list(range(1, len(item.ids)))
        assert (rows["mark"] == "every_token").all()


@pytest.mark.parametrize(("ask", "error", "said"), [
    (lambda m, p: patch_grid(m, p, grid_sites([0], ["last_token"]), direction="up"), PatchError, "unknown direction 'up'"),
    (lambda m, p: patch_grid(m, p, grid_sites([0], ["last_token"]), controls=["luck"]), PatchError, "unknown control 'luck'"),
    (lambda m, p: patch_grid(m, p, []), PatchError, "no sites"),
    (lambda m, p: patch_grid(m, p, grid_sites([0], ["nowhere"])), PromptError, "has no mark 'nowhere'"),
    (lambda m, p: patch_grid(m, p, grid_sites([9], ["last_token"])), EditError, "layer 9 does not exist"),
    (lambda m, p: patch_grid(m, p, grid_sites([0], ["last_token"], ["z"], units=(8,))), EditError, "head 8 of layer 0 does not exist"),
    (lambda m, p: patch_grid(m, [replace(p[0], corrupt=p[0].corrupt.prefixed("Consider "))], grid_sites([0], ["context"])), PatchError,
     "prompts of equal length"),
    (lambda m, p: summarise_patching(pd.DataFrame({"effect": [1.0]}), ["layer"]), PatchError, "no column 'layer'"),
    (lambda m, p: unit_attribution(m, p, "context", stream="mlp_out"), PatchError, "has no units"),
    (lambda m, p: path_patch(m, p, [(0, 9)]), PatchError, "head 9 of layer 0 does not exist"),
    (lambda m, p: path_patch(m, p, [(0, 0)], component="mlp"), PatchError, "unknown component"),
    (lambda m, p: path_patch(m, p[:1], [(0, 0)], component="v"), PatchError, "no direct path into component 'v'.*n_key_value_heads=2"),
])
def test_what_cannot_be_patched_is_named(tiny, pairs, ask, error, said):
    with pytest.raises(error, match=said):
        ask(tiny, pairs)


def test_a_token_without_text_of_its_own_is_named(tiny, pairs):
    (case,) = cases(tiny, pairs[:1], "denoise")
    (patch,) = patches(case, grid_sites([0], ["last_token"]))
    with pytest.raises(PatchError, match=r"token 0 of .* stands for no text of its own"):
        record_each(tiny, [(case.target, (patch.at(0),))])


# ---- controls ------------------------------------------------------------------------------------------------------------


def test_reference_controls_are_patches_from_their_own_run(tiny, pairs):
    sites = grid_sites([1, 2], ["all_identifiers", "context"])
    for direction, own in (("denoise", "corrupt_sense"), ("noise", "clean_sense")):
        rows = patch_grid(tiny, pairs[:2], sites, direction=direction)
        assert list(dict.fromkeys(rows["control"])) == ["", *CONTROLS]
        for control, reference in (("same_sense", own), ("control_phrase", "control_phrase")):
            name = "clean" if direction == "denoise" else "corrupt"
            from_there = [replace(pair, **{name: pair.references[reference]}) for pair in pairs[:2]]
            expected = patch_grid(tiny, from_there, sites, direction=direction, controls=())
            assert rows[rows["control"] == control]["log_odds"].to_numpy() == pytest.approx(expected["log_odds"].to_numpy(), abs=1e-5)


def test_random_controls_have_the_source_s_norm_and_a_seed(tiny, pairs):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
    one, again, other = (random_like(vector, seed) for seed in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert float(one.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(one, other, dim=0))) < 0.9
    grids = [patch_grid(tiny, pairs[:1], grid_sites([1], ["context"]), controls=["random", "wrong_token"], seed=seed)["log_odds"].tolist()
             for seed in (0, 0, 1)]
    assert grids[0] == pytest.approx(grids[1], abs=1e-6)
    assert grids[0][0] == pytest.approx(grids[2][0], abs=1e-6)
    assert grids[0][1:] != pytest.approx(grids[2][1:], abs=1e-6)


def test_a_wrong_token_is_one_that_the_patch_leaves_alone(tiny, pairs):
    every = cases(tiny, pairs, "denoise")
    for case in every:
        found = patches(case, grid_sites([0, 3], ["all_identifiers", "context", "last_token"]))
        wrong = _wrong_tokens(case, found, 0)
        assert len(wrong) == sum(len(patch.positions) for patch in found)
        for (patch, _), other in wrong.items():
            assert other not in patch.positions
            assert other in case.tokens


def test_controls_without_what_they_need_are_not_made_up(tiny, pairs):
    bare = replace(pairs[0], references={})
    rows = patch_grid(tiny, [bare], grid_sites([1], ["context"]))
    assert rows["control"].tolist() == ["", "random", "wrong_token"]


# ---- what is measured ----------------------------------------------------------------------------------------------------


def test_outcomes_are_shares_of_the_difference():
    found = outcome(1.0, 4.0, -2.0, "denoise")
    assert (found["moved"], found["effect"], found["flipped"]) == (3.0, 0.5, 1.0)
    assert found["p_stereotyped"] == pytest.approx(1 / (1 + np.exp(-1)))
    found = outcome(1.0, 4.0, -2.0, "noise")
    assert (found["moved"], found["effect"], found["flipped"]) == (-3.0, 0.5, 0.0)
    found = outcome(1.0, 1.1, 1.0, "denoise")
    assert np.isnan(found["effect"])
    assert np.isnan(found["flipped"])
    assert outcome(1.05, 1.1, 1.0, "denoise", 0.05)["effect"] == pytest.approx(0.5)


def test_summaries_count_what_has_no_effect():
    rows = pd.DataFrame({"layer": 0, "word_pair": list("aabbcc"), "template": list("tututu"), "direction": "denoise",
                         "effect": [1.0, 0.5, 0.0, float("nan"), 0.5, 0.5], "clean": [1.0, 2.0, 1.0, 0.01, -2.0, 4.0], "corrupt": 0.0,
                         "moved": [1.0, 1.0, 0.0, 1.0, -1.0, 2.0], "log_odds": 2.0, "p_stereotyped": 0.5,
                         "flipped": [1.0, float("nan"), 0.0, 0.0, float("nan"), 1.0]})
    (found,) = summarise_patching(rows, ["layer"]).to_dict("records")
    assert (found["n"], found["undefined"], found["flippable"], found["flipped"]) == (6, pytest.approx(1 / 6), 4, 0.5)
    assert found["mean"] == pytest.approx((1 + 2 + 0 + 0.01 + 2 + 8) / (1 + 4 + 1 + 0.0001 + 4 + 16))    # by least squares, by hand
    assert found["low"] < found["mean"] < found["high"]
    (noised,) = summarise_patching(rows.assign(direction="noise", moved=-rows["moved"]), ["layer"]).to_dict("records")
    assert (noised["mean"], noised["low"]) == pytest.approx((found["mean"], found["low"]))
    same = summarise_patching(rows.assign(clean=0.0), ["layer"]).iloc[0]
    assert np.isnan([same["mean"], same["low"], same["high"]]).all()


def test_a_few_runs_that_hardly_differ_do_not_make_the_effect():
    random = np.random.default_rng(0)
    apart = random.normal(0.5, 1, 200)
    moved = 0.3 * apart + random.normal(0, 0.5, 200)
    rows = pd.DataFrame({"layer": 0, "direction": "denoise", "clean": apart, "corrupt": 0.0, "moved": moved, "effect": moved / apart,
                         "word_pair": np.repeat(np.arange(40), 5), "template": np.tile(np.arange(5), 40), "log_odds": 0.0,
                         "p_stereotyped": 0.5, "flipped": 0.0})
    found = summarise_patching(rows, ["layer"]).iloc[0]
    assert found["mean"] == pytest.approx(0.3, abs=0.06)
    assert found["low"] < 0.3 < found["high"] < found["low"] + 0.3
    assert abs(rows["effect"].mean() - 0.3) > 0.2    # the mean of the rows' own ratios


# ---- attribution ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attribution_is_the_limit_of_small_patches(tiny, pairs, direction):
    """A patch that goes a little of the way, in both directions along it: the slope of the log-odds is the attribution; edits included."""
    model = tiny.under(Treatment("t", edits=(Edit(Site(0, "unmarked"), 0.5 * torch.ones(tiny.d_model), "add"),), prefix="Consider black. "))
    pair, small = pairs[0], 0.01
    sites = grid_sites(range(4), ["all_identifiers", "context"], STREAMS) + head_sites(tiny, [1], ["context"])
    sites += grid_sites([2], ["context"], ["post"], units=(30, 4))
    screen = attribution_patching(model, [pair], sites, direction=direction)
    (case,) = cases(model, [pair], direction)
    rows = []
    for patch in patches(case, sites):
        for position in patch.positions:
            assert patch.at(position).units == patch.site.units
        at = [patch.at(position) for position in patch.positions]
        there, here = (model.record([row], at)[0] for row in (case.sources[""], case.target))
        rows += [replace(case.target, edits=(*case.target.edits, *(Edit(site, step * (a - b), "add") for site, a, b in
                                                                   zip(at, there, here, strict=True)))) for step in (small, -small)]
    odds = log_odds(model, rows, [pair.answers] * len(rows))
    slopes = ((odds[::2] - odds[1::2]) / (2 * small)).tolist()
    assert screen["attribution"].tolist() == pytest.approx(slopes, rel=0.03, abs=4e-3)
    assert max(map(abs, slopes)) > 0.1
    ends = patch_grid(model, [pair], sites[:1], direction=direction, controls=())
    assert screen[["clean", "corrupt"]].iloc[0].tolist() == pytest.approx(ends[["clean", "corrupt"]].iloc[0].tolist(), abs=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_on_the_way_add_up_to_the_whole_difference(tiny, pairs, direction):
    """Completeness of integrated gradients, at the embeddings of all tokens, under edits too; one gradient alone falls short of it."""
    model = tiny.under(Treatment("t", edits=(Edit(Site(1, "unmarked"), 0.5 * torch.ones(tiny.d_model), "add"),)))
    pair = replace(pairs[0], clean=with_text(pairs[0].clean), corrupt=with_text(pairs[0].corrupt))
    sites = [Site(0, "text", "resid_pre", "all")]
    (whole,), (one,) = (attribution_patching(model, [pair], sites, direction=direction, steps=steps).to_dict("records")
                        for steps in (60, 1))
    way = (whole["clean"] - whole["corrupt"]) * (1 if direction == "denoise" else -1)
    assert whole["attribution"] == pytest.approx(way, rel=0.03, abs=0.01)
    assert abs(one["attribution"] - way) > 5 * abs(whole["attribution"] - way)
    with pytest.raises(PatchError, match="got steps=0"):
        attribution_patching(model, [pair], sites, steps=0)


def test_units_share_the_attribution_of_their_stream(tiny, pairs):
    for stream, n in (("post", 48), ("z", 4)):
        by_unit = unit_attribution(tiny, pairs[:2], "context", stream=stream)
        assert by_unit.shape == (tiny.n_layers, n)
        whole = attribution_patching(tiny, pairs[:2], grid_sites(range(tiny.n_layers), ["context"], [stream]))
        assert by_unit.sum(1).tolist() == pytest.approx(whole.groupby("layer")["attribution"].mean().tolist(), abs=1e-4)
    heads = attribution_patching(tiny, pairs[:2], head_sites(tiny, [1], ["context"])).groupby("head")["attribution"].mean()
    assert by_unit[1].tolist() == pytest.approx(heads.tolist(), abs=1e-5)


def test_top_neurons_are_those_of_the_largest_attribution(tiny, pairs):
    scores = unit_attribution(tiny, pairs[:2], "context")
    for site in top_neuron_sites(tiny, pairs[:2], "context", 5, layers=[0, 2]):
        left = [i for i in range(48) if i not in site.units]
        assert len(site.units) == 5
        assert scores[site.layer, list(site.units)].abs().min() >= scores[site.layer, left].abs().max()
        assert patch_grid(tiny, pairs[:1], [site], controls=())["units"].item() == ",".join(map(str, site.units))


def test_agreement_compares_the_same_places(tiny, pairs):
    sites = grid_sites(range(4), ["context", "last_token"], ["resid_post", "z"])
    exact, screen = patch_grid(tiny, pairs[:2], sites), attribution_patching(tiny, pairs[:2], sites)
    perfect = screen_agreement(exact, exact[exact["control"] == ""].assign(attribution=lambda rows: rows["moved"]).drop(columns="control"))
    assert perfect[["pearson", "spearman"]].to_numpy() == pytest.approx(np.ones((2, 2)))
    found = screen_agreement(exact, screen.sample(frac=1, random_state=0), by=["direction"])
    real = exact[exact["control"] == ""]["moved"].to_numpy()
    assert found["n"].item() == 32
    assert found["pearson"].item() == pytest.approx(np.corrcoef(real, screen["attribution"])[0, 1])
    assert found["largest_miss"].item() == pytest.approx(np.abs(real - screen["attribution"].to_numpy()).max())
    with pytest.raises(PatchError, match="no place in common"):
        screen_agreement(exact, screen.assign(direction="noise"))
    with pytest.raises(PatchError, match="no column 'attribution'"):
        screen_agreement(exact)


# ---- paths ---------------------------------------------------------------------------------------------------------------


def test_a_path_reaches_one_head_s_query_and_nothing_else(tiny, tiny_folder, pairs):
    """By hand: the receiver's query is computed from the stream plus the sender's change; all else of the run is its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)
    pair, sender = pairs[0], (0, 1)
    rows = path_patch(tiny, [pair], [sender], receivers=[(1, 2), (3, 0)])
    assert rows[["layer", "head"]].to_numpy().tolist() == [[1, 2], [3, 0]]
    ids = {name: tokenizer(prompt.text).input_ids for name, prompt in (("clean", pair.clean), ("corrupt", pair.corrupt))}
    for layer, head in ((1, 2), (3, 0)):
        scores = []
        for answer in pair.answers:
            more = tokenizer(answer, add_special_tokens=False).input_ids
            clean, corrupt = ([*ids[name], *more] for name in ("clean", "corrupt"))
            part = slice(8 * sender[1], 8 * sender[1] + 8)
            delta = seen(plain, clean, sender[0], "z")[:, part] - seen(plain, corrupt, sender[0], "z")[:, part]
            written = delta @ plain.model.layers[sender[0]].self_attn.o_proj.weight[:, part].T
            block, entering = plain.model.layers[layer], []

            def query(module, args, out, block=block, entering=entering, head=head, written=written):
                other = torch.nn.functional.linear(block.input_layernorm(entering[0] + written), module.weight)
                out = out.clone()
                out[..., 8 * head : 8 * head + 8] = other[..., 8 * head : 8 * head + 8]
                return out

            hooks = [block.register_forward_pre_hook(lambda m, args, entering=entering: entering.append(args[0])),
                     block.self_attn.q_proj.register_forward_hook(query)]
            with torch.no_grad():
                log_probs = plain(torch.tensor([corrupt]), use_cache=False).logits[0].log_softmax(-1)
            for hook in hooks:
                hook.remove()
            scores.append(sum(float(log_probs[len(ids["corrupt"]) - 1 + i, token]) for i, token in enumerate(more)))
        found = rows[(rows["layer"] == layer) & (rows["head"] == head)]["log_odds"].item()
        assert found == pytest.approx(scores[0] - scores[1], abs=1e-4)
    assert rows["moved"].abs().max() > 1e-4


def test_paths_run_under_a_treatment(tiny, pairs):
    model = tiny.under(Treatment("t", edits=(Edit(Site(0, "unmarked"), 2 * torch.ones(tiny.d_model), "add"),), prefix="Consider black. "))
    rows = path_patch(model, pairs[:1], [(1, 0)], direction="noise")
    ends = patch_grid(model, pairs[:1], grid_sites([0], ["context"]), direction="noise", controls=())
    assert rows[["clean", "corrupt"]].iloc[0].tolist() == pytest.approx(ends[["clean", "corrupt"]].iloc[0].tolist(), abs=1e-3)
    plain = path_patch(tiny, pairs[:1], [(1, 0)], direction="noise")
    assert abs(rows["clean"].iloc[0] - plain["clean"].iloc[0]) > 1e-2
    assert (rows["log_odds"] - rows["clean"]).abs().max() < (rows["log_odds"] - plain["clean"].iloc[0]).abs().min()
    assert set(rows["treatment"]) == {"t"}


# ---- the study -----------------------------------------------------------------------------------------------------------


def test_the_study_has_every_part_in_both_directions(tiny, race):
    done = []
    rows = measure_patching(tiny, race, "default", categories=["weapon"], max_word_pairs=1, layers=[2], steps=1,
                            progress=done.append, controls=["random", "wrong_token"])
    n = 12
    assert sum(done) == len(rows)
    real = rows[rows["control"] == ""]
    counted = real.groupby(["direction", "stream"]).size()
    places = {"resid_post": 7, "attn_out": 7, "mlp_out": 7, "z": 4 * 2}
    assert counted.to_dict() == {(direction, stream): n * k for direction in DIRECTIONS for stream, k in places.items()}
    assert real["attribution"].notna().all()
    assert rows[rows["control"] != ""]["attribution"].isna().all()
    assert rows.groupby("stream")["control"].unique().map(list).to_dict() == {
        "resid_post": ["", "random", "wrong_token"], **{stream: ["", "random"] for stream in ("attn_out", "mlp_out", "z")}}
    assert set(rows["swap"]) == {"context"}
    assert set(screen_agreement(rows)["n"]) == {n * 7, n * 8}
    table = heatmap_table(rows, "head")
    assert table.groupby("panel", sort=False).size().to_dict() == {
        "denoise": 4, "denoise, control: random": 4, "noise": 4, "noise, control: random": 4}
    assert heatmap_table(rows, "head", controls=())["panel"].unique().tolist() == ["denoise", "noise"]
    assert set(heatmap_table(rows)["place"]) == set(real[real["stream"] == "resid_post"]["mark"])
    with pytest.raises(PatchError, match="unknown part 'legs'"):
        measure_patching(tiny, race, "default", parts=["legs"])
    with pytest.raises(PatchError, match="no part to patch"):
        measure_patching(tiny, race, "default", parts=["screen"])
    with pytest.raises(PatchError, match="nothing was patched there"):
        heatmap_table(rows, "token")


def profile_rows(by_layer: dict[int, tuple[float, float]]) -> pd.DataFrame:
    """Rows of a profile: mean effect and random control by layer, with a little spread between word pairs."""
    rows = [{"model": "m", "treatment": "t", "direction": "denoise", "mark": "all_identifiers", "stream": "resid_post", "units": "",
             "occurrence": "all", "layer": layer, "control": control, "word_pair": str(k), "template": "t", "clean": 1.0, "corrupt": 0.0,
             "effect": value + 0.02 * (k - 1), "moved": value + 0.02 * (k - 1),
             "log_odds": 0.0, "p_stereotyped": 0.5, "flipped": 0.0}
            for layer, both in by_layer.items() for control, value in zip(("", "random"), both, strict=True) for k in range(3)]
    return pd.DataFrame(rows)


def test_depth_is_from_the_first_to_the_last_layer_above_its_controls():
    profile = depth_profile(profile_rows({0: (0.1, 0.0), 1: (0.9, 0.2), 2: (0.8, 0.79), 3: (0.7, 0.1), 4: (0.2, 0.0), 5: (0.6, 0.9)}))
    assert profile["layer"].tolist() == list(range(6))
    assert profile["control"].unique().tolist() == ["random"]
    assert profile["mean"].tolist() == pytest.approx([0.1, 0.9, 0.8, 0.7, 0.2, 0.6])
    assert effect_span(profile) == (1, 3)
    assert effect_span(profile, threshold=0.85) == (1, 1)
    assert effect_span(profile, threshold=0.95) is None
    alone = profile_rows({0: (0.1, 0.0), 1: (0.9, 0.2)})
    assert effect_span(depth_profile(alone[alone["control"] == ""])) == (1, 1)
    with pytest.raises(PatchError, match="several models"):
        effect_span(pd.concat([profile, profile]))
    with pytest.raises(PatchError, match="no row patches z"):
        depth_profile(alone, stream="z")


@pytest.mark.slow
def test_the_organism_s_planted_depth_is_found_by_denoising_and_noising(race):
    """Blocks 1-3 carry the reading of the identifiers, 5-7 do nothing; the phrases are ones that were never planted."""
    planted = ab.organism_info()["planted"]
    first, last = min(planted["effect_blocks"]), max(planted["effect_blocks"])
    model = ab.load_model("organism:aligned")
    rows = measure_patching(model, race, "default", parts=["residual"], marks=["all_identifiers", "identifiers"], max_word_pairs=1)
    for direction, profile in depth_profile(rows).groupby("direction"):
        means, span = profile.set_index("layer")["mean"], effect_span(profile)
        assert means[planted["effect_blocks"]].min() > 0.75, direction
        assert means[planted["no_effect_blocks"]].abs().max() < 0.06, direction
        assert abs(span.first - first) <= 1
        assert abs(span.last - last) <= 1
    question = depth_profile(rows, mark="identifiers").set_index(["direction", "layer"])["mean"]
    assert question["denoise"][planted["effect_blocks"]].min() > 0.9, "one of two places that say it is enough ..."
    assert question["noise"][planted["effect_blocks"]].max() < 0.2, "... so that neither alone is needed"


def test_positions_of_an_encoded_prompt_are_what_cases_patch(tiny, pairs):
    (case,) = cases(tiny, pairs[:1], "denoise")
    assert isinstance(case.encoded, Encoded)
    (patch,) = patches(case, grid_sites([0], ["all_identifiers"]))
    assert list(patch.positions) == sorted(tiny.encode([pairs[0].corrupt])[0].positions("all_identifiers"))


def test_rows_of_patches_are_drawn_in_one_call(tiny, race):
    rows = measure_patching(tiny, race, "default", parts=("residual",), controls=("random",), layers=(0, 1), max_word_pairs=1)
    drawn, shaped = patch_heatmap(rows), patch_heatmap(heatmap_table(rows))
    titles = [axis.get_title("left") for axis in drawn.axes]
    assert titles == [axis.get_title("left") for axis in shaped.axes]
    assert titles[0].startswith("denoise (n = ")
    alone = patch_grid(tiny, contrast_pairs(tiny, race, "default", max_word_pairs=1)[:1], grid_sites([0, 1], ["every_token"]), controls=())
    assert heatmap_table(alone).equals(heatmap_table(alone, "token"))
    assert len(patch_heatmap(alone).axes[0].images) == 1
    both = pd.concat([rows, rows.assign(treatment="other")])
    with pytest.raises(PatchError, match=r"several treatments \(untreated, other\)"):
        patch_heatmap(both)
