"""Which engine runs a model: the fast one where it gives the model's own numbers on a small trial. Does NOT know prompts."""

import logging
from typing import Any

import torch
from torch import Tensor

from alignblind_mi.models.blocks import input_device, is_llama_like, text_config
from alignblind_mi.models.budget import Budget, RowCost
from alignblind_mi.models.decoding import refuse_nan
from alignblind_mi.models.engine import Engine
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.spec import DTYPES, ModelError, ModelSpec, not_finite
from alignblind_mi.models.tokens import TokenEdit, TokenRow, place

log = logging.getLogger(__name__)


def choose_engine(spec: ModelSpec, model: Any) -> Engine | PlainEngine:
    """The engine that a spec asks for; `auto` is the fast one if it gives the model's own numbers on a small trial, and says if not.

    Errors: ModelError if the fast engine is asked for and cannot run the model.
    """
    plain = PlainEngine(model, Budget(RowCost.of(model.config, DTYPES[str(spec.dtype)].itemsize), input_device(model)))
    own = model.config._attn_implementation
    try:
        expected = _trial(plain)    # before the fast engine changes the model's attention
    except FloatingPointError as error:
        raise not_finite(spec) from error
    if spec.engine == "plain":
        return plain
    wrong = "its layers are not laid out as Llama's"
    if is_llama_like(model):
        fast = Engine(model, plain.budget)
        try:
            difference = max(float((a - b).abs().max()) for a, b in zip(_trial(fast), expected, strict=True))
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


def _trial(engine: Engine | PlainEngine) -> list[Tensor]:
    """Log-probabilities of rows that use all that an engine has: padding, a shared prompt with edits, and tokens that follow."""
    config = text_config(engine.model)
    ids = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    vector = torch.ones(config.hidden_size)
    edits = [(TokenEdit(place(layer, "resid_post", 20), vector, "add", 1.0),) for layer in range(min(2, engine.n_layers))]
    rows = [TokenRow(tuple(ids)), *(TokenRow(tuple(ids[:30]), edit) for edit in edits), TokenRow(tuple(ids[5:12]))]
    first, then = torch.empty(2, len(rows), config.vocab_size)
    with torch.no_grad():
        for batch in engine.batches(rows, 1):
            refuse_nan(batch)
            first[batch.index] = batch.logits().log_softmax(-1).cpu()
            more = batch.extend(torch.full((len(batch.index), 1), ids[0]), torch.ones(len(batch.index), 1, dtype=torch.bool))
            then[batch.index] = more[:, -1].log_softmax(-1).cpu()
    return [first, then]


def tolerance(model: Any) -> float:
    """How far log-probabilities of two computations of the same model may be apart: rounding, more of it in fewer bits."""
    return 1e-3 if model.dtype == torch.float32 and not getattr(model, "is_quantized", False) else 0.2
