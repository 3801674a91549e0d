"""Which engine runs a model: the fast one where it gives the model's own numbers on a small trial. Does NOT know prompts."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.reading import foreign, said
from alignblind_mi.models.blocks import device_shares, input_device, is_llama_like, text_config, tolerance, trial_ids
from alignblind_mi.models.budget import Budget, RowCost
from alignblind_mi.models.decoding import refuse_nan
from alignblind_mi.models.engine import Engine
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.spec import DTYPES, ModelError, ModelSpec, not_finite
from alignblind_mi.models.tokens import TokenEdit, TokenRow, place

log = logging.getLogger(__name__)


BROKEN = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)    # a forward pass's end


Adapted = Iterable[tuple[str, list[int], Float[Tensor, "token vocab"]]]    # see `adapters.adapted`


def choose_engine(spec: ModelSpec, model: Any) -> Engine | PlainEngine:
    """The engine that a spec asks for; `auto` is the fast one if it gives the model's own numbers on a small trial, and says if not.

    Errors: ModelError if the fast engine is asked for and cannot run the model, and for a model that no engine can run.
    """
    with foreign(f"the configuration of {spec.name} cannot be used", ModelError):
        cost = RowCost.of(model.config, DTYPES[str(spec.dtype)].itemsize)
    plain = PlainEngine(model, Budget(cost, input_device(model), shares=device_shares(model)))
    try:
        expected = _settle(spec, plain)    # before the fast engine changes the model's attention
    except FloatingPointError as error:
        raise not_finite(spec) from error
    return plain if spec.engine == "plain" else _fast_or(plain, spec, expected)


def _fast_or(plain: PlainEngine, spec: ModelSpec, expected: list[Tensor]) -> Engine | PlainEngine:
    """The fast engine if it runs the model as expected, or the plain one. Errors: ModelError where the fast one is asked for."""
    model, own = plain.model, plain.model.config._attn_implementation
    wrong = "its layers are not laid out as Llama's"
    if is_llama_like(model):
        fast = Engine(model, plain.budget)
        try:
            difference = _apart(_trial(fast), expected)
            wrong = "" if difference <= tolerance(model) else f"its log-probabilities differ from the model's own by {difference:.2g}"
        except (RuntimeError, TypeError, ValueError, AttributeError, FloatingPointError) as error:
            wrong = f"its layers cannot be called one by one ({error})"
        if not wrong:
            return fast
        model.set_attn_implementation(own)
    if spec.engine == "fast":
        raise ModelError(f"the fast engine cannot run {spec.name}: {wrong}. Use engine='plain' (or auto).")
    log.warning("%s runs on the plain engine: %s.", spec.name, wrong)
    return plain


def try_adapters(engine: Engine | PlainEngine, spec: ModelSpec, adapted: Adapted) -> None:
    """Whether an engine gives what PEFT computes with each adapter on (`adapted` turns one after the other on). Errors: ModelError."""
    for name, ids, answers in adapted:
        apart = _apart_from(engine, ids, answers)
        if not apart <= tolerance(engine.model):
            advice = "" if isinstance(engine, PlainEngine) else " Try engine='plain'."
            raise ModelError(f"the adapter {name} cannot be used on {spec.name}: with it on, log-probabilities are {apart:.2g} apart from "
                             f"PEFT's own, as of an adapter that acts on some tokens only.{advice}")


def _apart_from(engine: Engine | PlainEngine, ids: list[int], answers: Float[Tensor, "token vocab"]) -> float:
    """How far an engine's log-probabilities are from others, after a whole row of tokens and two of its beginnings, run together."""
    ends = [len(ids), 20, 7]
    found = torch.empty(len(ends), answers.shape[1])
    with torch.no_grad():
        for batch in engine.batches([TokenRow(tuple(ids[:end])) for end in ends], 0):
            found[batch.index] = batch.logits().log_softmax(-1).cpu()
    return float((found - answers[[end - 1 for end in ends]]).abs().max())


