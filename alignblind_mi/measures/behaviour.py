"""Behaviour: what does the model answer, and how probable were the two complete answers?

One row per answer. Nothing here knows how a treatment works: the model it is given is already under one.
"""

from collections.abc import Callable, Sequence
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
from alignblind_mi.progress import counted
from alignblind_mi.stimuli.answers import judge
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.prompts import Design, Kind, Prompt, PromptError, Prompts, as_prompts, behaviour_prompts, worded_assignments
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
        choices = _choices(model, concept, [prompts[i] for i in index]) if kind == "implicit" else [[] for _ in index]
        most = max(map(len, choices), default=0)
        asked = [texts + texts[:1] * (most - len(texts)) for texts in choices] if most else None    # as many for every row
        made = model.generate([rows[i] for i in index], decoding.max_new_tokens, temperature=decoding.temperature, seed=decoding.seed,
                              continuations=asked, progress=progress)
        answers |= zip(index, made, strict=True)
        scored |= {i: one.choices[: len(texts)] for i, one, texts in zip(index, made, choices, strict=True)}
    records = []
    for i, row in enumerate(rows):
        answer, outcome = answers[i], judge(answers[i].text, prompts[i].labels, prompt=row.prompt.text)
        records.append({**prompts[i].labels, "prompt": row.prompt.text,
                        "answer": answer.text, "finished": answer.finished, "n_tokens": answer.n_tokens,
                        "outcome": outcome.label, "reason": outcome.reason, **_scores(() if is_thinking(row.prompt.text) else scored[i]),
                        **{f"decoding_{key}": value for key, value in asdict(decoding).items()}})
    return records


def _choices(model: HookedModel, concept: Concept, prompts: Sequence[Prompt]) -> list[list[str]]:
    """The two complete answers to each prompt as the model would go on with them, wording by wording: stereotyped, reversed, ...

    The concept's own wording and those others that the tokenizer knows.
    """
    found = [[[text if model.chat is None else text.lstrip() for text in both] for both in worded_assignments(concept, prompt)]
             for prompt in prompts]
    known = known_texts(model.tokenizer, (text for each in found for both in each[1:] for text in both))
    return [[text for both in (each[0], *(other for other in each[1:] if known.issuperset(other))) for text in both] for each in found]


def _scores(choices: Sequence[float]) -> dict[str, float]:
    """Columns of the scored assignments, from their log-probabilities wording by wording: stereotyped, reversed, ..."""
    if not choices:
        return dict.fromkeys(("log_p_stereotyped", "log_p_reversed", "log_odds", "log_odds_first"), float("nan")) | {"wordings": 0}
    sides = [float(np.logaddexp.reduce(np.array(choices[side::2], dtype=float))) for side in (0, 1)]
    return {"log_p_stereotyped": sides[0], "log_p_reversed": sides[1], "log_odds": sides[0] - sides[1],
            "log_odds_first": choices[0] - choices[1], "wordings": len(choices) // 2}
