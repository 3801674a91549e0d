"""Steering vectors: found as their sources say, applied where they are asked to be, the same from a file, and without this project."""

from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.measures.behaviour import Decoding, ask, ask_under
from alignblind_mi.mitigations.placebos import noise_like
from alignblind_mi.mitigations.steering import SteeringVectors, load_vectors, steering_grid, steering_vectors
from alignblind_mi.models.edits import UNTREATED, EditError, Row, Site, Treatment, combine
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.models.model import load_model
from alignblind_mi.stimuli.concept import ConceptError
from alignblind_mi.stimuli.prompts import Prompt, implicit_prompts, mark

DIRECTIONS = ("mean_difference", "pca", "probe", "contrast", "noise")


@pytest.fixture(scope="module")
def aligned():
    return load_model("organism:aligned")


@pytest.fixture(scope="module")
def found(aligned, race):
    return {name: steering_vectors(aligned, race, "default", "race", name) for name in DIRECTIONS}


def cosine(a, b):
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_mean_difference_is_that_of_the_sentences_by_hand(aligned, race, found):
    means = {}
    for sense in ("race", "color"):
        rows = [(Row(mark(text.format(x=x, y=y), a=x, b=y))) for text in race.contexts[sense].train
                for x, y in (("black", "white"), ("white", "black"))]
        means[sense] = aligned.record(rows, [Site(3, "a"), Site(3, "b")]).mean((0, 1))
    assert torch.allclose(found["mean_difference"].vectors[3, 0], means["race"] - means["color"], atol=1e-5)


def test_contrast_differs_in_the_restatement_alone(aligned, race, found):
    data, (x, y) = race.awareness, ("black", "white")
    last = {sense: aligned.record([Row(Prompt((s + data.separator + end).format(x=x, y=y))) for s in data.sentences for end in endings],
                                  [Site(5, "last")])[:, 0].mean(0)
            for sense, endings in (("race", data.restatements), ("color", data.others))}
    assert torch.allclose(found["contrast"].vectors[5, 0], last["race"] - last["color"], atol=1e-3)


def test_directions_point_the_same_way_and_noise_does_not(found):
    mean = found["mean_difference"].vectors
    for name in ("pca", "probe"):
        assert min(cosine(a, b) for a, b in zip(found[name].vectors[1:], mean[1:], strict=True)) > 0.3, name
    pca, noise = found["pca"].vectors[:, 0], found["noise"].vectors[:, 0]
    assert torch.allclose((pca * mean[:, 0]).sum(-1), pca.square().sum(-1), rtol=1e-3)    # as long as the mean difference along it
    assert torch.allclose(noise.norm(dim=-1), mean[:, 0].norm(dim=-1), rtol=1e-4)
    assert abs(cosine(noise, mean)) < 0.2


def test_the_other_sense_is_the_opposite_direction(aligned, race, found):
    other = steering_vectors(aligned, race, "default", "color", "mean_difference", layers=[2])
    assert torch.allclose(other.vectors[0], -found["mean_difference"].vectors[2])


@pytest.mark.parametrize(("positions", "how"), list(product((("identifiers",), ("prompt",), ("last", "generated")), ("add", "ablate"))))
def test_a_treatment_edits_what_it_says(aligned, race, found, positions, how):
    vectors = found["mean_difference"]
    treatment = vectors.treatment([2], how=how, strength=0.5, positions=positions)
    prompt = implicit_prompts(race, "default")[0]
    (encoded,) = aligned.encode([prompt])
    (row,) = aligned.token_rows(treatment.rows([prompt]))
    n = len(encoded.ids)
    wanted = {("identifiers",): sorted(encoded.positions("marked") + encoded.positions("unmarked")), ("prompt",): list(range(1, n)),
              ("last", "generated"): [n - 1]}[positions]
    assert sorted(edit.at.position for edit in row.edits) == wanted
    assert len(row.later) == ("generated" in positions)
    assert {(edit.how, edit.strength) for edit in (*row.edits, *row.later)} == {(how, 0.5)}
    clean = aligned.record([Row(prompt)], [Site(2, "last")])[0, 0]
    edited = aligned.record(treatment.rows([prompt]), [Site(2, "last")])[0, 0]
    vector = vectors.vectors[2, 0]
    changed = clean + 0.5 * vector if how == "add" else clean - 0.5 * (clean @ vector) * vector / (vector @ vector)
    assert torch.allclose(edited, clean if positions == ("identifiers",) else changed, atol=1e-5)


