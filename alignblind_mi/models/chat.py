"""Prompts in a chat model's own format: its tokenizer's chat template around the user's text, with the marks moved along.

The user's text stays as it is (a template may trim blanks at its ends, as Llama 3's does, and nothing else); what the template writes
after it ends where the assistant's answer begins. This module does NOT know which prompts of a study are asked in a chat, nor models.
"""

import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from alignblind_mi.borders.reading import foreign, has_halves, said
from alignblind_mi.borders.settings import check_fields
from alignblind_mi.borders.texts import one_line, shown
from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.template_process import WORKER, TemplateRefusal
from alignblind_mi.stimuli.prompts import Prompt, PromptError, Span

OURS = ("messages", "conversations", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
        "date_string", "tools", "documents", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
        "bos_token", "eos_token")    # what is no option of a template, or is given otherwise
_STAND_IN = "\ue000\ue001"    # a user's text that no template contains or changes


@dataclass(frozen=True)
class Chat:
    """How prompts are asked in a chat: as the user's only turn, after a system prompt if there is one.

    `date` (ISO) is given to templates that take one (`date_string`, as those of Llama 3.1 and later do), so that a study can be resumed and
    repeated on another day; it is the one that they fall back on. A template that asks the clock itself writes today's: the frame of a
    study's prompts is part of its configuration, so that days are never mixed.

    `options` are those that a template reads by a name of its own, such as {"enable_thinking": False}: texts, numbers, true or false.
    """

    __repr__ = one_line

    system: str = ""
    date: str = "2024-07-26"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, PromptError)
        if has_halves(self.system):
            raise PromptError(f"the system prompt {self.system!r} has half a character (a lone surrogate): write it anew.")
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise PromptError(f"a date of a chat is written like 2024-07-26, not {self.date!r}.") from None
        for name, value in self.options.items():
            if not isinstance(name, str) or not name.isidentifier() or name in OURS:
                why = " (this project gives it itself)" if name in OURS else ""
                raise PromptError(f"the chat options have {shown(name)}, which is no option of a template{why}: give a name that the "
                                  "template reads, such as enable_thinking.")
            if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
                raise PromptError(f"the chat options have {name} as {shown(value)}: it must be a text, a finite number, true or false.")

    def __hash__(self) -> int:
        return hash((self.system, self.date, tuple(sorted(self.options.items()))))

    def record(self) -> dict[str, Any]:
        """What is written of it: its settings, without options where there are none (as before there were any)."""
        return {name: value for name, value in asdict(self).items() if name != "options" or value}

    def messages(self, text: str) -> list[dict[str, str]]:
        """The conversation as `apply_chat_template` takes it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]


class Frame(NamedTuple):
    """What a chat template writes before and after the user's text."""

    before: str
    after: str


def render(text: str, tokenizer: Any, chat: Chat, name: str) -> str:
    """A user's text in the chat template of a tokenizer, up to where the answer begins. `name` is the model's, for errors.

    Errors: ModelError for a tokenizer without a chat template, or a template that refuses the conversation (a system prompt, often),
    is broken, or takes too long or too much memory: it is a program of whoever made the checkpoint, and runs in a process of its own.
    """
    check_options(tokenizer, chat, name)
    return rendered(chat.messages(text), tokenizer, name, **_told(chat))


def _told(chat: Chat) -> dict[str, Any]:
    """What a template is given beside the conversation."""
    given = datetime.date.fromisoformat(chat.date).strftime("%d %b %Y")
    return {"add_generation_prompt": True, "date_string": given, **chat.options}


def check_options(tokenizer: Any, chat: Chat, name: str) -> None:
    """Whether the template reads every option that a chat gives. Errors: ModelError naming one that it would pass over in silence."""
    if not chat.options or not getattr(tokenizer, "chat_template", None):
        return
    template = tokenizer.chat_template
    words = set(re.findall(r"[A-Za-z_]\w*", template if isinstance(template, str) else json.dumps(template)))
    for option in chat.options:
        if option not in words:
            raise ModelError(f"the chat template of {name} does not read the option {option!r}: leave it out, or see in its "
                             "tokenizer_config.json (chat_template) how it is called there.")


