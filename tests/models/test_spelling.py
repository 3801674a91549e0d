"""The text that a model reads, and how continuations and words are spelt in it: transformers' own ids, for every form of tokenizer.

The forms are those of published checkpoints: bytes with and without a BOS, an end token behind every text (`add_eos_token`), a beginning
that is the end token (GPT-2, OPT), SentencePiece as Llama 2 and Phi-3 have it, ChatML whose BOS marks the turns, several tokens of no name.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignblind_mi.measures.behaviour import Decoding, ask
from alignblind_mi.mitigations.examples import encode as learnt
from alignblind_mi.mitigations.lora import awareness_examples, train_lora
from alignblind_mi.mitigations.lora_settings import LoraError, LoraSettings
from alignblind_mi.models.chat import Chat
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.prompts import Prompt, implicit_prompts
from alignblind_mi.studies.doctor import check_up

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ROLES = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
PREFIXED = "{{ '[gMASK]<sop>' }}" + ROLES
WITH_BOS = "{{ bos_token }}" + ROLES
FORMS: dict[str, dict[str, Any]] = {
    "bytes without a BOS": {"kind": "bytes", "bos": None, "chat": CHATML},
    "bytes with a BOS": {"kind": "bytes", "around": "<s> $A", "chat": WITH_BOS},
    "an end behind every text": {"kind": "bytes", "around": "<s> $A </s>", "chat": WITH_BOS},
    "an end and no BOS": {"kind": "bytes", "around": "$A <|im_end|>", "bos": "<|im_start|>", "eos": "<|im_end|>", "chat": CHATML},
    "ChatML whose BOS marks turns": {"kind": "bytes", "bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<s>", "chat": CHATML},
    "one token for all (GPT-2)": {"kind": "bytes", "bos": "</s>", "unk": "</s>", "chat": ROLES},
    "that token before texts (OPT)": {"kind": "bytes", "around": "</s> $A", "bos": "</s>", "unk": "</s>", "chat": ROLES},
    "several tokens before texts": {"kind": "bytes", "around": "[gMASK] <sop> $A", "bos": None, "chat": PREFIXED},
    "a blank before every text": {"kind": "prepended", "around": "<s> $A", "unk": "<unk>", "chat": ROLES},
    "a blank before the first word": {"kind": "first", "around": "<s> $A", "unk": "<unk>", "chat": WITH_BOS},
}


def trained(kind: str, texts: list[str]) -> Tokenizer:
    """A small BPE of a form, trained on texts."""
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.post_processor = processors.ByteLevel(trim_offsets=False)
        more: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": SPECIAL}
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        more = {"special_tokens": [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]}
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, show_progress=False, **more))
    if kind != "bytes":
        made.pre_tokenizer = None
    if kind == "first":
        made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return made


def checkpoint(folder: Path, texts: list[str], *, kind: str, around: str = "$A", bos: str | None = "<s>", eos: str = "</s>",
               unk: str | None = None, chat: str) -> Path:
    """A tiny model with a tokenizer of a form."""
    made = trained(kind, texts)
    template = processors.TemplateProcessing(
        single=around, special_tokens=[(name, made.token_to_id(name)) for name in SPECIAL if name in around.split()])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template]) if kind == "bytes" else template
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, unk_token=unk, chat_template=chat,
                            clean_up_tokenization_spaces=False).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=made.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=bos and made.token_to_id(bos), eos_token_id=made.token_to_id(eos)),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(FORMS))
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(form, texts, tmp_path_factory) -> Path:
    said = [re.sub(r"\{(\w+)\}", r" \1 ", text) for text in texts]
    return checkpoint(tmp_path_factory.mktemp("form"), said, **FORMS[form])


@pytest.fixture(scope="module")
def model(folder) -> HookedModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def own(folder) -> Any:
    """The checkpoint as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def around(form: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the form puts before and behind a text."""
    before, behind = FORMS[form].get("around", "$A").split("$A")
    return tokenizer.convert_tokens_to_ids(before.split()), tokenizer.convert_tokens_to_ids(behind.split())


def test_raw_text_has_what_transformers_puts_before_it_and_nothing_behind(form, model, race):
    before, behind = around(form, model.tokenizer)
    for prompt in [*implicit_prompts(race, "default")[::300], Prompt("black or white")]:
        ids, theirs = list(model.encode([prompt])[0].ids), list(model.tokenizer(prompt.text)["input_ids"])
        assert ids + behind == theirs
        assert ids[: len(before)] == before


def test_a_chat_has_the_ids_of_transformers_own_template(model, race):
    prompts = implicit_prompts(race, "default")[::300]
    rows = model.in_chat(Chat()).rows(prompts)
    for prompt, row, item in zip(prompts, rows, model.encode([row.prompt for row in rows]), strict=True):
        assert list(item.ids) == model.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=True, add_generation_prompt=True, return_dict=False)
        for mark, spans in row.prompt.marks.items():
            covered = [item.offsets[i] for i in item.positions(mark)]
            assert all(start < span.end <= end for span, (start, end) in zip(spans, covered, strict=True))


@pytest.mark.parametrize("chat", [False, True])
def test_continuations_are_scored_as_they_stand_in_the_text(form, model, own, race, chat):
    view = model.in_chat(Chat()) if chat else model
    blank = "" if chat else " "
    rows, choices = view.rows(implicit_prompts(race, "default")[::300]), [f"{blank}joyful - white, tragic - black", f"{blank}black"]
    found = view.continuation_log_probs(rows, [choices] * len(rows))
    _, behind = around(form, model.tokenizer)
    for row, item, values in zip(rows, view.encode([row.prompt for row in rows]), found, strict=True):
        for text, value in zip(choices, values, strict=True):
            whole = list(model.tokenizer(row.prompt.text + text, add_special_tokens=not chat)["input_ids"])
            whole = whole[: len(whole) - (0 if chat else len(behind))]
            n = len(item.ids)
            assert whole[:n] == list(item.ids)
            with torch.no_grad():
                log_probs = own(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            assert float(value) == pytest.approx(sum(float(log_probs[i - 1, whole[i]]) for i in range(n, len(whole))), abs=1e-3)


def test_a_word_is_spelt_as_in_a_text(form, model):
    for word in (" race", " color", " white", "race"):
        behind = list(model.tokenizer("Sense:\n" + word, add_special_tokens=False)["input_ids"])
        before = list(model.tokenizer("Sense:\n", add_special_tokens=False)["input_ids"])
        assert model.word_ids(word) == behind[len(before) :]
    assert model.token_id(" race") == model.word_ids(" race")[0]


def test_every_known_text_can_be_asked(model, race):
    model.check_known([prompt.text for prompt in implicit_prompts(race, "default")[::100]])
    assert len(ask(model, race, implicit_prompts(race, "default")[:2], Decoding(max_new_tokens=2))) == 2


def test_every_model_can_be_trained_on_the_tokens_of_whole_texts(folder, model, race, tmp_path):
    examples = awareness_examples(race)[:8]
    found = learnt(model.tokenizer, examples, 256)
    assert (len(found.items), found.left_out, found.cut) == (8, 0, 0)
    spelt = {tuple(item["input_ids"]) for item in found.items}
    for example in examples:    # they end with a blank, which most tokenizers merge with what follows
        whole = model.encode([example.text + example.completion])[0]
        assert (*whole.ids, model.tokenizer.eos_token_id) in spelt
    settings = LoraSettings(epochs=1, batch_size=4, accumulation=1)
    assert train_lora(str(folder), examples, "0", tmp_path / "adapter", settings=settings).adapter == "adapter"


def test_the_doctor_finds_nothing_wrong_with_the_spelling(folder):
    found = check_up(str(folder), drift=False).set_index("check")["status"]
    assert {found[name] for name in ("tokenizer", "chat template", "texts", "sense words")} == {"ok"}
    assert found["bos"] in ("ok", "skipped")


# ---- borders -----------------------------------------------------------------------------------------------------------


def test_a_new_line_behind_a_blank_is_no_reason_to_warn(llama3, caplog):
    """Some tokenizers have a token for a blank and a line break; the blank has been read."""
    (ids,) = llama3.continuation_ids(["It is "], [["\nblack"]])
    assert llama3.tokenizer.decode(ids[0]) == "\nblack"
    assert "merges" not in caplog.text


def test_a_continuation_that_merges_with_its_prompt_is_said(llama3, caplog):
    together = llama3.tokenizer("black").input_ids
    assert len(together) == 2    # BOS and one token
    llama3.continuation_log_probs(["It is bl"], [["ack"]])
    assert "merges the end of 1 prompts with the beginning of their continuations ('It is bl' + 'ack')" in caplog.text
    caplog.clear()
    llama3.continuation_log_probs(["It is"], [[" black"]])
    assert not caplog.text


def test_an_unknown_continuation_is_named():
    model = load_model("organism:aligned")
    with pytest.raises(ModelError, match="does not know ' zebrafish'"):
        model.continuation_log_probs(["black and white"], [[" zebrafish"]])


def test_training_that_sees_no_label_is_refused_and_cut_examples_are_counted(llama3_folder, llama3, race, tmp_path):
    examples = awareness_examples(race)[:8]
    with pytest.raises(LoraError, match=r"no example is left to train on: 8 are .* within 1 tokens \(max_length; 8 are longer\)"):
        train_lora(str(llama3_folder), examples, "0", tmp_path / "adapter", settings=LoraSettings(epochs=1, batch_size=4, max_length=1))
    lengths = [len(llama3.encode([e.text + e.completion])[0].ids) + 1 for e in examples]
    found = learnt(llama3.tokenizer, examples, max(lengths) - 1)
    assert found.cut == sum(n == max(lengths) for n in lengths) > 0
    assert len(found.items) == 8
