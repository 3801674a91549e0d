"""Noise that does as much as a treatment: against plain hooks on transformers' own model, and what it keeps of the stream."""

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import Oracle

from alignblind_mi.measures.behaviour import Decoding, ask_under
from alignblind_mi.mitigations.placebos import EFFECTS, SEEDS, noise_like, noise_placebos, treatment_effects, with_effects
from alignblind_mi.mitigations.steering import sense_steering, steering_vectors
from alignblind_mi.models.edits import UNTREATED, Edit, EditError, Row, Site, Treatment
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.models.model import load_model
from alignblind_mi.statistics.placebos import placebo_bands
from alignblind_mi.stimuli.prompts import Prompt, implicit_prompts

WINDOW = range(1, 4)


@pytest.fixture(scope="module")
def aligned():
    return load_model("organism:aligned")


@pytest.fixture(scope="module")
def prompts(race):
    return implicit_prompts(race, "default", max_word_pairs=1)[::6]


@pytest.fixture(scope="module")
def treatments(aligned, race):
    """Additions at the identifiers and at every token, an ablation, and a replacement."""
    vectors = steering_vectors(aligned, race, "default", "race", "mean_difference", layers=WINDOW)
    return {"add": vectors.treatment(strength=0.5), "prompt": vectors.treatment(strength=0.25, positions=("prompt",)),
            "ablate": vectors.treatment(how="ablate"), "replace": sense_steering(aligned, race, "default", "race", WINDOW)}


def by_hand(oracle: Oracle, prompt: Prompt, treatment: Treatment, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the stream after layer `last` [token, d_model], next log-probabilities), by forward hooks on transformers' own layers."""
    out = oracle.tokenizer(prompt.text, return_offsets_mapping=True, return_tensors="pt")
    ends = [end for _, end in out["offset_mapping"][0].tolist()]
    kept, hooks = [], []

    def at(layer):
        def hook(module, args, given):
            value = (given[0] if isinstance(given, tuple) else given).clone()
            for edit in treatment.edits:
                mark = edit.site.mark
                where = range(1, value.shape[1]) if mark == "prompt" else [ends.index(span.end) for span in prompt.marks[mark]]
                for i in where if edit.site.layer == layer else ():
                    x, v = value[0, i].clone(), edit.vector
                    if edit.how == "replace":
                        value[0, i] = v
                    elif edit.how == "ablate":
                        value[0, i] = x - (x @ v) * v / (v @ v)
                    elif edit.as_far_as is not None:
                        value[0, i] = x + edit.strength * (edit.as_far_as - x).norm() * v / v.norm()
                    else:
                        value[0, i] = x + edit.strength * v
            if layer == last:
                kept.append(value[0])
            return (value, *given[1:]) if isinstance(given, tuple) else value
        return hook

    for i, layer in enumerate(oracle.layers()):
        hooks.append(layer.register_forward_hook(at(i)))
    with torch.no_grad():
        logits = oracle.model(out["input_ids"], use_cache=False).logits[0, -1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return kept[0], logits


def effects_by_hand(oracle, prompts, treatment, last) -> tuple[float, float]:
    moved, divergence = [], []
    for prompt in prompts:
        (clean, before), (treated, after) = (by_hand(oracle, prompt, one, last) for one in (UNTREATED, treatment))
        change = (treated - clean).norm(dim=-1)
        moved += change[change > 1e-3 * change.max()].tolist() if treatment.edits[0].site.mark == "prompt" else [
            float(change[i]) for i in treated_tokens(oracle, prompt)]
        divergence.append(float((before.exp() * (before - after)).sum()))
    return float(np.mean(moved)), float(np.mean(divergence))


def treated_tokens(oracle, prompt) -> list[int]:
    ends = [end for _, end in oracle.tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]]
    return [ends.index(span.end) for mark in ("marked", "unmarked") for span in prompt.marks[mark]]


@pytest.mark.parametrize("how", ["add", "prompt", "ablate", "replace"])
def test_noise_displaces_as_much_as_its_treatment_by_plain_hooks(aligned, prompts, treatments, how):
    oracle = Oracle(organism_path("aligned"))
    treatment, noise = treatments[how], noise_like(aligned, treatments[how], prompts, seed=3)
    wanted, _ = effects_by_hand(oracle, prompts, treatment, WINDOW[-1])
    found, divergence = effects_by_hand(oracle, prompts, noise, WINDOW[-1])
    assert found == pytest.approx(wanted, rel=0.01)
    said = treatment_effects(aligned, [treatment, noise], prompts)
    assert said["displacement"].tolist() == pytest.approx([wanted, found], rel=1e-3)
    assert said["kl_prompts"].iloc[1] == pytest.approx(divergence, rel=1e-2, abs=1e-5)
    assert (said["layer"] == WINDOW[-1]).all()
    assert said["placebo"].tolist() == ["", "noise"]