def chat_ids(text: str, tokenizer: Any, chat: Chat, name: str) -> list[int]:
    """A user's text in tokens by transformers itself: `apply_chat_template(..., tokenize=True)`. Errors: as `render`.

    The template is rendered once in a process of its own before: one that is a trap is refused there.
    """
    render(text, tokenizer, chat, name)
    with foreign(f"the chat template of {name} refuses a conversation", ModelError):
        return list(tokenizer.apply_chat_template(chat.messages(text), tokenize=True, return_dict=False, **_told(chat)))


def rendered(messages: list[dict[str, str]], tokenizer: Any, name: str, **options: Any) -> str:
    """A conversation as the tokenizer's own chat template writes it, with the template's `options`. Errors: as `render`."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"the tokenizer of {name} has no chat template: ask this model raw (without chat), or choose a chat model.")
    with_system = " with a system prompt" if messages[0]["role"] == "system" else ""
    with foreign(f"the chat template of {name} refuses a conversation{with_system}", ModelError):
        if _has_own_way(tokenizer):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        template, tokens = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
    try:
        return WORKER.render({**tokens, **options, "conversations": [messages], "chat_template": template})
    except TemplateRefusal as error:
        raise ModelError(f"the chat template of {name} refuses a conversation{with_system}: {said(error)}.") from error


def _has_own_way(tokenizer: Any) -> bool:
    """Whether a tokenizer renders conversations otherwise than transformers' own do: by code that the user has chosen to run."""
    from transformers import PreTrainedTokenizerBase

    return getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template


def chat_frame(tokenizer: Any, chat: Chat, name: str) -> Frame:
    """The frame of every prompt of a chat. Errors: ModelError, beside those of `render`, for a template that drops or repeats the user's
    text, or drops the system prompt."""
    before, *after = render(_STAND_IN, tokenizer, chat, name).split(_STAND_IN)
    if len(after) != 1:
        raise ModelError(f"the chat template of {name} writes the user's text {len(after)} times: it must stand there once.")
    if chat.system.strip() not in before + after[0]:
        raise ModelError(f"the chat template of {name} drops the system prompt: leave it out for this model.")
    return Frame(before, after[0])


def in_chat(prompts: Sequence[Prompt], tokenizer: Any, chat: Chat, name: str) -> list[Prompt]:
    """The prompts as user turns, marks moved along, labels kept. See `render` for `name`.

    They are tokenised as `apply_chat_template(..., tokenize=True)` does it: nothing is put before what the template writes.

    Errors: ModelError as in `chat_frame`, or for a template that changes a prompt's text; PromptError for a mark on blanks that it trims.
    """
    frame = chat_frame(tokenizer, chat, name)
    rendered = {text: render(text, tokenizer, chat, name) for text in dict.fromkeys(prompt.text for prompt in prompts)}
    return [_framed(prompt, rendered[prompt.text], frame, name) for prompt in prompts]


def _framed(prompt: Prompt, rendered: str, frame: Frame, name: str) -> Prompt:
    text = prompt.text
    body = rendered.removeprefix(frame.before).removesuffix(frame.after)
    if frame.before + body + frame.after != rendered or body not in (text, text.rstrip(), text.lstrip(), text.strip()):
        raise ModelError(f"the chat template of {name} changes the prompt {text!r}: marks cannot be placed in it.")
    trimmed = text.index(body)    # blanks before the text
    for mark, spans in prompt.marks.items():
        if any(span.start < trimmed or span.end > trimmed + len(body) for span in spans):
            raise PromptError(f"the mark {mark!r} is on blanks at an end of {text!r} that the chat template of {name} trims.")
    start = len(frame.before) - trimmed
    return replace(prompt, text=rendered, formatted=True, marks={mark: tuple(Span(span.start + start, span.end + start) for span in spans)
                                                 for mark, spans in prompt.marks.items()})
