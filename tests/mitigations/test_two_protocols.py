"""Steering and LoRA under either protocol, against plain transformers and a plain cross-entropy."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.mitigations.examples import Example, collate, encode
from alignblind_mi.mitigations.lora import LoraSettings, awareness_examples, train_lora
from alignblind_mi.mitigations.lora_settings import LoraError
from alignblind_mi.mitigations.steering import EditError, SteeringVectors, load_vectors, sense_steering, steering_vectors
from alignblind_mi.models.edits import LAST, Row, Site
from alignblind_mi.stimuli.prompts import implicit_prompts, steering_prompt

LAYERS = range(1, 3)


@pytest.fixture(scope="module")
def plain(llama3_folder):
    """The double of Llama 3 and its tokenizer as transformers loads them."""
    return AutoModelForCausalLM.from_pretrained(llama3_folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(llama3_folder)


# ---- steering ----------------------------------------------------------------------------------------------------------


def steered_by_hand(plain, prompt, words, phrase):
    """Next-token log-probabilities: at every token of a prompt that is " word", the streams of the phrase's " word", by plain hooks."""
    model, tokenizer = plain
    ids, source = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (prompt, phrase))
    with torch.no_grad():
        states = model(source, output_hidden_states=True).hidden_states
    own = [tokenizer(f"a {word}")["input_ids"][-1] for word in words]
    hooks = []
    for layer in LAYERS:
        def put(module, args, output, layer=layer):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for token in own:
                hidden[0, ids[0] == token] = states[layer + 1][0, source[0] == token].squeeze(0)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        hooks.append(model.model.layers[layer].register_forward_hook(put))
    try:
        with torch.no_grad():
            return model(ids).logits[0, -1].log_softmax(-1), int(sum((ids == token).sum() for token in own))
    finally:
        for hook in hooks:
            hook.remove()


def test_the_paper_edits_the_tokens_that_are_the_phrases_own(race, llama3, plain):
    treatment = sense_steering(llama3, race, "default", "race", LAYERS, protocol="paper")
    every = sense_steering(llama3, race, "default", "race", LAYERS)
    phrase, cue = steering_prompt(race, "default", "race").text, race.cue("default")
    for prompt in implicit_prompts(race, "default", design="published", max_word_pairs=1)[:4]:
        by_hand, tokens = steered_by_hand(plain, prompt.text, (cue.marked[0], cue.unmarked[0]), phrase)
        (row,), (other,) = (llama3.token_rows(one.rows([prompt])) for one in (treatment, every))
        assert (len(row.edits), len(other.edits)) == (2 * tokens, 2 * 4)
        assert tokens == 3, "one of the four mentions stands behind a bracket"
        found = llama3.next_log_probs(treatment.rows([prompt]))[0]
        assert float((found - by_hand).abs().max()) < 1e-4
        assert float((found - llama3.next_log_probs(every.rows([prompt]))[0]).abs().max()) > 1e-3
    assert treatment.details["protocol"] == "paper"
    assert every.details["protocol"] == "best"


def test_tokens_before_the_question_are_edited_too_as_by_the_released_script(race, llama3):
    treatment = sense_steering(llama3, race, "direct_color", "race", [1], protocol="paper")
    prompt = implicit_prompts(race, "direct_color", design="published", max_word_pairs=1)[0]
    assert len(llama3.token_rows(treatment.rows([prompt]))[0].edits) == 5
    assert len(llama3.token_rows(sense_steering(llama3, race, "direct_color", "race", [1]).rows([prompt]))[0].edits) == 4


def test_vectors_from_a_file_know_their_tokens_and_former_ones_are_refused(race, llama3, tmp_path):
    vectors = steering_vectors(llama3, race, "default", "race", "replacement", layers=[1])
    vectors.save(tmp_path / "v.safetensors")
    again = load_vectors(tmp_path / "v.safetensors").treatment(protocol="paper")
    assert [edit.site.ids for edit in again.edits] == [edit.site.ids for edit in vectors.treatment(protocol="paper").edits]
    former = SteeringVectors(vectors.layers, vectors.roles, vectors.vectors, "replacement", "race")
    assert former.treatment().edits
    with pytest.raises(EditError, match="do not say at which these were: find them anew"):
        former.treatment(protocol="paper")
    with pytest.raises(EditError, match="are directions: use the protocol 'best'"):
        SteeringVectors((1,), ("",), torch.ones(1, 1, 4), "pca", "race").treatment(protocol="paper")


