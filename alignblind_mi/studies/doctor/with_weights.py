"""What is checked of a loaded model: engines, padding, cache, lens, bridge, adapter, number formats. Does NOT judge its answers."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.errors import AlignblindError
from alignblind_mi.models.adapters import adapted, merge_in_place, with_adapters
from alignblind_mi.models.blocks import text_config, tolerance
from alignblind_mi.models.edits import Edit, Row, Site, Treatment
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.tokens import TokenRow
from alignblind_mi.models.trial import try_adapters
from alignblind_mi.models.twin import Twin, share_weights
from alignblind_mi.stimuli.prompts import Prompt, Span, assignments
from alignblind_mi.studies.doctor.check import Check, at_least, at_most
from alignblind_mi.studies.doctor.without_weights import DRIFT_PROMPTS, STEPS, Subject
from alignblind_mi.studies.forecast import model_fits

FLIPS = 0.05    # share of answers that other numbers may change


@dataclass(frozen=True, eq=False)
class Loaded:
    """The model, and the same weights run by transformers alone: eager attention, one row at a time, no padding, no cache."""

    subject: Subject
    model: HookedModel

    @cached_property
    def reference(self) -> Any:
        """A copy of the model's modules on the same weights, with transformers' eager attention."""
        module = share_weights(self.model.engine.model)
        module.set_attn_implementation("eager")
        return module

    @cached_property
    def rows(self) -> list[TokenRow]:
        """The trial prompts in tokens."""
        return self.model.token_rows([Row(prompt) for prompt in self.subject.trial])

    @cached_property
    def found(self) -> Float[Tensor, "row vocabulary"]:
        """Next-token log-probabilities of the trial by the model's engine, in a batch."""
        return next_log_probs(self.model.engine, self.rows)

    def alone(self, ids: Sequence[int]) -> Float[Tensor, "token vocabulary"]:
        """Log-probabilities after every token of one row, by the reference."""
        with torch.no_grad():
            out = self.reference(torch.tensor([list(ids)], device=self.model.engine.device), use_cache=False)
        return out.logits[0].float().log_softmax(-1).cpu()

    @property
    def bound(self) -> float:
        """How far rounding may take two computations apart, in nats."""
        return tolerance(self.model.engine.model)


def next_log_probs(engine: Any, rows: Sequence[TokenRow]) -> Float[Tensor, "row vocabulary"]:
    """Next-token log-probabilities of rows by an engine, adapters as they are."""
    out = torch.empty(len(rows), text_config(engine.model).vocab_size)
    with torch.no_grad():
        for batch in engine.batches(rows, None):
            out[batch.index] = batch.logits().log_softmax(-1).cpu()
    return out


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


WRONG_ENGINE = "choose the plain engine (--engine plain) and check again; report the model's name"


