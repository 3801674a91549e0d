"""The doctor: a sound model passes, and doubles made to fail each check are found, with what to do; weights are not loaded in vain."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doubles import CHAT, make_adapter, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.errors import AlignblindError
from alignblind_mi.models.engine import Engine
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.studies.doctor import Check, check_up, checking
from alignblind_mi.studies.doctor.with_weights import Answers, Loaded, answers_of, bridge_checks, drift_checks, lens_checks
from alignblind_mi.studies.doctor.without_weights import DRIFT_PROMPTS, Subject, offsets_checks


def statuses(found) -> dict[str, str]:
    return dict(zip(found["check"], found["status"], strict=True))


def before(folder, race, cue="default") -> dict[str, Check]:
    """The checks that need no weights."""
    subject = Subject(ModelSpec(str(folder)).resolved(), race, race.cue(cue))
    return {made.check: made for name, check in checking.BEFORE.items() for made in checking._tried(name, check, subject)}


@pytest.fixture
def copy(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def edit_json(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.slow
def test_the_embedded_pair_passes_all_checks():
    found = check_up("organism:aligned")
    assert set(found["status"]) == {"ok", "skipped"}
    assert found.loc[found["status"] == "skipped", "check"].tolist() == ["chat template", "adapter"]
    measured = found[found["unit"] == "nats"]
    assert (measured["measured"] < 1e-4).all()
    assert (measured["measured"] > 0).any(), "other computations of the same differ by rounding"
    assert not found["advice"].any(), "there is nothing to do"


def test_a_model_with_its_adapter_passes(tiny_folder, tmp_path):
    said = []
    found = check_up(str(tiny_folder), adapter=make_adapter(tiny_folder, tmp_path / "mine", 0), drift=False, progress=said.append)
    assert statuses(found)["adapter off"] == statuses(found)["adapter on"] == statuses(found)["adapter merged"] == "ok"
    assert found.loc[found["check"] == "adapter on", "rule"].item() == ">="
    assert not (found["status"] == "fail").any(), found[found["status"] == "fail"].to_string()
    assert said[0] == "tokenizer: ok"


def test_an_adapter_that_does_nothing_or_is_never_off_is_found(tiny_folder, tmp_path, monkeypatch):
    empty = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=4, target_modules=["q_proj"]))
    empty.save_pretrained(tmp_path / "empty")
    found = check_up(str(tiny_folder), adapter=tmp_path / "empty", drift=False).set_index("check")
    assert found.loc["adapter on", "status"] == "fail"
    assert "does nothing" in found.loc["adapter on", "advice"]
    monkeypatch.setattr("alignblind_mi.models.model.switched", lambda peft, name: __import__("contextlib").nullcontext())
    monkeypatch.setattr("alignblind_mi.models.adapters.switch", lambda peft, name: None)
    found = check_up(str(tiny_folder), adapter=make_adapter(tiny_folder, tmp_path / "on", 1), drift=False).set_index("check")
    assert found.loc["adapter", "status"] == "fail"
    assert "even while it is off" in found.loc["adapter", "found"]


@pytest.mark.parametrize(("template", "status"), [("<bos> <bos> $A", "fail"), ("$A <bos>", "warn"), ("$A", "warn"), ("<bos> $A", "ok")])
def test_bos_once_at_the_start(template, status, copy, race):
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 1)])
    tokenizer.save_pretrained(copy)
    check = before(copy, race)["bos"]
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


def test_the_chat_template_is_read_as_transformers_reads_it(llama3_folder, race, tmp_path):
    checks = before(llama3_folder, race)
    assert checks["chat template"].status == "ok"
    assert "bos in chat" not in checks
    assert checks["end of turn"].status == "ok"
    folder = shutil.copytree(llama3_folder, tmp_path / "late")
    for file in folder.glob("chat_template*"):
        file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(llama3_folder)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    tokenizer.save_pretrained(folder)
    edit_json(folder / "generation_config.json", lambda data: data.update(eos_token_id=[128_001]))
    checks = before(folder, race)
    assert (checks["bos in chat"].status, checks["bos in chat"].measured) == ("warn", 2.0)
    assert checks["chat template"].status == "ok", "transformers reads it twice, too"
    assert checks["end tokens"].status == "ok"    # the tokenizer names the other one
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    tokenizer.save_pretrained(folder)
    assert "no system" in before(folder, race)["chat template"].found


def test_an_end_of_turn_that_is_no_end_token_is_a_warning(llama3_folder, race, tmp_path):
    folder = shutil.copytree(llama3_folder, tmp_path / "turns")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.save_pretrained(folder)
    edit_json(folder / "generation_config.json", lambda data: data.update(eos_token_id=128_001))
    checks = before(folder, race)
    assert checks["end of turn"].status == "warn"
    assert "<|eot_id|>" in checks["end of turn"].found


def test_answers_without_an_end_are_found(copy, race):
    edit_json(copy / "generation_config.json", lambda data: data.pop("eos_token_id"))
    edit_json(copy / "tokenizer_config.json", lambda data: data.update(eos_token=None, pad_token=None))
    edit_json(copy / "config.json", lambda data: data.update(eos_token_id=None))
    checks = before(copy, race)
    assert (checks["end tokens"].status, checks["end tokens"].measured) == ("fail", 0.0)
    assert checks["padding token"].status == "warn"


def test_tokens_without_an_embedding_are_found(copy, race):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(copy)
    checks = before(copy, race)
    assert checks["tokenizer"].status == checks["padding token"].status == "fail"
    assert "resize" in checks["tokenizer"].advice


def test_unknown_identifiers_are_found_before_weights_are_loaded(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(checking, "load_model", never)
    found = check_up("organism:aligned", cue="names").set_index("check")
    assert found.loc["identifiers", "status"] == found.loc["texts", "status"] == "fail"
    assert "unknown to the tokenizer" in found.loc["identifiers", "found"]
    assert found.loc["engine", "status"] == found.loc["drift", "status"] == "skipped"
    assert "identifiers" in found.loc["engine", "found"]


def test_identifiers_of_several_tokens_are_a_warning_and_senses_of_several_a_failure(llama3_folder, race):
    checks = before(llama3_folder, race, "names")
    assert checks["identifiers"].status == "warn"
    assert checks["identifiers"].measured > 1
    split = replace(race, senses={**race.senses, race.group_sense: replace(race.senses[race.group_sense], word=" skin colour of people")})
    assert before(llama3_folder, split)["sense words"].status == "fail"


def test_a_tokenizer_that_loses_capitals_is_found(copy, race):
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(copy)
    checks = before(copy, race, "uppercase")
    assert checks["round trip of words"].status == "fail"
    assert checks["round trip of texts"].status == "warn"


class Shifted:
    """A tokenizer whose offsets are one token off."""

    def __init__(self, tokenizer):
        self.inner = tokenizer

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        if "offset_mapping" in out:
            out["offset_mapping"] = [[(0, 0), *offsets[:-1]] for offsets in out["offset_mapping"]]
        return out


def test_offsets_that_lead_elsewhere_are_found(tiny_folder, race):
    subject = Subject(ModelSpec(str(tiny_folder)).resolved(), race, race.cue("default"))
    (good, whole) = offsets_checks(subject)
    assert (good.status, whole.status) == ("ok", "ok")
    subject.__dict__["tokenizer"] = Shifted(subject.tokenizer)
    (bad,) = offsets_checks(subject)
    assert bad.status == "fail"
    assert bad.measured > 0


def test_a_context_too_short_and_memory_too_small_are_found(copy, race, monkeypatch):
    edit_json(copy / "config.json", lambda data: data.update(max_position_embeddings=16))
    assert before(copy, race)["context length"].status == "fail"
    monkeypatch.setattr("alignblind_mi.studies.forecast.free_memory", lambda device: 1000)
    monkeypatch.setattr(checking, "load_model", None)
    found = check_up(str(copy)).set_index("check")
    assert found.loc["memory", "status"] == "fail"
    assert found.loc["engine", "status"] == "skipped"


class Wrong(Engine):
    """An engine that is wrong in one way: where rows are padded, where there are edits, or after the first token decoded."""

    def __init__(self, engine, how):
        self.__dict__.update(engine.__dict__)
        self.how = how

    def batches(self, rows, room, reader=None):
        for batch in super().batches(rows, room, reader):
            if (self.how == "padding" and len(rows) > 1) or (self.how == "edits" and any(row.edits for row in rows)):
                batch.hidden = batch.hidden + 1
            if self.how == "cache":
                inner, ramp = batch.extend, torch.linspace(0, 1, self.model.config.vocab_size)
                batch.extend = lambda tokens, real, inner=inner, ramp=ramp: inner(tokens, real) + ramp
            yield batch


@pytest.mark.parametrize(("how", "failing"), [
    ("padding", {"engine", "engine with edits", "padding", "key-value cache", "transformer-lens", "logit lens"}),
    ("edits", {"engine with edits"}), ("cache", {"key-value cache"})])
def test_an_engine_that_is_wrong_is_found(how, failing, tiny, race):
    subject = Subject(tiny.spec, race, race.cue("default"))
    loaded = Loaded(subject, replace(tiny, engine=Wrong(tiny.engine, how)))
    found = [made for name, check in checking.LOADED.items() for made in checking._tried(name, check, loaded)]
    assert {made.check for made in found if made.status in ("fail", "warn")} == failing
    assert all(made.advice for made in found if made.check in failing)


def test_what_transformer_lens_or_the_lens_cannot_carry_is_said(tiny, race, monkeypatch):
    def refuse(*args, **kwargs):
        raise ModelError("no such architecture")

    loaded = Loaded(Subject(tiny.spec, race, race.cue("default")), tiny)
    monkeypatch.setattr("alignblind_mi.models.model.HookedModel.edited_bridge", refuse)
    monkeypatch.setattr("alignblind_mi.models.model.HookedModel._check_lens", refuse)
    (bridge,), (lens,) = bridge_checks(loaded), lens_checks(loaded)
    assert (bridge.status, lens.status) == ("warn", "fail")
    assert bridge.found == lens.found == "no such architecture"


def test_what_goes_wrong_on_the_way_is_a_finding():
    def broken(subject):
        raise RuntimeError("shape mismatch\nmore")
        yield

    (found,) = checking._tried("engine", broken, None)
    assert (found.status, found.found) == ("fail", "RuntimeError: shape mismatch")


def test_drift_counts_what_changes(tiny, race):
    subject = Subject(tiny.spec, race, race.cue("default"))
    same = answers_of(tiny, subject, DRIFT_PROMPTS)
    tokens, signs = drift_checks(subject, Answers(same.next_token + 1, -same.log_odds))
    assert (tokens.status, signs.status) == ("warn", "warn")
    assert tokens.measured > 0.9
    assert "float32 against bfloat16, 24 prompts" in signs.found


def test_the_command_exits_1_where_a_check_fails_and_2_for_bad_input():
    done = CliRunner().invoke(app, ["doctor", "organism:base", "--cue", "names", "--json"])
    assert done.exit_code == 1
    records = json.loads(done.stdout)
    assert {record["status"] for record in records} >= {"ok", "fail", "skipped"}
    assert all(set(record) == {"check", "status", "found", "measured", "rule", "bound", "unit", "advice"} for record in records)
    table = CliRunner().invoke(app, ["doctor", "organism:base", "--cue", "names"])
    assert "what to do" in table.stdout
    assert "choose another cue" in " ".join(table.stdout.split())
    for arguments in (["organism:nobody"], ["organism:base", "--cue", "nothing"], ["organism:base", "--adapter", "/no/such/folder"]):
        assert isinstance(CliRunner().invoke(app, ["doctor", *arguments]).exception, AlignblindError)


def test_a_model_of_scaled_logits_fails_at_the_lens(tmp_path, texts, race):
    import re

    from transformers import GraniteConfig, GraniteForCausalLM

    words = sorted({w for text in texts for w in re.findall(r"\[MASK\]|\w+|[^\w\s]", text)})
    folder = tiny_llama(tmp_path / "scaled", words)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    GraniteForCausalLM(GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        logits_scaling=4.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    found = check_up(str(folder), drift=False).set_index("check")
    assert found.loc["logit lens", "status"] == "fail"
    assert found.loc["engine", "status"] == "warn", "it runs on the plain engine"
    assert found.loc["engine with edits", "status"] == "skipped"