def test_adding_towards_the_group_lowers_the_bias_and_noise_lowers_it_less(aligned, race, found):
    prompts = implicit_prompts(race, "default", design="balanced", max_word_pairs=3)
    mean = found["mean_difference"].treatment(range(1, 4), strength=1.0)
    treatments = [UNTREATED, mean, noise_like(aligned, mean, prompts), found["mean_difference"].treatment(range(5, 8))]
    rows = ask_under(aligned, race, prompts, treatments, Decoding(temperature=1.0))
    odds = rows.groupby("treatment", sort=False)["log_odds"].mean().tolist()
    assert odds[1] < odds[0] - 1
    assert odds[2] > odds[1] + 0.5    # noise that does as much breaks the reading, and so lowers the bias as well
    assert odds[3] == pytest.approx(odds[0], abs=0.5)    # late layers: planted without effect


def test_treatments_run_together_give_the_rows_of_each_alone(aligned, race, found):
    prompts = implicit_prompts(race, "default", max_word_pairs=1)
    treatments = [UNTREATED, *steering_grid(found["mean_difference"], [range(0, 2), range(2, 5)], [0.5, 2.0]),
                  Treatment("polite", prefix="Here are some words. "), found["contrast"].treatment([4])]
    assert len({treatment.name for treatment in treatments}) == len(treatments)
    decoding = Decoding(temperature=1.0, seed=3)
    together = ask_under(aligned, race, prompts, treatments, decoding)
    alone = [ask(aligned.under(treatment), race, prompts, decoding) for treatment in treatments]
    for one, (_, some) in zip(alone, together.groupby("treatment", sort=False), strict=True):
        assert one["answer"].tolist() == some["answer"].tolist()
        assert one["treatment"].tolist() == some["treatment"].tolist()
        torch.testing.assert_close(torch.tensor(one["log_odds"]), torch.tensor(some["log_odds"].to_numpy()), atol=1e-4, rtol=1e-4)


# ---- files -------------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_same_treatment(tmp_path, aligned, race, found):
    prompt = implicit_prompts(race, "default")[0]
    for vectors in (found["pca"], steering_vectors(aligned, race, "default", "race", "replacement", layers=[1, 2])):
        vectors.save(tmp_path / "v.safetensors")
        read = load_vectors(tmp_path / "v.safetensors")
        assert (read.method, read.sense, read.stream, read.layers, read.roles) == (
            vectors.method, "race", "resid_post", vectors.layers, vectors.roles)
        assert read.provenance["revision"] == aligned.fingerprint
        assert read.provenance["versions"]["torch"]
        one, two = (aligned.next_log_probs(v.treatment([2]).rows([prompt])) for v in (vectors, read))
        assert torch.equal(one, two)
        assert vectors.treatment([2]).name == read.treatment([2]).name


