"""Models that think before they answer: where the thought ends and the answer begins.

The marks are those of published models: `<think>` (Qwen 3, DeepSeek-R1, SmolLM3, GLM-4), its variants, `[THINK]` (Magistral), and the
channels of gpt-oss, of which `final` is the answer. This module does NOT judge answers.
"""

import re

PAIRS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"),
         ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
         ("<|START_THINKING|>", "<|END_THINKING|>"), ("\u25c1think\u25b7", "\u25c1/think\u25b7"))
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
MARKS = (*(mark for pair in PAIRS for mark in pair), CHANNEL, MESSAGE, "<|start|>", "<|end|>")    # kept where special tokens are not
FINAL = "final"


def is_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside a thought: its template opens one (DeepSeek-R1), and the answer begins behind its end."""
    return any(prompt.rfind(begin) > prompt.rfind(end) and prompt.rstrip().endswith(begin) for begin, end in PAIRS)


def without_thought(text: str, prompt: str = "") -> str | None:
    """What a model answers behind its thoughts; the text itself where there are none. None where a thought was cut off before an answer.

    `prompt` is what was asked, if it may end inside a thought (see `is_thinking`).
    """
    if CHANNEL in text:
        return _final(text)
    answer, thinking = text, is_thinking(prompt)
    for begin, end in PAIRS:
        if end in answer and (thinking or begin not in answer or answer.index(end) < answer.index(begin)):
            answer, thinking = answer.split(end, 1)[1], False    # a thought that began before the text
        answer = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", " ", answer, flags=re.DOTALL)
        if begin in answer:    # it never ends
            answer = answer.split(begin, 1)[0]
            thinking = thinking or not answer.strip()
    return None if thinking else answer.strip() if answer != text else text


def _final(text: str) -> str | None:
    """The last message of the final channel."""
    _, *messages = text.split(CHANNEL)
    found = [rest.split(MESSAGE, 1)[1] for rest in messages if rest.startswith(FINAL) and MESSAGE in rest]
    return re.split(r"<\|end\|>|<\|start\|>|<\|return\|>", found[-1])[0].strip() if found else None
