"""Prompts in a chat template: the same tokens as plain Hugging Face, one BOS, marks on the right tokens; clear errors before weights."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doubles import TINY_CHAT, tiny_llama
from transformers import AutoModelForCausalLM

from alignblind_mi.measures.awareness import measure_awareness
from alignblind_mi.measures.behaviour import Decoding, ask
from alignblind_mi.measures.sources import record_sources
from alignblind_mi.models.chat import Chat, chat_frame, in_chat
from alignblind_mi.models.edits import Edit, Row, Site, Treatment
from alignblind_mi.models.model import HookedModel, load_model, untrained
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import Prompt, PromptError, implicit_prompts, mark
from alignblind_mi.studies.config import StudyConfig

SYSTEM = "You can only use white words."
TURN = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def chat_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {w for text in [*texts, SYSTEM, "user system assistant : ."] for w in re.findall(r"\[MASK\]|\w+|[^\w\s]", text)}
    return tiny_llama(tmp_path_factory.mktemp("chat"), sorted(words), chat_template=TINY_CHAT)


@pytest.fixture(scope="module")
def chatty(chat_folder: Path) -> HookedModel:
    return load_model(str(chat_folder))


def templated(model: HookedModel, template: str):
    """The model's tokenizer with another chat template."""
    import copy

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def plain_ids(model: HookedModel, text: str, system: str = "") -> list[int]:
    """What plain Hugging Face reads."""
    messages = [{"role": "system", "content": system}] if system else []
    return list(model.tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}], tokenize=True,
                                                    add_generation_prompt=True, return_dict=False))


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("which", ["chatty", "llama3"])
def test_tokens_are_those_of_plain_hugging_face_with_one_bos(which, system, race, request):
    model = request.getfixturevalue(which)
    prompts = implicit_prompts(race, "default")[::240]
    rows = model.in_chat(Chat(system)).rows(prompts)
    for prompt, row, item in zip(prompts, rows, model.encode([row.prompt for row in rows]), strict=True):
        assert list(item.ids) == plain_ids(model, prompt.text, system)
        assert item.ids.count(model.tokenizer.bos_token_id) == 1
        assert item.ids[0] == model.tokenizer.bos_token_id
        assert prompt.text.strip() in row.prompt.text
        assert row.prompt.labels == prompt.labels
        for name, spans in prompt.marks.items():
            assert [row.prompt.text[s.start : s.end] for s in row.prompt.spans(name)] == [prompt.text[s.start : s.end] for s in spans]
            assert all(model.tokenizer.decode([item.ids[i]]).strip() == prompt.labels[name] for i in item.positions(name)) or (
                which == "llama3")    # which splits some words


def test_rows_equal_plain_hugging_face(chatty, chat_folder, race):
    prompts = implicit_prompts(race, "default")[::200]
    view = chatty.in_chat(Chat(SYSTEM))
    plain = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32).eval()
    ours = view.next_log_probs(view.rows(prompts))
    made = view.generate(view.rows(prompts), 8)
    for prompt, log_probs, generation in zip(prompts, ours, made, strict=True):
        ids = torch.tensor([plain_ids(chatty, prompt.text, SYSTEM)])
        with torch.no_grad():
            assert (plain(ids).logits[0, -1].log_softmax(-1) - log_probs).abs().max() < 1e-5
            out = plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
        kept = out[: out.index(2)] if 2 in out else out
        assert generation.text == chatty.tokenizer.decode(kept, skip_special_tokens=True)


