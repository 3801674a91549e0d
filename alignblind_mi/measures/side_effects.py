"""Side effects: what a treatment changes that it should leave alone, item by item, beside the untreated model on the same items.

Running texts (how far are the next tokens from the untreated model's, and how probable is the text), lists to copy, words to judge, and
questions about identifiers whose sense their sentence has settled: a treatment that makes everything the group sense answers the questions
about the other sense wrongly. Rows are under one identity (`measure`, `item`); nothing here knows how a treatment works.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.own import own_table
from alignblind_mi.borders.settings import Count, Seed, takes
from alignblind_mi.measures.behaviour import Decoding, ask
from alignblind_mi.models.edits import PROMPT, UNTREATED
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.tokens import unknown_words
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.prompts import Prompt, Span, fill, implicit_prompts
from alignblind_mi.stimuli.thoughts import without_thought

FEWEST = 5    # texts that a tokenizer must know for a mean over them
LISTS, LISTED = 24, 6
SEPARATORS = str.maketrans(dict.fromkeys(",.;:\n", " "))
MEASURES = ("kl_neutral", "kl_mentions", "surprise", "copying", "judging", "other_questions", "group_questions")


@cache
def _data() -> dict[str, Any]:
    return own_table("measures", "side_effects")


@takes(ModelError)
def measure_side_effects(model: HookedModel, concept: Concept, cue: str | Cue, *, word_pairs: Count = 4,
                         seed: Seed = 0) -> pd.DataFrame:
    """Every measure on a model under its treatment. One row an item: model, treatment, measure, item, value, weight.

    `kl_neutral`: KL(untreated || treated) of the next token, nats, mean over the tokens of a text without identifiers; `kl_mentions`: of
    a sentence that settles the other sense of both identifiers. `surprise`: of the neutral texts, nats a token (the exponential of its
    mean is the perplexity). Shares of right answers (1 or 0): `copying` a list of words in its order, `judging` negative words bad and
    positive ones good in the concept's own task (greedy answers; an invalid one is wrong), `other_questions` and `group_questions`: the
    sense of an identifier after a `test` sentence that settles it. `weight`: the tokens of a text. Divergences are from the same model
    without the treatment; the rest is compared with the rows of the untreated model, item by item. A treatment that acts on generated
    tokens acts on the texts', as if they were generated.

    Errors: ModelError if the tokenizer knows fewer than five of the texts; ConceptError for a concept without contexts of both senses.
    """
    cue = concept.cue(cue) if isinstance(cue, str) else cue
    bare = model.under(UNTREATED)
    parts = [*_texts(model, bare, "kl_neutral", _known(model, [Prompt(text) for text in _data()["texts"]])),
             *_texts(model, bare, "kl_mentions", _settled(concept, cue, concept.other_sense))]
    for name, right in (("copying", _copying), ("judging", _judging), ("other_questions", _questions_of(concept.other_sense)),
                        ("group_questions", _questions_of(concept.group_sense))):
        items, found = right(model, concept, cue, word_pairs, seed)
        parts += [{"measure": name, "item": item, "value": value, "weight": 1.0} for item, value in zip(items, found, strict=True)]
    return pd.DataFrame.from_records(parts).assign(model=model.spec.name, treatment=model.treatment.name)


def _known(model: HookedModel, texts: Sequence[Prompt]) -> list[Prompt]:
    """The texts whose words the tokenizer knows."""
    found = [item.prompt for item in model.encode(texts) if not unknown_words(model.tokenizer, item)]
    if len(found) < FEWEST:
        raise ModelError(f"the tokenizer of {model.spec.name} knows the words of {len(found)} of {len(texts)} neutral texts: side effects "
                         "on text cannot be measured on it.")
    return found


# ---- texts -------------------------------------------------------------------------------------------------------------


def _texts(treated: HookedModel, bare: HookedModel, measure: str, texts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Divergence and, of neutral texts, surprise by text."""
    now = treated.text_log_probs(treated.treatment.text_rows(texts))
    before = bare.text_log_probs(bare.treatment.rows(texts))
    out = []
    spelt = [item.ids for item in treated.encode([row.prompt for row in treated.treatment.text_rows(texts)])]
    for item, a, b, prefixed in zip(bare.encode(texts), now, before, spelt, strict=True):
        text, ids = item.prompt, item.ids
        n = len(item.positions(PROMPT)) - 1    # the first token after a prefix may be spelt otherwise
        if prefixed[-n:] != ids[-n:]:
            raise ModelError(f"the tokenizer splits {text.text!r} otherwise after the prefix {treated.treatment.prefix!r}: end the prefix "
                             "with a space.")
        a, b = a[-n:], b[-n:]
        identity = {"item": text.text, "weight": float(n)}
        out.append({**identity, "measure": measure, "value": divergence(b, a)})
        if measure == "kl_neutral":
            out.append({**identity, "measure": "surprise", "value": _surprise(a, ids)})
    return out


def divergence(reference: Float[Tensor, "token vocabulary"], other: Float[Tensor, "token vocabulary"]) -> float:
    """Mean over tokens of KL(reference || other), nats, of log-probabilities."""
    return float((reference.exp() * (reference - other)).nan_to_num(0.0).sum(-1).mean().clamp_min(0.0))