@pytest.mark.parametrize("site", [{"mark": LAST}, {"mark": "marked", "occurrence": 0}])
def test_ids_go_with_a_mark_of_the_prompt_alone(site):
    with pytest.raises(EditError, match=r"ids .* choose among all tokens"):
        Site(0, ids=(7,), **site)


def test_a_prompt_without_the_mark_is_refused_though_ids_are_given(llama3, race):
    treatment = sense_steering(llama3, race, "default", "race", [1], protocol="paper")
    with pytest.raises(Exception, match="has no mark 'marked'"):
        llama3.next_log_probs([Row("black and white", treatment.edits)])


# ---- LoRA --------------------------------------------------------------------------------------------------------------


def loss_by_hand(plain, items):
    """Mean cross-entropy, one text at a time, and its gradient at the projections; `items`: (ids, how many tokens are not learnt)."""
    model, _ = plain
    weights = [p for name, p in model.named_parameters() if ".q_proj." in name or ".v_proj." in name]
    total = sum(len(ids) - n for ids, n in items)    # what is learnt of each
    loss = sum(torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, n - 1 : -1], torch.tensor(ids[n:]), reduction="sum")
               for ids, n in items) / total
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def of_ours(plain, learnt):
    """The same of the items that are trained on, in one batch, as transformers computes its loss."""
    model, _ = plain
    weights = [p for name, p in model.named_parameters() if ".q_proj." in name or ".v_proj." in name]
    loss = model(**collate(learnt.items, 0)).loss
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def test_the_paper_learns_every_token_and_no_end_token(race, plain, llama3_folder, tmp_path):
    _, tokenizer = plain
    examples = awareness_examples(race)[::60]
    own = [(tokenizer(e.text + e.completion)["input_ids"], 1) for e in examples]
    with torch.enable_grad():
        (loss, gradient), (found, ours) = loss_by_hand(plain, own), of_ours(plain, encode(tokenizer, examples, 256, protocol="paper"))
    assert found == pytest.approx(loss, abs=1e-4)
    assert float(torch.cosine_similarity(gradient, ours, dim=0)) == pytest.approx(1.0, abs=1e-5)
    settings = LoraSettings(epochs=1, batch_size=len(examples), accumulation=1, dropout=0.0)
    train_lora(str(llama3_folder), examples, "0", tmp_path / "a", settings=settings, protocol="paper")
    note = json.loads((tmp_path / "a" / "training.json").read_text())
    assert note["losses"][0] == pytest.approx(loss, abs=1e-3), "the first step's loss is the untreated model's own"
    assert note["protocol"] == "paper"
    with pytest.raises(LoraError, match="protocol is 'paper' there and 'best' here"):
        train_lora(str(llama3_folder), examples, "0", tmp_path / "a", settings=settings)
    assert {len(item["input_ids"]) for item in encode(tokenizer, examples, 5, protocol="paper").items} == {5}


def test_best_learns_the_completion_as_the_text_spells_it_and_the_end_token(race, plain):
    _, tokenizer = plain
    examples = awareness_examples(race)[::60]
    whole = [tokenizer(e.text + e.completion)["input_ids"] for e in examples]
    asked = [tokenizer(e.text.rstrip(" "))["input_ids"] for e in examples]    # the blank is a part of the first word that is learnt
    assert all(ids[: len(text)] == text for ids, text in zip(whole, asked, strict=True))
    own = [([*ids, tokenizer.eos_token_id], len(text)) for ids, text in zip(whole, asked, strict=True)]
    learnt = encode(tokenizer, examples, 256)
    with torch.enable_grad():
        (loss, gradient), (found, ours) = loss_by_hand(plain, own), of_ours(plain, learnt)
    assert found == pytest.approx(loss, abs=1e-4)
    assert float(torch.cosine_similarity(gradient, ours, dim=0)) == pytest.approx(1.0, abs=1e-5)
    first = {next(i for i in item["labels"] if i != -100) for item in learnt.items}
    assert all(tokenizer.decode([i]).startswith(" ") for i in first)


def test_an_identifier_is_found_in_the_whole_text(llama3, race):
    example = awareness_examples(race)[0]
    (item,) = encode(llama3.tokenizer, [example], 256, identifiers=True).items
    said = [llama3.tokenizer.decode([i]).strip() for i, here in zip(item["input_ids"], item["identifiers"], strict=True) if here]
    assert sorted(said) == sorted(example.text[span.start : span.end] for span in example.identifiers)
    (empty,) = encode(llama3.tokenizer, [Example("It is black", "")], 256).items    # a sentence alone: its end token is learnt
    assert [label for label in empty["labels"] if label != -100] == [llama3.tokenizer.eos_token_id]