def test_identifiers_are_read_and_edited_where_they_stand_in_the_chat(chatty, chat_folder, race):
    prompt, vector = implicit_prompts(race, "default")[0], torch.full((chatty.d_model,), 2.0)
    view = chatty.in_chat(Chat(SYSTEM))
    ids = plain_ids(chatty, prompt.text, SYSTEM)
    at = [i for i, one in enumerate(ids) if chatty.tokenizer.decode([one]).strip() == "black"]
    plain = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states
    read = view.record(view.rows([prompt]), [Site(1, "marked", occurrence=0), Site(1, "marked", occurrence=-1)])[0]
    assert torch.allclose(read, hidden[2][0, [at[0], at[-1]]], atol=1e-5)
    sources = record_sources(view, race, "default", layers=[1], max_word_pairs=1)
    assert torch.allclose(sources.resid[0, 0], hidden[2][0, at[0]], atol=1e-5)
    steered = view.under(Treatment("steered", (Edit(Site(0, "marked"), vector),), prefix="Pick white . "))
    assert steered.chat == Chat(SYSTEM), "a treatment keeps the chat"
    (row,) = steered.rows([prompt])
    assert f"user : Pick white . {prompt.text[:10]}" in row.prompt.text, "the prefix is the user's, not the template's"
    assert torch.allclose(steered.record([row], [Site(0, "marked", occurrence=0)])[0, 0], vector)


def test_answers_in_a_chat_keep_the_whole_prompt(chatty, race):
    prompts = implicit_prompts(race, "default")[:4]
    view = chatty.in_chat()
    rows = ask(view, race, prompts, Decoding(max_new_tokens=3, temperature=0.9, seed=5))
    assert rows["prompt"].tolist() == [row.prompt.text for row in view.rows(prompts)]
    again = ask(view, race, prompts, Decoding(max_new_tokens=3, temperature=0.9, seed=5))
    assert again["answer"].tolist() == rows["answer"].tolist()
    other = ask(view, race, prompts, Decoding(max_new_tokens=3, temperature=0.9, seed=6))
    assert other["answer"].tolist() != rows["answer"].tolist()
    scored = view.continuation_log_probs(view.rows(prompts[:1]), [["joyful - white, tragic - black", "joyful - black, tragic - white"]])[0]
    assert rows["log_odds_first"][0] == pytest.approx(float(scored[0] - scored[1]), abs=1e-5), "an assistant's answer has no blank first"
    assert ask(chatty, race, prompts, Decoding(max_new_tokens=3))["prompt"].tolist() == [prompt.text for prompt in prompts]
    assert view.provenance()["chat"] == {"system": "", "date": "2024-07-26"}
    assert chatty.provenance()["chat"] is None


def test_readings_are_of_the_chat_and_questions_stay_raw(chatty, race):
    some = {"layers": [1], "max_word_pairs": 1, "controls": ("random",)}
    raw, chat = (measure_awareness(model, race, "default", **some) for model in (chatty, chatty.in_chat()))
    assert raw["base_group"].tolist() == chat["base_group"].tolist(), "the question itself is the same"
    assert raw["p_group"].tolist() != chat["p_group"].tolist()
    assert untrained(chatty.in_chat()).chat == Chat()
    assert chatty.in_chat().in_chat(None).rows([Prompt("black")])[0].prompt.text == "black"


def test_a_template_that_trims_moves_marks_and_nothing_else_may_change(chatty):
    tokenizer, chat = chatty.tokenizer, Chat()
    (prompt,) = in_chat([mark("  pick black \n", marked="black")], tokenizer, chat, "m")
    assert prompt.text == "<bos>user : pick black\nassistant :"
    assert [prompt.text[s.start : s.end] for s in prompt.spans("marked")] == ["black"]
    with pytest.raises(PromptError, match="on blanks at an end"):
        in_chat([replace(mark("black ", x="black"), marks={"end": (mark("a b", b="b").spans("b")[0],)}, text="a  ")], tokenizer, chat, "m")
    (kept,) = in_chat([mark(" black ", marked="black")], templated(chatty, TURN), chat, "m")
    assert kept.text == "user :  black \n"
    with pytest.raises(ModelError, match="changes the prompt 'pick black'"):
        in_chat([mark("pick black", x="black")], templated(chatty, TURN.replace("m['content']", "m['content'] | upper")), chat, "m")