def test_a_file_steers_plain_transformers_without_this_project(tmp_path, aligned, found):
    found["mean_difference"].save(tmp_path / "v.safetensors")
    text = "Here are some words. Each word is black or white."
    folder = organism_path("aligned")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    vector = load_file(tmp_path / "v.safetensors")["layer.3"]    # as the docstring of `save` says
    hook = model.model.layers[3].register_forward_hook(lambda module, args, out: out + vector)
    with torch.no_grad():
        plain = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1].log_softmax(-1)
    hook.remove()
    treatment = found["mean_difference"].treatment([3], positions=("prompt",))
    with_bos = aligned.next_log_probs(treatment.rows([Prompt(text)]))[0]
    bos = aligned.tokenizer.bos_token
    own = aligned.next_log_probs(treatment.rows([Prompt(text)]))[0]
    assert torch.equal(with_bos, own)
    with torch.no_grad():
        ids = tokenizer(bos + text, return_tensors="pt", add_special_tokens=False).input_ids
        shift = torch.cat([torch.zeros(1, 1, len(vector)), vector.expand(1, ids.shape[1] - 1, -1)], 1)
        hook = model.model.layers[3].register_forward_hook(lambda module, args, out: out + shift)
        expected = model(ids).logits[0, -1].log_softmax(-1)
        hook.remove()
    assert (own - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-5    # the BOS token is no part of a prompt's text


def test_gguf_holds_the_directions_as_llama_cpp_reads_them(tmp_path, aligned, race, found):
    from gguf import GGUFReader

    vectors = found["mean_difference"]
    vectors.export_gguf(tmp_path / "v.gguf", strength=2.0)
    reader = GGUFReader(tmp_path / "v.gguf")
    assert [tensor.name for tensor in reader.tensors] == [f"direction.{layer}" for layer in range(1, 8)]
    assert torch.equal(torch.tensor(reader.tensors[2].data), 2 * vectors.vectors[3, 0])
    text = reader.fields["general.architecture"]
    assert bytes(text.parts[text.data[0]]).decode() == "controlvector"
    assert int(reader.fields["controlvector.layer_count"].parts[-1][0]) == 7
    with pytest.raises(EditError, match=r"adds one direction after a layer above 0"):
        steering_vectors(aligned, race, "default", "race", "replacement").export_gguf(tmp_path / "w.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["v.gguf"]


# ---- what cannot be --------------------------------------------------------------------------------------------------------


def test_combinations_carry_every_part(found):
    one = found["mean_difference"].treatment([1])
    both = combine(UNTREATED, one, Treatment("p", prefix="Hello. ", family="prompt"), Treatment("a", adapter="x", family="lora"))
    assert (both.edits, both.prefix, both.adapter, both.family) == (one.edits, "Hello. ", "x", "combined")
    assert combine(UNTREATED).family == "untreated"
    assert combine(one).family == "steering"
    with pytest.raises(EditError, match="two adapters cannot be on at once"):
        combine(both, Treatment("b", adapter="y"))


@pytest.mark.parametrize(("ask", "said"), [
    (lambda v: v.treatment([9]), r"of the layers 0-7, not 9"),
    (lambda v: v.treatment([1], how="replace"), "are directions: add or ablate"),
    (lambda v: v.treatment([1], positions=("words",)), "unknown positions 'words'"),
    (lambda v: v.treatment([1], positions=("prompt", "last")), "edited twice"),
])
def test_treatments_that_mean_nothing_are_refused(found, ask, said):
    with pytest.raises(EditError, match=said):
        ask(found["mean_difference"])


def test_vectors_that_cannot_be_found_are_refused(aligned, race, tmp_path):
    with pytest.raises(EditError, match="unknown method 'magic'"):
        steering_vectors(aligned, race, "default", "race", "magic")
    with pytest.raises(ConceptError, match="'random' is none of them"):
        steering_vectors(aligned, race, "default", "random", "pca")
    with pytest.raises(EditError, match="draws from several identifiers"):
        steering_vectors(aligned, race, "names", "race", "pca")
    replacement = steering_vectors(aligned, race, "default", "random", "replacement", layers=[1])
    with pytest.raises(EditError, match="are activations: replace by them"):
        replacement.treatment(how="add")
    with pytest.raises(EditError, match="can only replace identifiers"):
        replacement.treatment(positions=("prompt",))
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(EditError, match="no file of steering vectors"):
        load_vectors(tmp_path / "no.safetensors")


def test_a_text_is_given_one_dose_of_what_acts_at_its_end_and_after_it(found):
    one = found["contrast"].treatment([3, 4])
    (row,) = one.text_rows([Prompt("The garden is near the house.")])
    assert [(edit.site.layer, edit.site.mark) for edit in row.edits] == [(3, "prompt"), (4, "prompt")]
    assert len({edit.vector.data_ptr() for edit in one.edits}) == 2
    assert found["contrast"].treatment([0, 2]).details["layers"] == "0,2"


def test_a_window_of_one_layer_is_written_as_one():
    vectors = SteeringVectors((4, 5, 6), ("",), torch.ones(3, 1, 4), "mean_difference", "x")
    assert vectors.treatment(5).details["layers"] == "5"
    assert vectors.treatment([5, 6]).details["layers"] == "5-6"
    assert vectors.treatment([4, 6]).details["layers"] == "4,6"
