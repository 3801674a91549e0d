"""Examples that a model is fine-tuned on, and how they become token ids. Does NOT know what they are about."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignblind_mi.borders.reading import foreign
from alignblind_mi.borders.texts import one_line
from alignblind_mi.mitigations.lora_settings import LoraError
from alignblind_mi.models.tokens import encode as tokens_of, unknown_words
from alignblind_mi.stimuli.prompts import Prompt, Span
from alignblind_mi.stimuli.protocol import PROTOCOLS, ProtocolName

Item = dict[str, list[int]]


@dataclass(frozen=True)
class Example:
    """A pair of the training set: `text` ends with the separator, `completion` follows it.

    `identifiers` are the spans of `text` that name the groups; `source` is what the example was made from: examples of one source stay on
    one side of a validation split (empty: the text itself).
    """

    __repr__ = one_line

    text: str
    completion: str
    identifiers: tuple[Span, ...] = ()
    source: str = ""


def split_examples(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples: `share` of the sources, at least one, are held out. Errors: LoraError if there is only one."""
    if not share:
        return list(examples), []
    sources = sorted({example.source or example.text for example in examples})
    if len(sources) < 2:
        raise LoraError("a validation split needs examples of at least two sentences.")
    held = set(random.Random(f"validation|{seed}").sample(sources, min(max(1, round(share * len(sources))), len(sources) - 1)))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[(example.source or example.text) in held].append(example)
    return sides


@dataclass(frozen=True)
class Learnt:
    """Examples in tokens: `items` in a fixed random order; how many were left out for unknown words, and how many lost a part of what is
    to be learnt to the longest length."""

    __repr__ = one_line

    items: list[Item]
    left_out: int = 0
    cut: int = 0


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int, *, identifiers: bool = False, protocol: ProtocolName = "best"
           ) -> Learnt:
    """Token ids of each whole text, and labels: -100 where nothing is learnt.

    Text and completion are tokenised together. `protocol` "best" learns the tokens that reach into the completion, and an end token behind
    them; "paper" learns every token (the first is predicted from nothing), and no end token, as the released notebook.

    Examples with unknown words are left out, and so are those of which nothing to be learnt is left within `max_length` tokens.
    `identifiers`: also 1 at the last token of each of the text's identifiers, 0 elsewhere. Errors: LoraError for a tokenizer without an
    end token, or one that cannot read an example.
    """
    if tokenizer.eos_token_id is None:
        raise LoraError(f"the tokenizer of {tokenizer.name_or_path} has no end token, which completions are trained to end with (and rows "
                        "filled up with): set eos_token in its tokenizer_config.json.")
    with foreign("the tokenizer cannot read an example", LoraError, "choose another model or concept"):
        texts = tokens_of(tokenizer, [Prompt(example.text + example.completion) for example in examples])
    end, items, left_out, cut = [] if PROTOCOLS[protocol].whole_text else [tokenizer.eos_token_id], list[Item](), 0, 0
    for example, text in zip(examples, texts, strict=True):
        n = bisect_right(text.ends, len(example.text))    # tokens of the text alone
        if (example.completion and n == len(text.ids)) or unknown_words(tokenizer, text):
            left_out += 1
            continue
        ids = [*text.ids, *end]
        cut += len(ids) > max_length
        n = 1 if PROTOCOLS[protocol].whole_text else n    # the first token has none before it that it could be learnt from
        if n >= min(len(ids), max_length):
            continue
        item = {"input_ids": ids[:max_length], "labels": ([-100] * n + ids[n:])[:max_length]}
        if identifiers:
            last = {text.tokens_of(span)[-1] for span in example.identifiers}
            item["identifiers"] = [int(i in last) for i in range(len(item["input_ids"]))]
        items.append(item)
    random.Random(0).shuffle(items)
    return Learnt(items, left_out, cut)


def collate(batch: Sequence[Item], pad: int) -> dict[str, Tensor]:
    """Items padded on the right to one width, key by key, with an attention mask for each kind of input_ids."""
    out = {}
    for key in batch[0]:
        width, fill = max(len(item[key]) for item in batch), pad if key.endswith("input_ids") else -100 if key.endswith("labels") else 0
        out[key] = torch.tensor([item[key] + [fill] * (width - len(item[key])) for item in batch])
        if key.endswith("input_ids"):
            mask = [[1] * len(item[key]) + [0] * (width - len(item[key])) for item in batch]
            out[key.replace("input_ids", "attention_mask")] = torch.tensor(mask)
    return out