@pytest.mark.parametrize(("template", "system", "said"), [
    (None, "", "the tokenizer of m has no chat template"),
    ("{{ bos_token }}user", "", "writes the user's text 0 times"),
    (TURN + TURN, "", "writes the user's text 2 times"),
    ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "Be fair.", "drops the system prompt"),
    ("{{ raise_exception('System role not supported') }}", "Be fair.", "refuses a conversation with a system prompt: System role not"),
])
def test_a_template_that_cannot_be_used_is_one_sentence(template, system, said, chatty):
    with pytest.raises(ModelError, match=re.escape(said)):
        chat_frame(templated(chatty, template), Chat(system), "m")


@pytest.mark.parametrize(("before", "count"), [("", 0), ("{{ bos_token }}", 1), ("x {{ bos_token }}", 1),
                                               ("{{ bos_token + bos_token }}", 2)])
def test_as_many_bos_as_the_template_writes(before, count, chatty):
    model = replace(chatty, tokenizer=templated(chatty, before + TURN))
    (item,) = model.encode([row.prompt for row in model.in_chat().rows([mark("pick black", marked="black")])])
    assert list(item.ids) == model.tokenizer.apply_chat_template([{"role": "user", "content": "pick black"}], add_generation_prompt=True,
                                                                return_dict=True)["input_ids"]
    assert item.ids.count(1) == count
    assert model.tokenizer.decode([item.ids[item.positions("marked")[0]]]).strip() == "black"


def test_a_template_that_takes_a_date_is_given_the_chat_s(chatty):
    own = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"    # as Llama 3.1's
    tokenizer = templated(chatty, own + "Today Date: {{ date_string }}" + TURN)
    assert chat_frame(tokenizer, Chat(), "m").before.startswith("Today Date: 26 Jul 2024")
    assert chat_frame(tokenizer, Chat(date="2025-01-31"), "m").before.startswith("Today Date: 31 Jan 2025")
    with pytest.raises(PromptError, match="not 'today'"):
        Chat(date="today")


# ---- in a study ----------------------------------------------------------------------------------------------------------


def test_a_chat_is_part_of_a_study_s_identity(chat_folder, tiny_folder):
    raw = StudyConfig.create(str(chat_folder), str(chat_folder))
    chat = StudyConfig.create(str(chat_folder), str(chat_folder), chat=True, system=SYSTEM, temperature=0.5, seed=3)
    assert "chat" not in raw.identity(), "studies of before go on"
    assert raw.decoding == Decoding()
    assert chat.decoding == Decoding(temperature=0.5, seed=3)
    assert chat.identity()["chat"] == {"system": SYSTEM, "date": "2024-07-26"}
    assert chat.identity()["chat_frames"]["base"] == {"before": f"<bos>system : {SYSTEM}\nuser : ", "after": "\nassistant :"}
    assert replace(chat, chat=Chat()).identity() != chat.identity()
    with pytest.raises(ModelError, match=f"the tokenizer of {tiny_folder} has no chat template"):
        StudyConfig.create(str(chat_folder), str(tiny_folder), chat=True)
    with pytest.raises(ModelError, match="needs a chat to stand in"):
        StudyConfig.create(str(chat_folder), str(chat_folder), system=SYSTEM)
    with pytest.raises(ModelError, match="a temperature is 0"):
        StudyConfig.create(str(chat_folder), str(chat_folder), temperature=-1.0)


def test_steering_vectors_are_raw_in_a_chat(chatty, race: Concept):
    from alignblind_mi.mitigations.steering import sense_steering

    raw, chat = (sense_steering(model, race, "default", "race", [1]) for model in (chatty, chatty.in_chat()))
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(raw.edits, chat.edits, strict=True))
    assert isinstance(chatty.in_chat().rows([Prompt("black")])[0], Row)


def test_patching_in_a_chat_is_of_the_chat(chatty, race: Concept):
    from alignblind_mi.measures.patching import measure_patching

    some = {"parts": ["residual"], "layers": [1], "max_word_pairs": 1, "controls": (), "categories": ["weapon"], "marks": ["identifiers"]}
    raw, chat = (measure_patching(model, race, "default", **some) for model in (chatty, chatty.in_chat(Chat(SYSTEM))))
    assert len(raw) == len(chat) > 0
    assert chat["log_odds"].notna().all()
    assert (raw["log_odds"] - chat["log_odds"]).abs().max() > 1e-4
