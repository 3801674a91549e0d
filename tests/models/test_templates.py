# ruff: noqa: E501 - templates are read in their own lines
"""Chat templates in the forms of published families (their form, not their text): transformers' own ids, or a true refusal.

What differs between them: where a BOS stands, whether the content is trimmed, a system prompt as a turn, inside the user's turn, refused or
written anyway, headers before everything, thoughts that are opened, closed or switched by an option, dates.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignblind_mi.models.chat import Chat, in_chat
from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.tokens import encode
from alignblind_mi.stimuli.prompts import mark

LOOP = "{% for m in messages %}"
CHATML = LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CHATML_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3 = (LOOP + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
# The date stands in a system turn that is always there; a system prompt of one's own follows in it.
LLAMA31 = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] | trim %}"
           "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}{% if not date_string is defined %}{% set date_string = 'DEFAULT' %}{% endif %}"
           "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + said + '<|eot_id|>' }}" + LLAMA3)
LLAMA33 = LLAMA31.replace("'DEFAULT'", "strftime_now('%d %b %Y') if strftime_now is defined else 'DEFAULT'")
GEMMA_TURNS = (LOOP + "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
               "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
SYSTEM_FIRST = ("{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}{% set messages = messages[1:] %}"
                "{% else %}{% set said = '' %}{% endif %}")
THINKING = ("{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
            "{{ '<think>\n\n</think>\n\n' }}{% endif %}")
CHATML_HELPS = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML + CHATML_ASKS
ROLES = (LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '%s' }}{% endfor %}"
         "{%% if add_generation_prompt %%}{{ '<|assistant|>\n' }}{%% endif %%}".replace("%%", "%"))


@dataclass(frozen=True)
class Form:
    """A template, its special tokens, what its tokenizer puts before a raw text, options that it reads, whether it takes a system prompt."""

    template: str
    bos: str | None = "<s>"
    eos: str = "</s>"
    raw: str = "<s> $A"
    options: tuple[dict[str, Any], ...] = ()
    system: bool = True
    more: tuple[str, ...] = field(default=())


FORMS = {
    "Llama 2": Form(SYSTEM_FIRST + LOOP + "{% if loop.first and said %}{% set text = '<<SYS>>\n' + said + '\n<</SYS>>\n\n' + m['content'] %}"
                    "{% else %}{% set text = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
                    "{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
                    "{% endif %}{% endfor %}"),
    "Llama 3": Form("{{ bos_token }}" + LLAMA3, eos="<|eot_id|>"),
    "Llama 3.1": Form(LLAMA31, eos="<|eot_id|>"),
    "Llama 3.3": Form(LLAMA33, eos="<|eot_id|>"),
    "Qwen 2.5": Form(CHATML_HELPS,
                     bos=None, eos="<|im_end|>", raw="$A"),
    "Qwen 3": Form(CHATML + CHATML_ASKS + THINKING, bos=None, eos="<|im_end|>", raw="$A",
                   options=({"enable_thinking": False}, {"enable_thinking": True})),
    "Gemma 2": Form("{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
                    "{% endif %}" + GEMMA_TURNS, eos="<end_of_turn>", system=False),
    "Gemma 3": Form("{{ bos_token }}" + SYSTEM_FIRST + "{% set first = said + '\n\n' if said else '' %}" + GEMMA_TURNS, eos="<end_of_turn>"),
    "Mistral": Form("{{ bos_token }}" + SYSTEM_FIRST + LOOP + "{% if m['role'] == 'user' %}"
                    "{{ '[INST] ' + (said + '\n\n' if loop.last and said else '') + m['content'] + '[/INST]' }}"
                    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}", more=("[INST]", "[/INST]")),
    "Phi-3": Form(ROLES.replace("%s", "<|end|>\n"), eos="<|end|>", raw="$A"),
    "Phi-4": Form(LOOP + "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
                  "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}", bos="</s>", eos="<|im_end|>", raw="$A",
                  more=("<|im_sep|>",)),
    "OLMo 2": Form("{{ bos_token }}" + ROLES.replace("%s", "\n"), bos="</s>", raw="$A"),
    "OLMo 3": Form("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help. <functions></functions><|im_end|>\n' }}{% endif %}"
                   + CHATML + CHATML_ASKS, bos="</s>", raw="$A", more=("<functions>",)),
    "SmolLM2": Form(CHATML_HELPS,
                    bos="<|im_start|>", eos="<|im_end|>", raw="$A"),
    "SmolLM3": Form(SYSTEM_FIRST + "{% set mode = 'no' if enable_thinking is defined and enable_thinking is false else 'yes' %}"
                    "{{ '<|im_start|>system\n## Thinking: ' + mode + '\n\n' + said + '<|im_end|>\n' }}" + CHATML + CHATML_ASKS + THINKING,
                    bos=None, eos="<|im_end|>", raw="$A", options=({"enable_thinking": False},)),
    "DeepSeek-R1": Form(SYSTEM_FIRST + "{{ bos_token + said }}" + LOOP + "{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
                        "{{ '<|Assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
                        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"),
    "gpt-oss": Form(SYSTEM_FIRST + "{{ '<|start|>system<|message|>Knowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + "
                    "'\n\nReasoning: ' + (reasoning_effort if reasoning_effort is defined else 'medium') + '<|end|>' }}"
                    "{% if said %}{{ '<|start|>developer<|message|># Instructions\n\n' + said + '<|end|>' }}{% endif %}"
                    + LOOP + "{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endfor %}"
                    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}", bos="<|start|>", eos="<|end|>", raw="$A",
                    options=({"reasoning_effort": "low"},), more=("<|start|>", "<|message|>")),
    "GLM-4": Form("[gMASK]<sop>" + LOOP + "{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
                  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}", bos=None, raw="[gMASK] <sop> $A", more=("<|observation|>",)),
}
SPECIAL = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
           "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[gMASK]", "<sop>", "<think>", "</think>", "<|User|>",
           "<|Assistant|>"]
PROMPTS = [mark("Pick either black or white.", word="black"), mark("  white\nand black \u2019s caf\u00e9  ", word="white"),
           mark("black", word="black"), mark("A user says: assistant, black!", word="black")]


@pytest.fixture(scope="module")
def backend(texts) -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts[:50], trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                             show_progress=False))
    return made.to_str()


@pytest.fixture
def tokenizer(backend, name) -> Any:
    form, made = FORMS[name], Tokenizer.from_str(backend)
    made.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in dict.fromkeys((*SPECIAL, *form.more))])
    before = [one for one in form.raw.split() if one != "$A"]
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single=form.raw, special_tokens=[(one, made.token_to_id(one)) for one in before])])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=form.bos, eos_token=form.eos, chat_template=form.template)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("system", ["", "Be brief, and fair."])
def test_the_ids_are_transformers_or_the_refusal_is_the_template_s(name, system, tokenizer):
    form = FORMS[name]
    for options in ({}, *form.options):
        chat = Chat(system, options=options)
        if system and not form.system:
            with pytest.raises(ModelError, match=f"the chat template of {name} .*system prompt.*System role not supported"):
                in_chat(PROMPTS, tokenizer, chat, name)
            continue
        for prompt, asked, item in zip(PROMPTS, found := in_chat(PROMPTS, tokenizer, chat, name), encode(tokenizer, found), strict=True):
            told = {"date_string": "26 Jul 2024"} if "date_string" in form.template else {}    # ours, of every day
            theirs = tokenizer.apply_chat_template(chat.messages(prompt.text), tokenize=True, add_generation_prompt=True, return_dict=True,
                                                   **told, **options)["input_ids"]
            assert list(item.ids) == theirs
            span = prompt.spans("word")[0]
            word = prompt.text[span.start : span.end]
            at = item.positions("word", "all")
            covered = asked.text[item.offsets[at[0]][0] : item.offsets[at[-1]][1]]
            assert word in covered
            assert len(covered) <= len(word) + 2
        if options:
            assert found[0].text != in_chat(PROMPTS, tokenizer, Chat(system), name)[0].text or options.get("enable_thinking"), "it is read"


@pytest.mark.parametrize("name", FORMS)
def test_raw_text_is_the_tokenizer_s_own(name, tokenizer):
    for prompt, item in zip(PROMPTS, encode(tokenizer, PROMPTS), strict=True):
        assert list(item.ids) == tokenizer(prompt.text).input_ids


@pytest.mark.parametrize("name", ["Llama 3"])
def test_an_option_that_a_template_does_not_read_is_refused(name, tokenizer):
    with pytest.raises(ModelError, match="enable_thinking"):
        in_chat(PROMPTS, tokenizer, Chat(options={"enable_thinking": False}), name)
