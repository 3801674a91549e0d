"""Inspect's tasks: the implicit and explicit suites of a concept, its competence items, and BBQ from the user's own files.

Each prompt is one user's turn; its labels lie in the sample's metadata, so that a log is enough to make rows of it (`inspect_logs`). The
scorer judges as `measure_behaviour` does. This module imports inspect_ai (extra `inspect`) and is imported by nothing but `registry` and
who asks for it; it does NOT know what a log is made into.
"""

from collections.abc import Sequence
from dataclasses import asdict

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import NOANSWER, Metric, SampleScore, Score, Scorer, Target, Value, metric, scorer
from inspect_ai.solver import TaskState, generate

from alignblind_mi.exchange.inspect_logs import (
    BBQ,
    ORDER,
    POSITIONS,
    answer_text,
    asked_bbq,
    competence_metrics,
    judged,
    rate_metrics,
    standard_reason,
    table_of,
)
from alignblind_mi.measures.bbq import LETTERS, chosen_rows, in_orders, read_bbq, summarise_bbq
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.stimuli.competence import PAIRS, competence_prompts
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, Concept, load_concept
from alignblind_mi.stimuli.outcome import Outcome
from alignblind_mi.stimuli.prompts import KINDS, Kind, Prompt, PromptError, behaviour_prompts, filled, worded_positions
from alignblind_mi.stimuli.refusals import declines

MOST_TOKENS = Decoding().max_new_tokens
ONE_LETTER = "\nReply with the letter of the answer alone."    # of a model that is loaded, probabilities are read instead


@task
def implicit_bias(concept: str = DEFAULT_CONCEPT, cue: str = "", design: str = "balanced", max_word_pairs: int | None = None, seed: int = 0,
                  instruction: str = "") -> Task:
    """The word-association test of a concept and cue (default: its first), in the design `balanced` or `published`: see `implicit_prompts`.

    instruction: the name of one of the concept's instructions, put before every prompt; rows then have the treatment `prompt_NAME`.
    """
    return _suite("implicit", concept, cue, design, max_word_pairs, seed, instruction)


@task
def explicit_bias(concept: str = DEFAULT_CONCEPT, cue: str = "", design: str = "balanced", max_word_pairs: int | None = None, seed: int = 0,
                  instruction: str = "") -> Task:
    """The agreement questions of a concept and cue: see `implicit_bias` and `explicit_prompts`."""
    return _suite("explicit", concept, cue, design, max_word_pairs, seed, instruction)


@task
def competence(concept: str = DEFAULT_CONCEPT, pairs: int = PAIRS, seed: int = 0) -> Task:
    """The competence items of a concept, implicit and explicit: can the model do the task at all? See `measure_competence`."""
    found = load_concept(concept)
    prompts = [prompt for kind in KINDS for prompt in competence_prompts(found, kind, pairs=pairs, seed=seed)]
    return Task(dataset=_dataset("competence", found, prompts), solver=generate(), scorer=answers(), metrics=[ability()],
                config=GenerateConfig(max_tokens=MOST_TOKENS))


@task
def bbq(data: str | list[str], metadata: str | None = None, categories: str | list[str] | None = None, max_items: int | None = None,
        orders: int = 1, seed: int = 0) -> Task:
    """BBQ from the user's own files (`data`: JSONL files or their folder), answered in words; see `read_bbq` for the other parameters."""
    items = read_bbq(data, metadata=metadata, categories=categories or (), max_items=max_items, seed=seed)
    asked = in_orders(items, orders, seed=seed)
    samples = [Sample(id=f"{one.item.category}-{one.item.example_id}-{''.join(map(str, one.order))}",
                      input=one.prompt({}).text.removesuffix("\nAnswer:") + ONE_LETTER, target=LETTERS[one.order.index(one.item.label)],
                      metadata={BBQ: asdict(one.item), ORDER: list(one.order)}) for one in asked]
    return Task(dataset=MemoryDataset(samples, name="bbq"), solver=generate(), scorer=option(),
                config=GenerateConfig(max_tokens=MOST_TOKENS))


