"""A model that thinks, from its tokens on: marks of thoughts stay in its text, options of its template are given, its log-odds are none."""

import json
from typing import Any

import pytest
from doubles import tiny_llama
from transformers import AutoTokenizer

from alignblind_mi.measures.behaviour import Decoding, ask
from alignblind_mi.models.chat import Chat
from alignblind_mi.models.decoding import decoded, thought_marks
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.prompts import PromptError, implicit_prompts
from alignblind_mi.studies.config import StudyConfig

TEMPLATE = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}")


@pytest.fixture(scope="module")
def thinker(texts, tmp_path_factory) -> HookedModel:
    import re

    words = sorted({w for text in [*texts, "user assistant : <think> </think>"] for w in re.findall(r"\w+|[^\w\s]", text)})
    return load_model(str(tiny_llama(tmp_path_factory.mktemp("thinker"), words, chat_template=TEMPLATE)))


def test_options_of_the_template_are_given_and_are_transformers_own_ids(thinker, race):
    prompt = implicit_prompts(race, "default")[0]
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        view = thinker.in_chat(Chat(options=options))
        (item,) = view.encode([row.prompt for row in view.rows([prompt])])
        assert list(item.ids) == thinker.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=True, add_generation_prompt=True, return_dict=False, **options)
    assert view.provenance()["chat"]["options"] == {"enable_thinking": True}


def test_log_odds_are_none_where_the_template_begins_a_thought(thinker, race):
    prompts = implicit_prompts(race, "default")[:2]
    rows = ask(thinker.in_chat(), race, prompts, Decoding(max_new_tokens=2))
    assert rows["log_odds"].isna().all()
    assert set(rows["reason"]) == {"thought_cut"}
    assert set(rows["outcome"]) == {"invalid"}
    off = ask(thinker.in_chat(Chat(options={"enable_thinking": False})), race, prompts, Decoding(max_new_tokens=2))
    assert off["log_odds"].notna().all()
    assert "thought_cut" not in set(off["reason"])


def test_an_option_that_the_template_does_not_read_is_refused(thinker, race):
    with pytest.raises(ModelError, match=r"does not read the option 'enable_thinkin': leave it out, or see in its tokenizer_config\.json"):
        thinker.in_chat(Chat(options={"enable_thinkin": False})).rows(implicit_prompts(race, "default")[:1])


@pytest.mark.parametrize(("options", "said"), [
    ({"messages": "x"}, "'messages', which is no option of a template .this project gives it itself"),
    ({"a b": 1}, "'a b', which is no option"),
    ({"a": None}, "have a as None: it must be a text, a finite number, true or false"), ({"a": float("nan")}, "a as nan: it must be"),
    ({"a": [1]}, "must be a text")])
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(PromptError, match=said):
        Chat(options=options)


def test_options_are_part_of_what_a_study_is_checked_against(thinker, tmp_path):
    given = str(thinker.spec.source)
    plain = StudyConfig.create(given, given, chat=True)
    off = StudyConfig.create(given, given, chat=True, chat_options={"enable_thinking": False})
    assert "options" not in plain.identity()["chat"]    # as it was before there were any
    assert off.identity()["chat"]["options"] == {"enable_thinking": False}
    assert hash(plain.chat) != hash(off.chat)
    with pytest.raises(ModelError, match="needs a chat"):
        StudyConfig.create(given, given, chat_options={"enable_thinking": False})


def test_the_command_line_and_a_study_file_give_options(thinker, tmp_path):
    from alignblind_mi.commands.options import template_options
    from alignblind_mi.errors import AlignblindError
    from alignblind_mi.studies.study_file import read_study_file

    assert template_options("enable_thinking=false, effort=low,budget=3,share=0.5") == {
        "enable_thinking": False, "effort": "low", "budget": 3, "share": 0.5}
    for wrong in ("enable_thinking", "=1", "a=", "a=1,a=2"):
        with pytest.raises(AlignblindError, match="write name=value"):
            template_options(wrong)
    file = tmp_path / "study.yaml"
    file.write_text(f"base: {json.dumps(str(thinker.spec.source))}\naligned: {json.dumps(str(thinker.spec.source))}\n"
                    "chat:\n  options:\n    enable_thinking: false\n")
    assert read_study_file(file).chat == Chat(options={"enable_thinking": False})


@pytest.mark.parametrize("special", [True, False])
def test_marks_of_thoughts_stay_in_a_text_without_special_tokens(tiny_folder, special):
    from tokenizers import AddedToken

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens([AddedToken("<think>", special=special), AddedToken("</think>", special=special)], special_tokens=special)
    ids = tokenizer("<think> black </think> white", add_special_tokens=False)["input_ids"]
    text = decoded(tokenizer, [*ids, tokenizer.eos_token_id], thought_marks(tokenizer))
    assert "<think>" in text
    assert "</think>" in text
    assert tokenizer.eos_token not in text
    assert thought_marks(tokenizer).keys() == ({*ids} & {*tokenizer.convert_tokens_to_ids(["<think>", "</think>"])} if special else set())
