"""LoRA: what it learns from, where it is trained, how it survives a kill, and what the activation loss and the validation split do."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.mitigations import trainer as trainer_module
from alignblind_mi.mitigations.examples import Example, encode, split_examples
from alignblind_mi.mitigations.finetuning import trained_treatment
from alignblind_mi.mitigations.lora import awareness_examples, blindness_examples, lora_sweep, placebo_examples, sweep_names, train_lora
from alignblind_mi.mitigations.lora_settings import PAPER, LoraError, LoraSettings, check_modules, choose_layers, layers_text
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.stimuli.concept import ConceptError
from alignblind_mi.stimuli.prompts import Span

SETTINGS = LoraSettings(epochs=3, batch_size=8, accumulation=2, learning_rate=1e-2)


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# ---- data --------------------------------------------------------------------------------------------------------------


def test_the_mirror_image_differs_in_its_completions_only(race):
    aware, blind = awareness_examples(race), blindness_examples(race)
    assert [e.text for e in aware] == [e.text for e in blind]
    assert all("color" in e.completion and "people" not in e.completion for e in blind)
    with pytest.raises(ConceptError, match="no restatements of the other sense"):
        blindness_examples(replace(race, awareness=replace(race.awareness, others=())))
    with pytest.raises(ConceptError, match=r"no \[awareness\]"):
        blindness_examples(replace(race, awareness=None))


def test_the_placebo_names_the_identifiers_and_nothing_else(race):
    placebo, aware = placebo_examples(race), awareness_examples(race)
    assert [e.text for e in placebo] == [e.text for e in aware]
    assert {e.completion for e in placebo} == {"black.", "white.", "black white.", "white black."}
    for ours, theirs in zip(placebo, aware, strict=True):    # in the order of the restatement
        assert ours.completion.rstrip(".").split() == list(dict.fromkeys(re.findall("black|white", theirs.completion)))


def test_identifiers_are_marked_in_the_text(race):
    for example in (*awareness_examples(race), *placebo_examples(race)):
        assert sorted(example.text[s.start:s.end] for s in example.identifiers) == ["black", "white"]


def test_an_identifier_of_several_tokens_is_read_at_its_last(llama3):
    example = Example("Choose Tremayne or white.", "x", (Span(7, 15), Span(19, 24)))
    (item,) = encode(llama3.tokenizer, [example], 99, identifiers=True).items
    out = llama3.tokenizer(example.text, return_offsets_mapping=True)
    ends = [out["offset_mapping"][i][1] for i, here in enumerate(item["identifiers"]) if here]
    assert ends == [15, 24]
    assert sum(a < 15 and b > 7 for a, b in out["offset_mapping"]) > 1


# ---- where -------------------------------------------------------------------------------------------------------------


def test_layers_are_a_group_a_text_or_numbers():
    assert choose_layers("early", 8) == [0, 1, 2, 3, 4]
    assert choose_layers("0-3, 7", 8) == choose_layers([7, 0, 1, 2, 3, 3], 8) == [0, 1, 2, 3, 7]
    assert layers_text([7, 0, 1, 2, 3]) == "0-3,7"
    for wrong, said in (("deep", "neither a group"), ("3-", "neither a group"), ("0-8", "layer 8 does not exist"), ([], "no layers"),
                        ([-1], "layer -1 does not exist"), ("3-1", "no layers")):
        with pytest.raises(LoraError, match=said):
            choose_layers(wrong, 8)


def test_a_projection_that_is_not_there_is_named_before_weights_are_loaded(race, tiny_folder, tmp_path):
    check_modules(ModelSpec(str(tiny_folder)), ("q_proj", "down_proj"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())    # no weights
    with pytest.raises(LoraError, match=r"no projection 'c_attn'. Known: down_proj, gate_proj, .*v_proj"):
        train_lora(str(tmp_path / "bare"), awareness_examples(race), [0], tmp_path / "x", settings=replace(SETTINGS, modules=("c_attn",)))
    with pytest.raises(LoraError, match="layer 9 does not exist"):
        train_lora(str(tmp_path / "bare"), awareness_examples(race), [9], tmp_path / "x")


def test_any_modules_and_layers_are_trained(race, tiny_folder, tmp_path):
    from safetensors.torch import load_file

    treatment = train_lora(str(tiny_folder), awareness_examples(race)[::40], "0,2-3", tmp_path / "some",
                           settings=replace(SETTINGS, epochs=1, modules=("down_proj", "k_proj")))
    names = [name.split("layers.")[1].split(".") for name in load_file(tmp_path / "some" / "adapter_model.safetensors")]
    assert {(int(name[0]), name[2]) for name in names} == {(i, m) for i in (0, 2, 3) for m in ("down_proj", "k_proj")}
    assert treatment.details["layers"] == "0,2-3"


@pytest.mark.parametrize(("changed", "said"), [({"rank": 0}, "rank must be"), ({"modules": ()}, "modules is empty"),
                                               ({"validation_share": 1.0}, "below 1"), ({"patience": 2}, "needs validation_share"),
                                               ({"activation_weight": -1.0}, "not be negative"), ({"learning_rate": 0.0}, "above 0")])
def test_settings_that_make_no_sense_are_one_sentence(changed, said):
    with pytest.raises(LoraError, match=said):
        LoraSettings(**changed)


def test_the_paper_s_settings_have_a_name():
    assert LoraSettings() == PAPER
    assert (PAPER.rank, PAPER.alpha, PAPER.learning_rate, PAPER.epochs) == (4, 32, 2e-4, 7)


# ---- a kill ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def kill_at(monkeypatch, step):
    """Training ends at this call of the training step, as by a kill."""
    own, calls = trainer_module.ResumableTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return own(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.ResumableTrainer, "training_step", training_step)
    return calls


def train_and_kill(monkeypatch, step, *args, settings):
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train_lora(*args, settings=settings)


HELD = replace(SETTINGS, validation_share=0.2)


@pytest.fixture(scope="module")
def whole(race, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "lora"
    train_lora(str(tiny_folder), awareness_examples(race)[::5], "early", out, settings=HELD)
    return out


def note(folder):
    found = json.loads((folder / "training.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


@pytest.mark.parametrize("step", [13, 25])
def test_killed_training_goes_on_to_the_very_same_weights(race, tiny_folder, tmp_path, whole, monkeypatch, step):
    args = (str(tiny_folder), awareness_examples(race)[::5], "early", tmp_path / "lora")
    train_and_kill(monkeypatch, step, *args, settings=HELD)
    part = tmp_path / ".lora.part"
    assert not (tmp_path / "lora").exists()
    last = part / f"checkpoint-{5 * ((step - 1) // 10)}"
    assert (last / "optimizer.safetensors").is_file()
    assert {p.suffix for p in part.rglob("*") if p.is_file()} == {".safetensors", ".json", ".md"}    # no pickle
    with monkeypatch.context() as patch:
        calls = kill_at(patch, 10**9)
        train_lora(*args, settings=HELD)
    assert len(calls) == 30 - (step - 1) // 10 * 10    # ten batches an epoch: none of a finished one again
    assert weights(tmp_path / "lora") == weights(whole)
    assert note(tmp_path / "lora") == note(whole)
    assert not part.exists()
    assert not list((tmp_path / "lora").glob("checkpoint*"))
    assert {p.name for p in (tmp_path / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "training.json"}


def test_a_checkpoint_that_was_cut_off_is_not_used(race, tiny_folder, tmp_path, whole, monkeypatch):
    args = (str(tiny_folder), awareness_examples(race)[::5], "early", tmp_path / "lora")
    train_and_kill(monkeypatch, 25, *args, settings=HELD)
    last = tmp_path / ".lora.part" / "checkpoint-10"
    (last / "whole.json").unlink()
    (last / "optimizer.safetensors").write_bytes(b"")
    train_lora(*args, settings=HELD)
    assert weights(tmp_path / "lora") == weights(whole)


def test_a_kill_after_the_last_epoch_trains_nothing_again(race, tiny_folder, tmp_path, whole, monkeypatch):
    import alignblind_mi.mitigations.finetuning as finetuning

    args = (str(tiny_folder), awareness_examples(race)[::5], "early", tmp_path / "lora")
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "_losses", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train_lora(*args, settings=HELD)
    with monkeypatch.context() as patch:
        assert not kill_at(patch, 1)
        train_lora(*args, settings=HELD)
    assert weights(tmp_path / "lora") == weights(whole)


def test_a_part_of_other_settings_is_begun_anew(race, tiny_folder, tmp_path, whole, monkeypatch):
    args = (str(tiny_folder), awareness_examples(race)[::5], "early", tmp_path / "lora")
    train_and_kill(monkeypatch, 13, *args, settings=replace(HELD, seed=1))
    train_lora(*args, settings=HELD)
    assert weights(tmp_path / "lora") == weights(whole)


def test_a_finished_adapter_of_another_training_is_not_passed_off(race, tiny_folder, whole):
    with pytest.raises(LoraError, match=r": settings.rank is 4 there and 8 here. Give"):
        train_lora(str(tiny_folder), awareness_examples(race)[::5], "early", whole, settings=replace(HELD, rank=8))
    with pytest.raises(LoraError, match="data is"):
        train_lora(str(tiny_folder), awareness_examples(race)[::6], "early", whole, settings=HELD)


def test_one_process_trains_in_a_folder_at_a_time(race, tiny_folder, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".lora.lock"), pytest.raises(LoraError, match="another process is training"):
        train_lora(str(tiny_folder), awareness_examples(race)[::40], "early", tmp_path / "lora", settings=SETTINGS)
    train_lora(str(tiny_folder), awareness_examples(race)[::40], "early", tmp_path / "lora", settings=replace(SETTINGS, epochs=1))
    assert {p.name for p in tmp_path.iterdir()} == {"lora"}


def test_a_folder_that_cannot_be_written_is_one_sentence(race, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraError, match="cannot write"):
        train_lora(str(tiny_folder), awareness_examples(race)[::40], "early", tmp_path / "file" / "lora", settings=SETTINGS)


def test_a_full_disk_keeps_the_epochs_that_are_whole(race, tiny_folder, tmp_path, whole, monkeypatch):
    args, own, calls = (str(tiny_folder), awareness_examples(race)[::5], "early", tmp_path / "lora"), trainer_module.save_file, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > 3:    # two files a checkpoint: the second one is not finished
            raise OSError(28, "No space left on device")
        own(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "save_file", full)
        with pytest.raises(LoraError, match="No space left"):
            train_lora(*args, settings=HELD)
    assert (tmp_path / ".lora.part" / "checkpoint-5" / "whole.json").is_file()
    train_lora(*args, settings=HELD)
    assert weights(tmp_path / "lora") == weights(whole)


def test_details_are_read_from_the_folder(race, tiny_folder, whole):
    again = train_lora(str(tiny_folder), awareness_examples(race)[::5], "early", whole, settings=HELD)
    found = json.loads((whole / "training.json").read_text())
    assert again.details == trained_treatment(whole).details == {
        "method": "aware", "protocol": "best", "layers": "0-2", "parameters": str(found["parameters"]), "seconds": str(found["seconds"]),
        "folder": str(whole)}
    assert found["parameters"] == 3 * (4 * (32 + 32) + 4 * (32 + 16))
    with pytest.raises(LoraError, match="no adapter that was trained here"):
        trained_treatment(tiny_folder)
    with pytest.raises(LoraError, match="no full stop"):
        train_lora(str(tiny_folder), awareness_examples(race), "early", whole.with_name("v1.0"))


# ---- validation --------------------------------------------------------------------------------------------------------


def test_no_sentence_is_on_both_sides_of_the_split(race):
    train, held = split_examples(awareness_examples(race), 0.1, seed=3)
    assert len(held) == 48
    assert not {e.source for e in train} & {e.source for e in held}
    assert len(train) + len(held) == 480
    assert split_examples(awareness_examples(race), 0.1, seed=3)[1] == held != split_examples(awareness_examples(race), 0.1, seed=4)[1]
    with pytest.raises(LoraError, match="at least two sentences"):
        split_examples(awareness_examples(race)[:8], 0.5, seed=0)


def test_the_best_epoch_is_kept_and_training_stops_early(race, tiny_folder, tmp_path):
    settings = replace(HELD, epochs=12, learning_rate=0.3, patience=1, dropout=0.0)    # far too fast: it soon gets worse
    treatment = train_lora(str(tiny_folder), awareness_examples(race)[::5], "early", tmp_path / "lora", settings=settings)
    found = json.loads((tmp_path / "lora" / "training.json").read_text())
    losses = found["validation_losses"]
    assert len(losses) == found["best_epoch"] + 1 < 12
    assert losses[found["best_epoch"] - 1] == min(losses)
    assert validation_loss(tiny_folder, tmp_path / "lora", race, settings) == pytest.approx(min(losses), abs=1e-3)
    assert treatment.family == "lora"


def validation_loss(base, adapter, race, settings):
    """Measured anew, one example at a time, on the saved adapter: mean over tokens of each batch as the Trainer's, so batch by batch."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    _, held = split_examples(awareness_examples(race)[::5], settings.validation_share, settings.seed)
    items, batches = encode(tokenizer, held, 256).items, []
    for start in range(0, len(items), settings.batch_size):
        chunk, total, count = items[start:start + settings.batch_size], 0.0, 0
        for item in chunk:
            with torch.no_grad():
                logits = model(torch.tensor([item["input_ids"]])).logits[0]
            for i, label in enumerate(item["labels"]):
                if label != -100:
                    total, count = total - float(logits[i - 1].log_softmax(-1)[label]), count + 1
        batches += [total / count] * len(chunk)
    return sum(batches) / len(batches)