def _surprise(log_probs: Float[Tensor, "token vocabulary"], ids: Sequence[int]) -> float:
    return float(-log_probs.gather(1, torch.tensor(ids[-len(log_probs):])[:, None]).mean())


def _settled(concept: Concept, cue: Cue, sense: str) -> list[Prompt]:
    """Sentences that settle a sense plainly, with both orders of the cue's first identifiers, marked."""
    names = {"marked": cue.marked[0], "unmarked": cue.unmarked[0]}
    contexts = concept.contexts[sense]
    return [fill(text, {"x": names[x], "y": names[y]}, {"x": x, "y": y}) for text in contexts.settled or contexts.test
            for x, y in (("marked", "unmarked"), ("unmarked", "marked"))]


# ---- right answers -----------------------------------------------------------------------------------------------------

Right = Callable[[HookedModel, Concept, Cue, int, int], tuple[list[str], list[float]]]


def _copying(model: HookedModel, concept: Concept, cue: Cue, word_pairs: int, seed: int) -> tuple[list[str], list[float]]:
    """Lists of the concept's words, asked to be copied."""
    words = list(dict.fromkeys(word for category in concept.categories.values() for word in (*category.positive, *category.negative)
                               if " " not in word))
    drawn = [random.Random(f"{seed}|{i}").sample(words, LISTED) for i in range(LISTS)]
    for form in _data()["copying"]:
        prompts = [Prompt(form.format(words=", ".join(some))) for some in drawn]
        if not any(unknown_words(model.tokenizer, item) for item in model.encode(prompts)):
            break
    else:
        raise ModelError(f"the tokenizer of {model.spec.name} does not know the words of any form of the copying task.")
    rows = model.rows(prompts, partial=True)
    answers = model.generate(rows, 5 * LISTED)
    texts = [without_thought(answer.text, row.prompt.text) or "" for answer, row in zip(answers, rows, strict=True)]
    said = [text.split("\n\n")[0].translate(SEPARATORS).split()[:LISTED] for text in texts]
    return [", ".join(some) for some in drawn], [float(some == words) for some, words in zip(said, drawn, strict=True)]


def asked_prompts(concept: Concept, cue: str | Cue, *, word_pairs: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """What `measure_side_effects` asks at most: what is answered (judging), and what is read."""
    cue = concept.cue(cue) if isinstance(cue, str) else cue
    settled = [one for sense in (concept.group_sense, concept.other_sense) for one in _settled(concept, cue, sense)]
    asked = [_asked(one, question.text, role, name) for one in settled for question in concept.interpretations.values()
             for role, name in (("marked", cue.marked[0]), ("unmarked", cue.unmarked[0]))]
    texts = [Prompt(text) for text in _data()["texts"]]
    judged = [prompt for some in _judged_prompts(concept, word_pairs, seed) for prompt in some]
    return judged, [*texts, *texts, *settled, *asked]


def _judged_prompts(concept: Concept, word_pairs: int, seed: int) -> list[list[Prompt]]:
    """The concept's implicit task with each bad and good option in the identifiers' place."""
    return [implicit_prompts(concept, Cue(f"{bad}-{good}", (bad,), (good,)), design="balanced", seed=seed, max_word_pairs=word_pairs)
            for bad, good in _data()["judged"]]


def _judging(model: HookedModel, concept: Concept, cue: Cue, word_pairs: int, seed: int) -> tuple[list[str], list[float]]:
    """The concept's implicit task with a bad and a good option in the identifiers' place. They are no identifiers: no edit is at them."""
    items, right = [], []
    for asked in _judged_prompts(concept, word_pairs, seed):
        rows = ask(model, concept, [replace(prompt, marks={}) for prompt in asked], Decoding(), partial=True)
        items += [f"{prompt.labels['cue']}|{prompt.labels['template']}|{prompt.labels['option_order']}|{prompt.labels['word_order']}|"
                  f"{prompt.labels['word_pair']}" for prompt in asked]
        right += [float(outcome == "stereotyped") for outcome in rows["outcome"]]
    return items, right


def _questions_of(sense: str) -> Right:
    """Every interpretation question about each identifier, after the `test` sentences that settle its sense."""
    def right(model: HookedModel, concept: Concept, cue: Cue, word_pairs: int, seed: int) -> tuple[list[str], list[float]]:
        prompts = [_asked(sentence, question.text, role, name) for sentence in _settled(concept, cue, sense)
                   for question in concept.interpretations.values()
                   for role, name in (("marked", cue.marked[0]), ("unmarked", cue.unmarked[0]))]
        senses = [sense, concept.other_sense if sense == concept.group_sense else concept.group_sense]
        probs = model.next_probs(model.treatment.rows(prompts), [concept.senses[name].word for name in senses])
        return [prompt.text for prompt in prompts], [float(a > b) for a, b in probs.tolist()]
    return right


def _asked(sentence: Prompt, question: str, role: str, name: str) -> Prompt:
    """A question after a sentence; its own mention of the identifier is marked too."""
    asked = fill(question, {"x": name}, {"x": role}).prefixed(sentence.text + " ")
    spans: dict[str, tuple[Span, ...]] = {key: (*sentence.marks.get(key, ()), *asked.marks.get(key, ())) for key in ("marked", "unmarked")}
    return replace(asked, marks=spans)
