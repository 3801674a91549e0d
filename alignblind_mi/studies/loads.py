"""How many tokens a part asks of a model, and how long they take, by what the loaded model needs for a few. Does NOT choose anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from statistics import fmean
from time import perf_counter

import torch

from alignblind_mi.measures.behaviour import ask
from alignblind_mi.measures.sources import thinned
from alignblind_mi.models.configs import load_tokenizer
from alignblind_mi.models.edits import Edit, Row
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.tokens import unknown_words
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.studies.config import StudyConfig, asked_concept
from alignblind_mi.studies.part import Load

SAMPLED = 40    # prompts of a load whose tokens are counted
FIRST, BATCH = (4, 16), 64    # rows that are timed; those that all are reckoned in batches of
LEAST_EACH = 0.25    # of what a row of a batch takes, for a row more
Kind = tuple[str, ...]


class TokenCount:
    """Tokens that a load reads, and those that it makes at most, by the tokenizer of a study's aligned model."""

    def __init__(self, config: StudyConfig) -> None:
        self.name, self.tokenizer, self.lengths = config.aligned.name, load_tokenizer(config.aligned), dict[str, int]()

    def __call__(self, load: Load) -> tuple[float, float]:
        """(read, made), of all rows. Of many prompts some are counted."""
        step = max(1, len(load.prompts) // SAMPLED)
        some = replace(load, prompts=load.prompts[::step])
        length = fmean(map(self._length, some.texts(self.tokenizer, self.name)))
        if load.scored:    # each of the answers is read behind its prompt, which has been read
            length += fmean(sum(map(self._answer, texts)) for texts in load.scored[::step])
        rows = len(load.prompts) * load.times
        return length * rows, float(rows * load.new_tokens)

    def _length(self, text: str, **how: bool) -> int:
        if text not in self.lengths:
            self.lengths[text] = len(self.tokenizer(text, **how)["input_ids"])
        return self.lengths[text]

    def _answer(self, text: str) -> int:
        return self._length(text, add_special_tokens=False)


def kind_of(load: Load) -> Kind:
    """What loads of one kind have in common: how the model runs them, so that a token of one takes as long as a token of another."""
    if load.new_tokens and not load.written:
        return "answers", str(load.prompts[0].labels.get("kind", ""))
    return ("texts" if load.new_tokens else "patches" if len(load.written) > 1 else "questions") if load.written else "readings",


def timed(model: HookedModel, config: StudyConfig, loads: Sequence[Load], tokens: Callable[[Load], tuple[float, float]], *,
          seconds: float) -> dict[Kind, float]:
    """Seconds per token, read or made, of each kind of load, in batches of 64 rows.

    4 and 16 rows of its largest are run, and 64 where that is to fit into `seconds` for all kinds; else what 64 take is drawn from the two,
    as a line. A token that is not made, since an answer ends, counts as made: that is how loads count them.
    """
    concept, found = asked_concept(config), dict[Kind, float]()
    kinds = list(dict.fromkeys(map(kind_of, loads)))

    def run(load: Load, rows: int) -> tuple[float, float, float]:
        few, start = _some(load, rows), perf_counter()
        _run(model, config, concept, few)
        return float(rows), perf_counter() - start, sum(tokens(few))

    for kind in kinds:
        same = sorted((one for one in loads if kind_of(one) == kind), key=lambda one: len(one.prompts) * one.times, reverse=True)
        load = next((known for one in same if (known := _known(model, one)).prompts), None)
        if load is None:
            found[kind] = 0.0    # no word of it is known: it is not asked
            continue
        most, left = min(BATCH, len(load.prompts) * (load.times if load.written else 1)), seconds / len(kinds)
        model.next_log_probs(load.prompts[:1])    # for warming up
        done = [run(load, min(rows, most)) for rows in FIRST]
        if most > FIRST[-1] and sum(taken for _, taken, _ in done) + _taken(done, most) < left:
            done = [done[-1], run(load, most)]
        rows, _, counted = done[-1]
        found[kind] = _taken(done, most) / most * rows / counted
    return found


def _taken(done: Sequence[tuple[float, float, float]], most: int) -> float:
    """Seconds of `most` rows, on the line through two timings (rows, seconds, tokens); a row more is never for nothing."""
    (fewer, quicker, _), (rows, taken, _) = done
    each = (taken - quicker) / (rows - fewer) if rows > fewer else 0.0
    return taken + max(each, LEAST_EACH * taken / rows) * (most - rows)


def _known(model: HookedModel, load: Load) -> Load:
    """A load without those prompts whose words the tokenizer does not know."""
    at = [i for i, item in enumerate(model.encode(load.prompts)) if not unknown_words(model.tokenizer, item)]
    return load if len(at) == len(load.prompts) else replace(
        load, prompts=[load.prompts[i] for i in at], scored=[load.scored[i] for i in at] if load.scored else ())


def _some(load: Load, rows: int) -> Load:
    """So many rows of a load, its prompts evenly thinned."""
    at = thinned(range(len(load.prompts)), rows)
    return replace(load, prompts=[load.prompts[i] for i in at], scored=[load.scored[i] for i in at] if load.scored else (),
                   times=max(1, rows // len(at)))


def _run(model: HookedModel, config: StudyConfig, concept: Concept, load: Load) -> None:
    """The rows of a load, as its part runs them."""
    if load.new_tokens and not load.written:
        ask(model, concept, [one for _ in range(load.times) for one in load.prompts], config.decoding, partial=True)
        return
    prompts = [one for one in load.prompts for _ in range(load.times)]
    rows = model.rows(prompts) if load.chat is not None else [Row(one) for one in prompts]
    if load.written:
        noise = torch.randn(len(rows), model.d_model, generator=torch.Generator().manual_seed(config.seed))
        sites = islice(cycle(load.written), len(rows))
        rows = [Row(row.prompt, (Edit(site, vector),)) for row, site, vector in zip(rows, sites, noise, strict=True)]
    if load.new_tokens:
        model.generate(rows, load.new_tokens, temperature=config.decoding.temperature, seed=config.seed,
                       draws=[str(i) for i in range(len(rows))])
    else:
        model.next_log_probs(rows)


def seconds_of(loads: Sequence[Load], rates: Mapping[Kind, float], tokens: Callable[[Load], tuple[float, float]]) -> float:
    """How long some loads take at these rates."""
    return sum(rates[kind_of(load)] * sum(tokens(load)) for load in loads)