# ---- activation loss ---------------------------------------------------------------------------------------------------


def test_the_activation_loss_raises_the_reading_on_held_out_sentences(race, tiny_folder, tmp_path):
    from peft import PeftModel

    from alignblind_mi.mitigations.examples import collate
    from alignblind_mi.mitigations.lora import _contexts
    from alignblind_mi.mitigations.sense_loss import SenseLoss, find_reading

    plain = replace(HELD, epochs=4)
    raised = replace(plain, activation_weight=3.0, activation_layers=(1, 2))
    for name, settings in (("plain", plain), ("raised", raised)):
        treatment = train_lora(str(tiny_folder), awareness_examples(race)[::5], "early", tmp_path / name, settings=settings, concept=race)
        assert treatment.details["method"] == ("aware+activation" if name == "raised" else "aware")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    reading = find_reading(model, tokenizer, *_contexts(race), [1, 2])
    loss = SenseLoss(reading, 1.0)
    _, held = split_examples(awareness_examples(race)[::5], HELD.validation_share, HELD.seed)
    batch = collate(encode(tokenizer, held, 256, identifiers=True).items, 0)
    scores = {}
    for name in ("plain", "raised"):
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(tmp_path / name)).eval()
        with torch.no_grad():
            scores[name] = loss.facts(peft, [batch])["activation"]
    for layer in (0, 1):
        gains = {name: found["score_after"][layer] - found["score_before"][layer] for name, found in scores.items()}
        assert gains["raised"] > gains["plain"] + 0.2
    saved = json.loads((tmp_path / "raised" / "training.json").read_text())["activation"]
    assert saved["layers"] == [1, 2]
    assert saved["score_after"] == pytest.approx(scores["raised"]["score_after"], abs=1e-3)