def _settle(spec: ModelSpec, plain: PlainEngine) -> list[Tensor]:
    """What the trial should give; the plain engine's `padded` and `cached` are set to what the model bears.

    Expected is what single rows give without padding and cache; that in turn is held against the model's own forward pass, and a token's
    answer against the same token's with others behind it. Errors: ModelError for a model whose rows cannot be run, or that is not causal.
    """
    plain.padded = plain.cached = False
    try:
        expected, (first, then, within) = _trial(plain), _own(plain)
    except BROKEN as error:
        raise ModelError(f"{spec.name} ({type(plain.model).__name__}) cannot be run: its forward pass ends in "
                         f"{said(error)}.") from error
    near = tolerance(plain.model)
    if float((within - first).abs().max()) > near:
        raise ModelError(f"{spec.name} ({type(plain.model).__name__}) is not a causal language model: what it says after a token "
                         "depends on the tokens that follow.")
    apart = _apart([part[ALONE] for part in expected[:3]], [first, then, then])
    if apart > near:
        raise ModelError(f"{spec.name} cannot be run: with our hooks and positions its log-probabilities differ from its own by "
                         f"{apart:.2g}.")
    found = []
    for plain.padded, plain.cached in ((True, True), (True, False), (False, False)):
        if not plain.padded:
            break
        try:
            difference = _apart(_trial(plain), expected)
            if difference <= near:
                break
            found.append(f"log-probabilities {difference:.2g} apart")
        except (*BROKEN, FloatingPointError) as error:
            found.append(said(error))
    if not plain.cached:
        how = "" if plain.padded else ", and rows of different lengths do not run together"
        log.warning("%s keeps no keys and values that can be used (%s): it is read from the beginning at every token%s. Slow, and right.",
                    spec.name, found[0], how)
    return expected


ALONE = [0, 3]    # the rows of the trial without edits


def _rows(engine: Engine | PlainEngine) -> list[TokenRow]:
    """Rows of different lengths that share beginnings, with edits."""
    ids, vector = trial_ids(engine.model), torch.ones(text_config(engine.model).hidden_size)
    edits = [(TokenEdit(place(layer, "resid_post", 20), vector, "add", 1.0),) for layer in range(min(2, engine.n_layers))]
    return [TokenRow(tuple(ids)), *(TokenRow(tuple(ids[:30]), edit) for edit in edits), TokenRow(tuple(ids[5:12]))]


def _trial(engine: Engine | PlainEngine) -> list[Tensor]:
    """Log-probabilities of rows that use all that an engine has: padding, a shared prompt with edits, a token that follows, and two
    continuations of different lengths behind each row."""
    rows = _rows(engine)
    token = rows[0].ids[0]
    first, then, one, two = torch.empty(4, len(rows), text_config(engine.model).vocab_size)
    with torch.no_grad():
        for batch in engine.batches(rows, 2):
            refuse_nan(batch)
            n = len(batch.index)
            first[batch.index] = batch.logits().log_softmax(-1).cpu()
            both = batch.copy().select(torch.arange(n).repeat_interleave(2))
            real = torch.tensor([[True, False], [True, True]]).repeat(n, 1)
            behind = both.extend(torch.full((2 * n, 2), token), real).log_softmax(-1).cpu()
            one[batch.index], two[batch.index] = behind[::2, 0], behind[1::2, 1]
            more = batch.extend(torch.full((n, 1), token), torch.ones(n, 1, dtype=torch.bool))
            then[batch.index] = more[:, -1].log_softmax(-1).cpu()
    return [first, then, one, two]


def _own(engine: PlainEngine) -> tuple[Tensor, Tensor, Tensor]:
    """By the bare model, of the rows without edits: after the row, after one more token, and after the row with that token behind it."""
    rows = _rows(engine)
    parts = []
    with torch.no_grad():
        for row in (rows[i] for i in ALONE):
            given = [torch.tensor([ids], device=engine.device) for ids in (row.ids, (*row.ids, rows[0].ids[0]))]
            short, long = (engine.model(ids).logits[0].float().log_softmax(-1).cpu() for ids in given)
            parts.append(torch.stack([short[-1], long[-1], long[-2]]))
    first, then, within = torch.stack(parts, 1)
    return first, then, within


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
