"""What comes in from files and libraries that are not ours: whatever it is, one sentence of this project's errors, soon."""

import json
import os
import time
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from alignblind_mi.borders.reading import foreign, read_object, said
from alignblind_mi.errors import AlignblindError, ResultError
from alignblind_mi.measures.bbq import read_bbq
from alignblind_mi.mitigations.steering import load_vectors
from alignblind_mi.models import template_process
from alignblind_mi.models.adapters import check_folders
from alignblind_mi.models.chat import Chat, render
from alignblind_mi.models.configs import load_tokenizer
from alignblind_mi.models.loading import check_model
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.pages.scoring import score
from alignblind_mi.stimuli.concept import ConceptError, load_concept
from alignblind_mi.studies.study_file import read_study_file
from tests.doubles import CHAT, TINY_CHAT, make_adapter, tiny_llama

DEEP = "[" * 100_000
HOSTILE = {"empty": b"", "deep": DEEP.encode(), "digits": b"x = " + b"9" * 5000, "json digits": b'{"a": ' + b"9" * 5000 + b"}",
           "nul": b"\0" * 9, "latin": b"\xff\xfe\xfa", "deep toml": b"x = " + DEEP.encode(), "deep yaml": b"x: " + DEEP.encode(),
           "half": b'{"a": "\\ud800"}', "aliases": b"a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", "list": b"[1, 2]", "text": b'"x"'}
READERS = {
    "concept.toml": load_concept, "study.yaml": read_study_file, "answers.json": lambda path: score([path]),
    "readings.jsonl": lambda path: score([path]), "rows.parquet": lambda path: score([path]), "bbq.jsonl": read_bbq,
    "vectors.safetensors": load_vectors, "note.json": lambda path: read_object(path, "", ResultError)}


def refused(call, *args):
    with pytest.raises(AlignblindError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_what_it_cannot_read(reader, tmp_path):
    for name, data in HOSTILE.items():
        if (reader, name) == ("note.json", "json digits") or data == b"":
            continue
        file = tmp_path / name / reader
        file.parent.mkdir()
        file.write_bytes(data)
        assert str(tmp_path) in refused(READERS[reader], file)


@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read_and_names_may_be_anything(reader, tmp_path):
    suffix = reader[reader.index("."):]
    folder, pipe, loop = (tmp_path / f"{name}{suffix}" for name in ("folder", "pipe", "loop"))
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path in (folder, pipe, loop, tmp_path / f"none{suffix}", tmp_path / ("n" * 5000 + suffix), tmp_path / f"a\0b{suffix}"):
        refused(READERS[reader], path)


def test_a_missing_concept_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(ConceptError, match="there is no such file"):
        load_concept(tmp_path / "none.toml")


def test_a_border_turns_every_foreign_error_and_none_of_ours():
    class PanicException(BaseException):
        pass

    for error in (TypeError("x"), RecursionError(), KeyError("x"), PanicException("deep\ninside"), MemoryError()):
        with pytest.raises(ModelError, match=rf"a thing: {said(error)}; mend it\."), foreign("a thing", ModelError, "mend it"):
            raise error
    for kind in (KeyboardInterrupt, ResultError):
        with pytest.raises(kind), foreign("a thing", ModelError):
            raise kind


@pytest.mark.parametrize("options", [
    {"device": "cuda:77"}, {"device": "foo"}, {"device": "meta"}, {"device": "cpu:7"}, {"device": ""}, {"device_map": "atuo"},
    {"device_map": {"": "disk"}}, {"device_map": {"": 77}}, {"quantization": "8bit"}])
def test_devices_that_are_not_there(options):
    refused(lambda given: check_model(replace(ModelSpec("organism:base"), **given)), options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("borders") / "tiny", ["a", "b"], layers=1)


def changed(tiny, out, name="config.json", **values):
    """A copy of a checkpoint with some entries of a note changed."""
    out.mkdir()
    for file in tiny.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | values))
    return out