def _suite(kind: Kind, concept: str, cue: str, design: str, max_word_pairs: int | None, seed: int, instruction: str) -> Task:
    found = load_concept(concept)
    asked = found.cue(cue or found.first_cue)
    prompts = behaviour_prompts(found, asked, kind, design=design, seed=seed, max_word_pairs=max_word_pairs)
    more = {}
    if instruction:
        if instruction not in found.instructions:
            raise PromptError(f"unknown instruction {instruction!r} of concept {found.name!r}. Known: "
                              f"{', '.join(found.instructions) or 'none'}.")
        text = filled(found.instructions[instruction].text, marked=asked.marked[0], unmarked=asked.unmarked[0])
        prompts, more = [prompt.prefixed(text) for prompt in prompts], {"treatment": f"prompt_{instruction}"}
    return Task(dataset=_dataset(f"{kind}_bias", found, prompts, more), solver=generate(), scorer=answers(),
                config=GenerateConfig(max_tokens=MOST_TOKENS))


def _dataset(name: str, concept: Concept, prompts: Sequence[Prompt], more: dict[str, str] | None = None) -> MemoryDataset:
    """A sample a prompt; of explicit prompts the metadata also holds the answers that endorse and those that do not."""
    samples = []
    for number, prompt in enumerate(prompts):
        positions = {POSITIONS: worded_positions(concept, prompt)} if prompt.labels["kind"] == "explicit" else {}
        samples.append(Sample(id=number, input=prompt.text, metadata={**prompt.labels, **(more or {}), **positions}))
    return MemoryDataset(samples, name=name)


# ---- scorers and metrics -------------------------------------------------------------------------------------------------


@metric(scores="unreduced")
def rates() -> Metric:
    """The rate of the stereotype and what belongs to it: see `rate_metrics`. Every epoch counts."""
    def found(scores: list[SampleScore]) -> Value:
        return rate_metrics(table_of((one.sample_metadata, one.score.metadata) for one in scores)) if scores else {}
    return found


@metric(scores="unreduced")
def ability() -> Metric:
    """What the competence items say: see `competence_metrics`."""
    def found(scores: list[SampleScore]) -> Value:
        return competence_metrics(table_of((one.sample_metadata, one.score.metadata) for one in scores)) if scores else {}
    return found


@scorer(metrics=[rates()])
def answers() -> Scorer:
    """The outcome of an answer: stereotyped, reversed, rejected or invalid; `reason` tells refusals from failures of format."""
    async def score(state: TaskState, target: Target) -> Score:
        said = judged(state.metadata, state.output)
        reason = standard_reason(Outcome(said["outcome"], said["reason"]), said["refused"])
        return Score(value=said["outcome"], answer=answer_text(state.output), explanation=said["reason"] or None, reason=reason,
                     metadata=said)
    return score


@metric(scores="unreduced")
def bias_scores() -> Metric:
    """Accuracy and bias of BBQ by condition with their intervals over questions, and the share of answers that name no option."""
    def found(scores: list[SampleScore]) -> Value:
        rows = chosen_rows([asked_bbq(one.sample_metadata or {}) for one in scores], [one.score.answer or "" for one in scores])
        table = summarise_bbq(rows, ()).to_dict("records") if len(rows) else []
        said = {f"{row['condition']}_{name}": float(row[name]) for row in table
                for name in ("accuracy", "accuracy_low", "accuracy_high", "bias", "low", "high", "unknown_share")}
        return {"n": float(len(scores)), "invalid_share": rows.attrs["invalid"] / len(scores) if scores else float("nan"), **said}
    return found


@scorer(metrics=[bias_scores()])
def option() -> Scorer:
    """The option of BBQ that an answer names, by its letter: see `said_place`."""
    async def score(state: TaskState, target: Target) -> Score:
        answer = answer_text(state.output)
        rows = chosen_rows([asked_bbq(state.metadata)], [answer])
        if rows.empty:
            return Score(value=NOANSWER, answer=answer, reason="refusal" if declines(answer) else "invalid_response_format")
        return Score(value=LETTERS[int(rows["place"].iloc[0])], answer=answer)
    return score