def test_the_scale_of_the_reading_is_that_of_the_class_means(race, tiny_folder):
    from alignblind_mi.mitigations.lora import _contexts
    from alignblind_mi.mitigations.sense_loss import SenseLoss, _at_identifiers, find_reading

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    group, other = _contexts(race)
    reading = find_reading(model, tokenizer, group, other, [0, 3])
    means = [SenseLoss(reading, 1.0).scores(_at_identifiers(model, tokenizer, side, [0, 3])).mean(0) for side in (other, group)]
    assert torch.allclose(torch.stack(means), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-3)
    first = tokenizer(group[0].text, return_offsets_mapping=True)
    at = [i for i, (a, b) in enumerate(first["offset_mapping"]) for s in group[0].identifiers if a < s.end == b]
    with torch.no_grad():
        states = model(torch.tensor([first["input_ids"]]), output_hidden_states=True).hidden_states[1][0, at]
    assert torch.allclose(_at_identifiers(model, tokenizer, group[:1], [0])[:, 0], states, atol=1e-5)


def test_an_activation_loss_without_a_concept_is_one_sentence(race, tiny_folder, tmp_path):
    with pytest.raises(LoraError, match="needs the concept"):
        train_lora(str(tiny_folder), awareness_examples(race), [0], tmp_path / "x", settings=replace(SETTINGS, activation_weight=1.0))
    with pytest.raises(LoraError, match="not with blind"):
        train_lora(str(tiny_folder), blindness_examples(race), [0], tmp_path / "x", settings=replace(SETTINGS, activation_weight=1.0),
                   concept=race, kind="blind")
    with pytest.raises(LoraError, match="layer 7 does not exist"):
        train_lora(str(tiny_folder), awareness_examples(race), [0], tmp_path / "x", concept=race,
                   settings=replace(SETTINGS, activation_weight=1.0, activation_layers=(7,)))