def test_it_holds_on_a_model_of_random_weights(tiny, race):
    prompts = implicit_prompts(race, "default", max_word_pairs=1)[::4]
    for treatment in (sense_steering(tiny, race, "default", "race", [1, 2]),
                      steering_vectors(tiny, race, "default", "race", "mean_difference", layers=[0, 1, 2]).treatment(strength=2.0)):
        noise = noise_placebos(tiny, treatment, prompts, n=2)
        found = treatment_effects(tiny, [treatment, *noise], prompts)["displacement"]
        assert found.iloc[1:].tolist() == pytest.approx([found.iloc[0]] * 2, rel=0.006)
        others = implicit_prompts(race, "default", max_word_pairs=1)[1::8]    # not those that it was matched on
        there = treatment_effects(tiny, [treatment, *noise], others)["displacement"]
        assert there.iloc[1:].tolist() == pytest.approx([there.iloc[0]] * 2, rel=0.1)


def test_draws_are_several_and_come_again(aligned, prompts, treatments):
    first, again = (noise_placebos(aligned, treatments["add"], prompts, seed=1) for _ in range(2))
    assert len({one.name for one in first}) == SEEDS == 5
    assert [one.details["seed"] for one in first] == ["1", "2", "3", "4", "5"]
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x.vector, y.vector) and x.strength == y.strength for x, y in zip(a.edits, b.edits, strict=True))
    units = torch.stack([one.edits[0].vector / one.edits[0].vector.norm() for one in first])
    assert ((units @ units.T) - torch.eye(SEEDS)).abs().max() < 0.5
    assert {one.family for one in first} == {"placebo"}
    alone = noise_like(aligned, treatments["add"], prompts, seed=3)
    assert torch.equal(alone.edits[0].vector, first[2].edits[0].vector)


def test_one_direction_for_all_layers_of_a_window(aligned, prompts, treatments):
    for how, roles in (("add", 1), ("replace", 2)):
        noise = noise_like(aligned, treatments[how], prompts)
        assert [edit.site for edit in noise.edits] == [edit.site for edit in treatments[how].edits]
        units = {tuple((edit.vector / edit.vector.norm()).mul(1e4).round().tolist()) for edit in noise.edits}
        assert len(units) == roles, "a replacement has a vector for each identifier, an addition one for both"
        assert {edit.how for edit in noise.edits} == {"add"}


def test_noise_of_a_replacement_keeps_the_mean_of_the_stream(aligned, prompts, treatments):
    """A random vector in the place of an activation would take away what all activations have in common."""
    first, sites = WINDOW[0], [Site(WINDOW[0], "marked", occurrence=0)]
    treatment = treatments["replace"]
    clean = aligned.record([Row(prompt) for prompt in prompts], sites)[:, 0]
    noise = noise_like(aligned, treatment, prompts)
    moved = aligned.record(noise.rows(prompts), sites)[:, 0] - clean
    edit = next(edit for edit in noise.edits if edit.site.layer == first and edit.site.mark == "marked")
    v = next(edit.vector for edit in treatment.edits if edit.site.layer == first and edit.site.mark == "marked")
    assert edit.strength == 1.0, "the whole of it in the first layer"
    lengths = (v - clean).norm(dim=-1)
    torch.testing.assert_close(moved, lengths[:, None] * edit.vector / edit.vector.norm(), atol=1e-3, rtol=1e-4)
    mean = clean.mean(0)
    assert float((clean + moved).mean(0) @ mean / (mean @ mean)) == pytest.approx(1, abs=0.2)


def test_noise_of_a_replacement_follows_its_displacement_through_the_window(aligned, prompts, treatments):
    sites = [Site(layer, "marked", occurrence=0) for layer in WINDOW]
    clean = aligned.record([Row(prompt) for prompt in prompts], sites)
    wanted, found = ((aligned.record(one.rows(prompts), sites) - clean).norm(dim=-1).mean(0)
                     for one in (treatments["replace"], noise_like(aligned, treatments["replace"], prompts)))
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-4)
    assert torch.allclose(found, wanted, rtol=0.25)


