"""Examples that a model is fine-tuned on, and how they become token ids. Does NOT know what they are about."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignblind_mi.borders.reading import foreign
from alignblind_mi.borders.texts import one_line
from alignblind_mi.mitigations.lora_settings import LoraError
from alignblind_mi.models.tokens import continuation_ids, encode as tokens_of, unknown_words
from alignblind_mi.stimuli.prompts import Prompt, Span

Item = dict[str, list[int]]


@dataclass(frozen=True)
class Example:
    """A pair of the training set: `text` ends with the separator, the loss is on `completion` alone.

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


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int, *, identifiers: bool = False) -> Learnt:
    """Token ids and labels (-100 on the text; the completion, as it is spelt behind the text, and its end token are learnt).

    Examples with unknown words are left out, and so are those of which nothing to be learnt is left within `max_length` tokens.
    `identifiers`: also 1 at the last token of each of the text's identifiers, 0 elsewhere. Errors: LoraError for a tokenizer without an
    end token, or one that cannot read an example.
    """
    if tokenizer.eos_token_id is None:
        raise LoraError(f"the tokenizer of {tokenizer.name_or_path} has no end token, which completions are trained to end with: set "
                        "eos_token in its tokenizer_config.json.")
    prompts = [Prompt(example.text) for example in examples]
    with foreign("the tokenizer cannot read an example", LoraError, "choose another model or concept"):
        texts = tokens_of(tokenizer, prompts)
        completions, _ = continuation_ids(tokenizer, prompts, [[example.completion] for example in examples])
    items, left_out, cut = list[Item](), 0, 0
    for example, text, (completion,) in zip(examples, texts, completions, strict=True):
        if (example.completion and not completion) or unknown_words(tokenizer, text):
            left_out += 1
            continue
        ids, whole = list(text.ids), [*completion, tokenizer.eos_token_id]
        cut += len(ids) + len(whole) > max_length
        if len(ids) >= max_length:
            continue
        item = {"input_ids": (ids + whole)[:max_length], "labels": ([-100] * len(ids) + whole)[:max_length]}
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