@pytest.mark.parametrize("values", [
    {"num_hidden_layers": 10**9}, {"hidden_size": 10**9}, {"vocab_size": 10**12}, {"num_hidden_layers": -1}, {"hidden_size": "many"},
    {"num_hidden_layers": 0}, {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, {"rms_norm_eps": float("inf")}])
def test_sizes_are_bounded_before_anything_is_built(values, tiny, tmp_path):
    refused(check_model, ModelSpec(str(changed(tiny, tmp_path / "x", **values))))


@pytest.mark.parametrize("content", [b"", DEEP.encode(), b"[1]", b"{}", b'{"model": 3}', b"\xff",
                                     b'{"model": {"type": "BPE", "vocab": 1}}'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_notes_that_transformers_cannot_read(name, content, tiny, tmp_path):
    folder = changed(tiny, tmp_path / "x")
    (folder / name).write_bytes(content)
    if name == "tokenizer_config.json" and content.startswith(b"{"):
        return    # a tokenizer of no class of its own
    refused(lambda: (check_model(ModelSpec(str(folder))), load_tokenizer(ModelSpec(str(folder)))))


def test_a_vocabulary_larger_than_the_embedding(tiny, tmp_path):
    folder = changed(tiny, tmp_path / "x")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["more", "yet"])
    tokenizer.save_pretrained(folder)
    assert "resize" in refused(load_model, ModelSpec(str(folder)))


@pytest.mark.parametrize("content", ["", "[]", "{}", DEEP, '{"peft_type": "LORA", "r": "x"}', '{"peft_type": "LORA", "r": 1e99}',
                                     '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', '{"peft_type": "LORA", "r": -1}'])
def test_damaged_adapters(content, tiny, tmp_path):
    folder = make_adapter(tiny, tmp_path / "one", 0)
    check_folders([folder])
    (folder / "adapter_config.json").write_text(content)
    refused(check_folders, [folder])


def test_damaged_adapter_weights(tiny, tmp_path):
    folder = make_adapter(tiny, tmp_path / "one", 0)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for data in (b"", whole[:20], b"\xff" * 64, whole[:-9]):
        (folder / "adapter_model.safetensors").write_bytes(data)
        refused(check_folders, [folder])


# ---- chat templates ----------------------------------------------------------------------------------------------------


FORMS = [CHAT, TINY_CHAT,
         "{%- for m in messages %}\n  {%- if loop.first %}{{ bos_token }}{% endif %}\n  [{{ m.role }}] {{ m.content|tojson }}"
         "\n"
         "{%- endfor %}\n{%- if add_generation_prompt %}\n{{ date_string }}>{% endif %}",
         "{% macro turn(m) %}<{{ m.role|upper }}>{{ m['content'] }}{% endmacro %}{% for m in messages %}{{ turn(m) }}"
         "{% break %}{% endfor %}"]


@pytest.mark.parametrize("template", FORMS)
@pytest.mark.parametrize("system", ["", "be\tshort “now”"])
def test_texts_are_those_of_transformers(template, system, tiny):
    tokenizer, chat = AutoTokenizer.from_pretrained(tiny), Chat(system)
    tokenizer.chat_template = template
    for text in ("plain", "two\nlines ", "<b>\u00e9\U0001f600{{ x }}"):
        assert render(text, tokenizer, chat, "m") == tokenizer.apply_chat_template(
            chat.messages(text), tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")


LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize("template", [
    LOOP, "{{ 'a' * 10**10 }}", "{{ 'a' * 10**7 }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{% if",
    "{{ " + "(" * 50_000, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 9 ** 999999999 }}", "{{ ''.__class__.__mro__ }}"])
def test_hostile_templates_are_refused_soon(template, tiny, monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 2)
    tokenizer, start = AutoTokenizer.from_pretrained(tiny), time.monotonic()
    tokenizer.chat_template = template
    if "__mro__" not in template:
        assert "the chat template of m refuses" in refused(render, "x", tokenizer, Chat(), "m")
    tokenizer.chat_template = TINY_CHAT
    assert "x" in render("x", tokenizer, Chat(), "m"), "the process is there again"
    assert time.monotonic() - start < 30
