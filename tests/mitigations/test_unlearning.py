"""Unlearning: the losses are those of their papers, what is to be forgotten is, the rest is held, and gradient ascent ends in time."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.mitigations.examples import collate, encode
from alignblind_mi.mitigations.lora import awareness_examples
from alignblind_mi.mitigations.lora_settings import LoraError, LoraSettings
from alignblind_mi.mitigations.unlearning import Forgetting, UnlearningSettings, npo_loss, train_unlearning
from alignblind_mi.stimuli.concept import ConceptError

FAST = LoraSettings(epochs=2, batch_size=8, accumulation=2, learning_rate=5e-3, dropout=0.0)
SETTINGS = UnlearningSettings(lora=FAST, forget_bound=50.0)


@pytest.fixture(scope="module")
def small(race):
    """The concept with few sentences: training is short."""
    return replace(race, awareness=replace(race.awareness, sentences=race.awareness.sentences[:12]))


def test_npo_is_its_equation_and_gradient_ascent_in_the_limit():
    ratio = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    beta = 0.1
    by_hand = sum(2 / beta * torch.log1p(r.detach().exp() ** beta) for r in ratio) / 3
    assert npo_loss(ratio, beta).item() == pytest.approx(by_hand.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(npo_loss(ratio, beta), ratio)
    weight = 2 * ratio.detach().exp() ** beta / (1 + ratio.detach().exp() ** beta)    # eq. 4: the adaptive weight
    assert torch.allclose(grad, weight / 3, atol=1e-6)
    (limit,) = torch.autograd.grad(npo_loss(ratio, 1e-6), ratio)
    assert torch.allclose(limit, torch.full((3,), 1 / 3), atol=1e-4)
    assert npo_loss(torch.tensor([-400.0]), beta).item() < 1e-6


def pair(tiny_folder, small, *, init=False):
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder),
                           LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init))
    items = encode(tokenizer, awareness_examples(small)[:6], 99).items
    batch = collate([{**item, **{f"retain_{key}": value for key, value in item.items()}} for item in items], 0)
    return model.train(), batch


def language_model_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def test_gradient_ascent_turns_the_sign_of_the_language_model_loss(tiny_folder, small):
    model, batch = pair(tiny_folder, small)
    loss, _ = Forgetting("gradient_ascent", replace(SETTINGS, retain="none"))(model, batch, None, 0.5)
    assert loss.item() == pytest.approx(-0.5 * language_model_loss(model, batch).item(), rel=1e-4)


def test_npo_of_a_batch_compares_with_the_adapter_off(tiny_folder, small):
    model, batch = pair(tiny_folder, small)
    loss, _ = Forgetting("npo", replace(SETTINGS, retain="none", beta=0.5))(model, batch, None, 1.0)
    ratios = []
    for row in range(len(batch["labels"])):
        total = {}
        for name, off in (("on", False), ("off", True)):
            with torch.no_grad(), model.disable_adapter() if off else nullcontext():
                found = model(input_ids=batch["input_ids"][row:row + 1],
                              attention_mask=batch["attention_mask"][row:row + 1]).logits[0].log_softmax(-1)
            labels = batch["labels"][row]
            total[name] = sum(float(found[i - 1, label]) for i, label in enumerate(labels.tolist()) if label != -100)
        ratios.append(total["on"] - total["off"])
    assert max(map(abs, ratios)) > 0.1
    assert loss.item() == pytest.approx(npo_loss(torch.tensor(ratios), 0.5).item(), rel=1e-4)
    fresh, batch = pair(tiny_folder, small, init=True)    # an adapter that does nothing yet: the reference itself
    assert Forgetting("npo", replace(SETTINGS, retain="none"))(fresh, batch, None, 1.0)[0].item() == pytest.approx(20 * 0.693147, rel=1e-4)


def test_the_retain_terms_are_a_divergence_or_a_loss(tiny_folder, small):
    model, batch = pair(tiny_folder, small)
    bare = Forgetting("npo", replace(SETTINGS, retain="none"))(model, batch, None, 1.0)[0]
    by_loss = Forgetting("npo", replace(SETTINGS, retain="ce", retain_weight=2.0))(model, batch, None, 1.0)[0]
    assert (by_loss - bare).item() == pytest.approx(2 * language_model_loss(model, batch).item(), rel=1e-4)
    by_kl = Forgetting("npo", replace(SETTINGS, retain="kl", retain_weight=2.0))(model, batch, None, 1.0)[0]
    here = batch["labels"][:, 1:] != -100
    ask = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    own = model(**ask).logits[:, :-1][here].log_softmax(-1)
    with model.disable_adapter():
        theirs = model(**ask).logits[:, :-1][here].log_softmax(-1)
    assert (by_kl - bare).item() == pytest.approx(2 * (theirs.exp() * (theirs - own)).sum(-1).mean().item(), rel=1e-3)
    assert model.training
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora" in name)


@pytest.fixture(scope="module")
def forgotten(tiny_folder, small, tmp_path_factory):
    out, found = tmp_path_factory.mktemp("unlearning"), {}
    for name, method, changed in (("npo", "npo", {}), ("ascent", "gradient_ascent", {"retain": "none"}),
                                  ("held", "gradient_ascent", {"retain": "kl", "retain_weight": 20.0})):
        treatment = train_unlearning(str(tiny_folder), small, out / name, method=method, settings=replace(SETTINGS, **changed))
        found[name] = (treatment, json.loads((out / name / "training.json").read_text()))
    return out, found


def test_what_is_to_be_forgotten_becomes_less_likely(forgotten, tiny_folder, small):
    out, found = forgotten
    for name, (treatment, note) in found.items():
        assert note["forget_loss"]["after"] > note["forget_loss"]["before"] + 0.3, name
        assert treatment.family == "unlearning"
        assert treatment.details["method"] == note["method"] == ("npo" if name == "npo" else "gradient_ascent")
        assert treatment.details["layers"] == "0-3"
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(base, str(out / "npo")).eval()
    items = encode(tokenizer, awareness_examples(small), 99).items
    with torch.no_grad():
        assert float(language_model_loss(model, collate(items, 0))) == pytest.approx(found["npo"][1]["forget_loss"]["after"], abs=1e-3)


def test_the_retain_term_holds_the_rest(forgotten, tiny_folder, small):
    out, found = forgotten

    def moved(name):
        from alignblind_mi.mitigations.lora import placebo_examples

        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        batch = collate(encode(tokenizer, placebo_examples(small), 99).items, 0)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(out / name)).eval()
        with torch.no_grad():
            own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
            with model.disable_adapter():
                theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        here = batch["labels"][:, 1:] != -100
        return float((theirs.exp() * (theirs - own)).sum(-1)[:, :-1][here].mean())

    assert moved("held") < 0.5 * moved("ascent")
    assert moved("held") == pytest.approx(found["held"][1]["retain_kl"], rel=0.1)
    assert "retain_kl" not in found["ascent"][1]


def test_gradient_ascent_ends_at_its_bound(tiny_folder, small, tmp_path):
    start = 6.0    # the untreated loss is a little below
    settings = replace(SETTINGS, forget_bound=start + 3, retain="none", lora=replace(FAST, learning_rate=2e-2, epochs=20))
    train_unlearning(str(tiny_folder), small, tmp_path / "ga", method="gradient_ascent", settings=settings)
    note = json.loads((tmp_path / "ga" / "training.json").read_text())
    assert note["steps"] < note["steps_planned"]
    assert note["forget_loss"]["before"] < settings.forget_bound
    assert start < note["forget_loss"]["after"] < 3 * settings.forget_bound
    again = train_unlearning(str(tiny_folder), small, tmp_path / "ga", method="gradient_ascent", settings=settings)
    assert again.details["seconds"] == str(note["seconds"])


def test_killed_unlearning_goes_on_to_the_very_same_weights(tiny_folder, small, tmp_path, forgotten, monkeypatch):
    from test_lora import Killed, kill_at

    with monkeypatch.context() as patch:
        kill_at(patch, 15)
        with pytest.raises(Killed):
            train_unlearning(str(tiny_folder), small, tmp_path / "npo", settings=SETTINGS)
    assert list((tmp_path / ".npo.part").glob("checkpoint-*/optimizer.safetensors"))
    train_unlearning(str(tiny_folder), small, tmp_path / "npo", settings=SETTINGS)
    name = "adapter_model.safetensors"
    assert (tmp_path / "npo" / name).read_bytes() == (forgotten[0] / "npo" / name).read_bytes()


@pytest.mark.parametrize(("make", "said"), [
    (lambda: UnlearningSettings(retain="l2"), "unknown retain 'l2'"), (lambda: UnlearningSettings(beta=0.0), "beta must be above 0"),
    (lambda: UnlearningSettings(lora=replace(FAST, validation_share=0.1)), "no best epoch")])
def test_settings_that_make_no_sense_are_one_sentence(make, said):
    with pytest.raises(LoraError, match=said):
        make()


def test_unlearning_without_its_data_is_one_sentence(tiny_folder, small, race, tmp_path):
    with pytest.raises(LoraError, match="unknown unlearning method 'forget'"):
        train_unlearning(str(tiny_folder), small, tmp_path / "x", method="forget")
    without = replace(race, awareness=replace(race.awareness, others=()))
    with pytest.raises(ConceptError, match="no restatements of the other sense"):
        train_unlearning(str(tiny_folder), without, tmp_path / "x", settings=replace(SETTINGS, retain_on="others"))