def engine_checks(loaded: Loaded) -> Iterator[Check]:
    """Whether the engine gives the model's own numbers."""
    model = loaded.model
    alone = torch.stack([loaded.alone(row.ids)[-1] for row in loaded.rows])
    check = at_most("engine", _apart(loaded.found, alone), loaded.bound, "nats",
                     f"the {model.engine.name} engine against transformers, one row at a time", WRONG_ENGINE)
    if check.status == "ok" and model.engine.name == "plain" and model.spec.engine != "plain":
        check = replace(check, status="warn", advice="the fast engine cannot run this model: expect several times the time")
    yield check
    if model.engine.name == "plain":
        yield Check("engine with edits", "skipped", "the plain engine has nothing to be compared with")
        return
    plain = PlainEngine(loaded.reference, model.engine.budget)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.d_model, generator=generator)
    edits = [(Edit(Site(layer, "marked"), vector, how),) for layer in {0, model.n_layers // 2, model.n_layers - 1}
             for how in ("replace", "add", "ablate")]
    rows = model.token_rows([Row(loaded.subject.trial[0], edit) for edit in edits])
    yield at_most("engine with edits", _apart(next_log_probs(model.engine, rows), next_log_probs(plain, rows)), loaded.bound, "nats",
                   f"{len(rows)} edited rows, fast against plain", WRONG_ENGINE)


def padding_parity_checks(loaded: Loaded) -> Iterator[Check]:
    """Whether a row beside others is the row alone."""
    one_by_one = torch.cat([next_log_probs(loaded.model.engine, [row]) for row in loaded.rows])
    lengths = [len(row.ids) for row in loaded.rows]
    yield at_most("padding", _apart(loaded.found, one_by_one), loaded.bound, "nats",
                   f"a batch of rows of {min(lengths)} to {max(lengths)} tokens against each alone", WRONG_ENGINE)


def cache_checks(loaded: Loaded) -> Iterator[Check]:
    """Greedy decoding with the key-value cache, against reading everything anew."""
    worst, model = 0.0, loaded.model
    with torch.no_grad():
        for batch in model.engine.batches(loaded.rows, STEPS):
            made, said = [], [batch.logits().log_softmax(-1).cpu()]
            for _ in range(STEPS):
                made.append(said[-1].argmax(-1))
                said.append(batch.extend(made[-1][:, None], torch.ones(len(batch.index), 1, dtype=torch.bool))[:, -1].log_softmax(-1).cpu())
            for k, i in enumerate(batch.index):
                ids = [*loaded.rows[i].ids, *(int(step[k]) for step in made)]
                worst = max(worst, _apart(torch.stack([step[k] for step in said]), loaded.alone(ids)[len(loaded.rows[i].ids) - 1 :]))
    yield at_most("key-value cache", worst, loaded.bound, "nats", f"{STEPS} tokens decoded with the cache against a full forward pass",
                   WRONG_ENGINE)


def lens_checks(loaded: Loaded) -> Iterator[Check]:
    """The logit lens at the last layer is the model's own answer."""
    model = loaded.model
    if not loaded.subject.senses:
        yield Check("logit lens", "skipped", "there are no senses to be read")
        return
    words = loaded.subject.senses
    prompts = [replace(prompt, marks={**prompt.marks, "end": (_last_span(model, prompt),)}) for prompt in loaded.subject.trial]
    try:
        read = model.lens_log_probs([Row(prompt) for prompt in prompts], [Site(model.n_layers - 1, "end")], words)[:, 0]
    except AlignblindError as error:
        yield Check("logit lens", "fail", str(error),
                    advice="a study would stop at its lens part: run bias, awareness (without the lens) and patch one by one instead")
        return
    ids = torch.tensor([model.token_id(word) for word in words])
    yield at_most("logit lens", _apart(read, loaded.found[:, ids]), loaded.bound, "nats", "at the last layer against the model's answer",
                   "do not read the logit lens on this model")


def _last_span(model: HookedModel, prompt: Prompt) -> Span:
    return Span(*model.encode([prompt])[0].offsets[-1])


def bridge_checks(loaded: Loaded) -> Iterator[Check]:
    """transformer-lens' view of the same weights. Studies need it for nothing but the view of attention."""
    model, advice = loaded.model, "studies run; hook points, attention views and path patching would not be those of the model"
    try:
        with torch.no_grad(), model.edited_bridge(loaded.rows) as (bridge, ids, mask):
            logits = bridge.forward(ids, attention_mask=mask)[:, -1].float().log_softmax(-1).cpu()
    except AlignblindError as error:
        yield Check("transformer-lens", "warn", str(error), advice=advice)
        return
    yield at_most("transformer-lens", _apart(logits, loaded.found), loaded.bound, "nats", "its bridge against the engine", advice,
                   worse="warn")


def adapter_checks(loaded: Loaded) -> Iterator[Check]:
    """Off is the base model, on is another, merged is on. Done last: merging changes the weights."""
    model, subject, base = loaded.model, loaded.subject, loaded.found
    assert subject.adapter is not None
    peft = with_adapters(model.engine.model, [subject.adapter], subject.spec)
    try_adapters(model.engine, subject.spec, adapted(peft))
    carried = replace(model, peft=peft, twin=Twin(model.spec, peft, model.tokenizer))
    rows, (name,) = [Row(prompt) for prompt in subject.trial], carried.adapters
    yield at_most("adapter off", _apart(carried.next_log_probs(rows), base), UNCHANGED, "nats",
                   f"{name} loaded and off, against the model without it",
                   "the adapter changes the model even when it is off: do not use it for comparisons")
    on = carried.under(Treatment(name, adapter=name)).next_log_probs(rows)
    yield at_least("adapter on", _apart(on, base), CHANGED, "nats", f"{name} on, against the model without it",
                    "it does nothing on these prompts: was it trained, and for this model's modules?")
    if subject.spec.quantization is not None:
        yield Check("adapter merged", "skipped", "merging into quantised weights rounds them")
        return
    merge_in_place(peft, name)
    yield at_most("adapter merged", _apart(next_log_probs(model.engine, loaded.rows), on), max(loaded.bound, UNCHANGED), "nats",
                   f"{name} merged into the weights, against {name} on", "export the adapter unmerged, or merge it in float32")


@dataclass(frozen=True, eq=False)
class Answers:
    """Of some prompts: the next token, and the log-odds (nats) of the two complete assignments."""

    next_token: Tensor
    log_odds: Float[Tensor, " prompt"]


def answers_of(model: HookedModel, subject: Subject, n: int) -> Answers:
    """What a model answers to `n` prompts: the next token, and the log-odds of the two assignments."""
    prompts = subject.sample(n)
    rows = [Row(prompt) for prompt in prompts]
    both = model.continuation_log_probs(rows, [assignments(subject.concept, prompt) for prompt in prompts])
    return Answers(model.next_log_probs(rows).argmax(-1), both[:, 0] - both[:, 1])


def drift_checks(subject: Subject, before: Answers) -> Iterator[Check]:
    """The same prompts in float32, or in bfloat16 where float32 is what was asked for."""
    spec = subject.spec
    plain_float = spec.dtype == "float32" and spec.quantization is None
    other = replace(spec, dtype="bfloat16" if plain_float else "float32", quantization=None)
    gc.collect()
    _, free, fits = model_fits(other, subject.config)
    wanted = next(one for one in fits if one.numbers == other.dtype)
    if not wanted.fits:
        yield Check("drift", "skipped", f"in {other.dtype} it does not fit here ({wanted.weights / 2**30:.1f} of {free / 2**30:.1f} GiB)")
        return
    after, n = answers_of(load_model(other), subject, DRIFT_PROMPTS), len(before.log_odds)
    numbers = f"{spec.quantization or spec.dtype} against {other.dtype}, {n} prompts"
    tokens = float((before.next_token != after.next_token).float().mean())
    signs = float(((before.log_odds > 0) != (after.log_odds > 0)).float().mean())
    shift = float((before.log_odds - after.log_odds).abs().mean())
    advice = (f"run the study in float32, as now: {other.dtype} would change answers" if plain_float
              else "run in float32, or compare rates of many answers, never single ones")
    yield at_most("drift of next tokens", tokens, FLIPS, "share changed", numbers, advice, worse="warn")
    yield at_most("drift of log-odds", signs, FLIPS, "share of signs changed", f"{numbers}; shifted by {shift:.2g} nats on average",
                   advice, worse="warn")


UNCHANGED, CHANGED = 1e-5, 1e-4    # nats: an adapter that is off must not change more, one that is on must change at least so much