def test_what_acts_on_what_follows_is_matched_at_the_last_token(aligned, race, prompts):
    contrast = steering_vectors(aligned, race, "default", "race", "contrast", layers=[2, 3])
    for positions in (None, ("generated",)):
        treatment = contrast.treatment(positions=positions)
        noise = noise_like(aligned, treatment, prompts)
        assert [edit.site for edit in noise.edits] == [edit.site for edit in treatment.edits]
        found = treatment_effects(aligned, [treatment, noise], prompts)["displacement"]
        assert found[1] == pytest.approx(found[0], rel=0.006)
        assert len({edit.vector.data_ptr() for edit in noise.edits}) == 2, "one vector at several places of a layer stays one"
        (row,) = noise.text_rows([Prompt("The garden is near the house.")])
        assert [(edit.site.layer, edit.site.mark) for edit in row.edits] == [(2, "prompt"), (3, "prompt")]


def test_a_treatment_that_does_nothing_has_noise_that_does_nothing(aligned, prompts, treatments):
    nothing = Treatment("none", tuple(Edit(edit.site, edit.vector, "add", 0.0) for edit in treatments["add"].edits))
    noise = noise_like(aligned, nothing, prompts)
    assert treatment_effects(aligned, [nothing, noise], prompts)[["displacement", "kl_prompts"]].to_numpy() == pytest.approx(0, abs=1e-6)


def test_what_has_no_edits_is_read_where_one_says(aligned, prompts):
    polite = Treatment("polite", prefix="Here are some words. ", family="prompt")
    sites = [Site(3, role) for role in ("marked", "unmarked")]
    found = treatment_effects(aligned, [polite, UNTREATED], prompts, sites=sites)
    assert found["displacement"].iloc[0] > 0
    assert found["displacement"].iloc[1] == 0
    assert found["kl_prompts"].iloc[0] > 0
    assert found["tokens"].tolist() == [len(prompts) * 4] * 2
    assert treatment_effects(aligned, polite, prompts)["displacement"].isna().all()
    with pytest.raises(EditError, match="noise stands for edits, and the treatment 'polite' has none"):
        noise_like(aligned, polite, prompts)


def test_what_cannot_be_matched_is_refused(aligned, prompts, treatments):
    with pytest.raises(EditError, match="there are no prompts to measure a treatment on"):
        noise_like(aligned, treatments["add"], [])
    with pytest.raises(EditError, match=r"acts at no token of these prompts: give prompts with its marks \(marked, unmarked\)"):
        noise_like(aligned, treatments["add"], ["The garden is near the house."])


# ---- as rows --------------------------------------------------------------------------------------------------------------


def test_rows_say_what_their_treatment_does_and_draws_are_a_band(aligned, race, treatments):
    prompts = [prompt for prompt in implicit_prompts(race, "default", max_word_pairs=2) if prompt.labels["category"] == "guilt"][::3]
    noise = noise_placebos(aligned, treatments["add"], prompts, n=3)
    asked = [UNTREATED, treatments["add"], *noise]
    rows = with_effects(ask_under(aligned, race, prompts, asked, Decoding(temperature=1.0)),
                        treatment_effects(aligned, asked[1:], prompts))
    assert set(EFFECTS) <= set(rows)
    assert rows.loc[rows["treatment"] == "untreated", "displacement"].isna().all()
    drawn = rows[rows["placebo"] == "noise"]
    assert drawn["placebo_seed"].unique().tolist() == [0, 1, 2]
    few = drawn["word_pair"].iloc[0]
    rows = rows[(rows["placebo"] != "noise") | (rows["word_pair"] == few)]    # noise was asked of fewer items
    (band,) = placebo_bands(rows).to_dict("records")
    shared = rows[rows["word_pair"] == few]
    rates = shared[shared["outcome"] != "invalid"].groupby("treatment", sort=False)["outcome"].apply(lambda o: (o == "stereotyped").mean())
    assert band["n"] == len(shared) / 5
    assert (band["untreated"], band["rate"]) == (rates["untreated"], rates[treatments["add"].name])
    each = [rates[one.name] for one in noise]
    assert [band[name] for name in ("noise", "noise_low", "noise_high")] == pytest.approx([np.mean(each), min(each), max(each)])
    assert band["noise_displacement"] == pytest.approx(band["displacement"], rel=0.006)
    assert band["draws"] == 3


def test_rows_of_a_former_version_have_no_bands():
    assert placebo_bands(pd.DataFrame({"treatment": ["untreated"], "kind": ["implicit"]})).empty
