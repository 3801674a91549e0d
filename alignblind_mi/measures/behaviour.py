"""Behaviour: what does the model answer, and how probable were the two complete answers?

One row per answer. Nothing here knows how a treatment works: the model it is given is already under one.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd

from alignblind_mi.borders.settings import Count, Listed, Seed, Temperature, Tokens, check_fields, many, takes
from alignblind_mi.models.decoding import Generation
from alignblind_mi.models.edits import Row, Treatment, Treatments, check_treatments
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.tokens import known_texts
from alignblind_mi.models.view import knowing_borders
from alignblind_mi.progress import counted
from alignblind_mi.stimuli.answers import judge
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.prompts import (
    Design,
    Kind,
    Prompt,
    PromptError,
    Prompts,
    as_prompts,
    behaviour_prompts,
    worded_assignments,
    worded_positions,
)
from alignblind_mi.stimuli.thoughts import is_thinking


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: greedily (temperature 0, the paper's way) or sampled with a seed; at most `max_new_tokens`."""

    max_new_tokens: Tokens = 40
    temperature: Temperature = 0.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, ModelError)


@takes(PromptError)
def measure_behaviour(model: HookedModel, concept: Concept, cue: str | Cue, *, design: Design | str = "balanced",
                      kinds: Annotated[Sequence[Kind], Listed(some=True)] = ("implicit", "explicit"),
                      decoding: Decoding | None = None, seed: Seed = 0, max_word_pairs: Count | None = None,
                      progress: Callable[[int], None] | None = None) -> pd.DataFrame:
    """Ask every prompt of a design (of one kind or several) and judge the answers with the robust rule.

    Columns: the prompt's labels, model, treatment, prompt, answer, finished, n_tokens, outcome, reason, log_p_stereotyped,
    log_p_reversed, log_odds, log_odds_first, wordings. `log_p_*` (nats) is the log-probability that the answer begins with that complete
    assignment, in the prompt's word order, summed over `wordings` ways to write it (`prompts.worded_assignments`: the concept's own and
    those of `wordings.toml` that the tokenizer knows, the same for both assignments); `log_odds` is their difference, `log_odds_first`
    that of the concept's own wording alone. They are never invalid, and NaN for explicit prompts, and where a chat template begins a
    thought (an answer does not stand there). Where both together are `improbable`, log-odds compare two answers that are hardly given.
    Of explicit prompts the same stands in log_p_endorsed, log_p_refused and log_odds_endorsed: that the answer begins with agreement, or a
    rating of 4 or 5, against disagreement, or a rating of 1 or 2 (`prompts.worded_positions`); NaN for implicit prompts.

    A view in a chat (`HookedModel.in_chat`) is asked in it: `prompt` is then the whole rendered text, and the assignments that are scored
    begin without their blank, as an assistant's answer does.

    Errors: ModelError if the tokenizer does not know a word that would be asked.
    """
    prompts = [p for kind in kinds for p in behaviour_prompts(concept, cue, kind, design=design, seed=seed, max_word_pairs=max_word_pairs)]
    return ask(model, concept, prompts, decoding or Decoding(), progress)


def ask(model: HookedModel, concept: Concept, prompts: Sequence[Prompt], decoding: Decoding,
        progress: Callable[[int], None] | None = None, *, partial: bool = False) -> pd.DataFrame:
    """The rows of `measure_behaviour` for prompts of one's own choice; `partial` as in `Treatment.rows`."""
    return ask_under(model, concept, prompts, [model.treatment], decoding, progress, partial=partial)


@takes(ModelError)
def ask_under(model: HookedModel, concept: Concept, prompts: Prompts, treatments: Treatments, decoding: Decoding,
              progress: Callable[[int], None] | None = None, *, partial: bool = False) -> pd.DataFrame:
    """The rows of `ask` under each of several treatments, the same as one after the other.

    Treatments by edits and prefixes are run together, so that they share what is computed before their first edit; each adapter has a run.

    Errors: EditError for no treatment, and for two of one name.
    """
    prompts, treatments = as_prompts(prompts), many(treatments)
    check_treatments(treatments)
    found: dict[int, pd.DataFrame] = {}
    with counted(f"asking {model.spec.name}", len(prompts) * len(treatments)):
        for adapter in dict.fromkeys(treatment.adapter for treatment in treatments):
            some = [i for i, treatment in enumerate(treatments) if treatment.adapter == adapter]
            view = model.under(Treatment("", adapter=adapter))
            parts = _ask_together(view, concept, prompts, [treatments[i] for i in some], decoding, progress, partial)
            found |= dict(zip(some, parts, strict=True))
    return pd.concat([found[i] for i in range(len(treatments))], ignore_index=True)