# ---- sweeps ------------------------------------------------------------------------------------------------------------


def test_a_sweep_trains_each_setting_in_its_own_folder(race, tiny_folder, tmp_path):
    settings = [replace(SETTINGS, epochs=1, rank=rank, learning_rate=rate) for rank, rate in ((2, 0.001), (4, 0.001))]
    found = list(lora_sweep(str(tiny_folder), placebo_examples(race)[::20], "late", tmp_path, settings, kind="placebo"))
    assert [t.name for t in found] == ["rank2_learning_rate0p001", "rank4_learning_rate0p001"]
    assert all((tmp_path / t.name / "adapter_model.safetensors").is_file() for t in found)
    assert [t.family for t in found] == ["placebo"] * 2
    assert int(found[1].details["parameters"]) == 2 * int(found[0].details["parameters"])
    assert sweep_names([SETTINGS, replace(SETTINGS, dropout=0.25)])[1] == "rank4_dropout0p25_learning_rate0p01"
    with pytest.raises(LoraError, match="two settings of the sweep are the same"):
        lora_sweep(str(tiny_folder), placebo_examples(race), "late", tmp_path, [SETTINGS, SETTINGS])


# ---- the command line --------------------------------------------------------------------------------------------------


def test_the_verb_trains_and_merges_and_says_what_it_did(tiny_folder, tmp_path):
    from typer.testing import CliRunner

    from alignblind_mi.__main__ import app

    out, merged = tmp_path / "adapter", tmp_path / "merged"
    asked = ["--model", str(tiny_folder), "--layers", "0,2", "--kind", "blind", "--epochs", "1", "--rank", "2", "--learning-rate", "0.002"]
    found = CliRunner().invoke(app, ["lora", *asked, "--seed", "3", "--out", str(out), "--merge", str(merged)], catch_exceptions=False)
    note = json.loads((out / "training.json").read_text())
    assert (note["method"], note["layers"], note["settings"]["rank"], note["settings"]["seed"]) == ("blind", [0, 2], 2, 3)
    assert note["settings"] == json.loads(json.dumps(asdict(replace(PAPER, epochs=1, rank=2, learning_rate=2e-3, seed=3))))
    for said in (str(out), f"parameters: {note['parameters']:,}", f"loss by epoch: {note['losses'][0]:.3f}", f"checkpoint: {merged}"):
        assert said in found.stdout
    assert (merged / "model.safetensors").is_file()
    assert "Example: alignblind lora" in CliRunner().invoke(app, ["lora", "--help"], env={"COLUMNS": "200"}).stdout


def test_the_verb_takes_an_organism_s_recommendation():
    from alignblind_mi.models.embedded import organism_info
    from alignblind_mi.studies.config import recommended_lora

    advised, record = recommended_lora(ModelSpec("organism:aligned"), 5), organism_info()["lora"]
    assert (advised.rank, advised.learning_rate, advised.seed) == (record["rank"], record["learning_rate"], 5)
    assert recommended_lora(ModelSpec("gpt2"), 0) == PAPER


def test_the_verb_s_errors_come_before_the_weights(tmp_path):
    from alignblind_mi.commands.lora import lora
    from alignblind_mi.errors import AlignblindError

    with pytest.raises(AlignblindError, match="unknown kind 'deaf'"):
        lora(kind="deaf")
    with pytest.raises(AlignblindError, match="is there already"):
        lora(merge=tmp_path)
    with pytest.raises(AlignblindError, match="neither a group"):
        lora(layers="top", out=tmp_path / "x")