def _ask_together(model: HookedModel, concept: Concept, prompts: Sequence[Prompt], treatments: Sequence[Treatment], decoding: Decoding,
                  progress: Callable[[int], None] | None, partial: bool) -> list[pd.DataFrame]:
    rows = [row for treatment in treatments for row in model.under(treatment).rows(prompts, partial=partial)]
    model.check_known([row.prompt for row in rows])
    asked = [prompt for _ in treatments for prompt in prompts]
    found = _answers(model, concept, rows, asked, decoding, progress)
    n = len(prompts)
    return [pd.DataFrame.from_records([{"model": model.spec.name, "treatment": treatment.name} | record
                                       for record in found[k * n : (k + 1) * n]]) for k, treatment in enumerate(treatments)]


def _answers(model: HookedModel, concept: Concept, rows: Sequence[Row], prompts: Sequence[Prompt], decoding: Decoding,
             progress: Callable[[int], None] | None) -> list[dict[str, Any]]:
    answers: dict[int, Generation] = {}
    scored: dict[int, Sequence[float]] = {}
    for kind in ("implicit", "explicit"):
        index = [i for i, prompt in enumerate(prompts) if prompt.labels["kind"] == kind]
        choices = _choices(model, concept, [prompts[i] for i in index], kind)
        most = max(map(len, choices), default=0)
        filler = next((texts[:1] for texts in choices if texts), [])    # as many for every row
        asked = [texts + filler * (most - len(texts)) for texts in choices] if most else None
        with knowing_borders() if kind == "explicit" else nullcontext():
            made = model.generate([rows[i] for i in index], decoding.max_new_tokens, temperature=decoding.temperature, seed=decoding.seed,
                                  continuations=asked, progress=progress)
        answers |= zip(index, made, strict=True)
        scored |= {i: one.choices[: len(texts)] for i, one, texts in zip(index, made, choices, strict=True)}
    records, nothing = [], {name: _scores((), name) for name in ("implicit", "explicit")}
    for i, row in enumerate(rows):
        kind = prompts[i].labels["kind"]
        said = {**nothing["implicit"], **nothing["explicit"], **_scores(() if is_thinking(row.prompt.text) else scored[i], kind)}
        answer, outcome = answers[i], judge(answers[i].text, prompts[i].labels, prompt=row.prompt.text)
        records.append({**prompts[i].labels, "prompt": row.prompt.text,
                        "answer": answer.text, "finished": answer.finished, "n_tokens": answer.n_tokens,
                        "outcome": outcome.label, "reason": outcome.reason, **said,
                        **{f"decoding_{key}": value for key, value in asdict(decoding).items()}})
    return records


def _choices(model: HookedModel, concept: Concept, prompts: Sequence[Prompt], kind: str) -> list[list[str]]:
    """The two answers to each prompt as the model would go on with them, wording by wording: stereotyped, reversed, ... (of explicit
    prompts endorsed, refused, ...).

    The concept's own wording, and those others that the tokenizer knows.
    """
    worded, own = (worded_assignments, 1) if kind == "implicit" else (worded_positions, 0)
    found = [[[text if model.chat is None else text.lstrip() for text in both] for both in worded(concept, prompt)] for prompt in prompts]
    known = known_texts(model.tokenizer, (text for each in found for both in each[own:] for text in both))
    kept = [[*each[:own], *(other for other in each[own:] if known.issuperset(other))] for each in found]
    return [[text for both in (each if own else _begun_once(model, each)) for text in both] for each in kept]


def _begun_once(model: HookedModel, pairs: list[list[str]]) -> list[list[str]]:
    """The wordings, each once, none of which begins, token by token, as another one: it has been counted with that."""
    pairs = [list(pair) for pair in dict.fromkeys(map(tuple, pairs))]
    ids = [tuple(model.tokenizer(pair[0], add_special_tokens=False)["input_ids"]) for pair in pairs]
    return [pair for pair, own in zip(pairs, ids, strict=True) if not any(own[: len(one)] == one for one in ids if one != own)]


def _scores(choices: Sequence[float], kind: str) -> dict[str, float]:
    """Columns of the scored answers, from their log-probabilities wording by wording: stereotyped, reversed, ..., or endorsed, refused."""
    sides = [float(np.logaddexp.reduce(np.array(choices[side::2], dtype=float))) if choices else float("nan") for side in (0, 1)]
    if kind == "explicit":
        return {"log_p_endorsed": sides[0], "log_p_refused": sides[1], "log_odds_endorsed": sides[0] - sides[1]}
    return {"log_p_stereotyped": sides[0], "log_p_reversed": sides[1], "log_odds": sides[0] - sides[1],
            "log_odds_first": choices[0] - choices[1] if choices else float("nan"), "wordings": len(choices) // 2}
