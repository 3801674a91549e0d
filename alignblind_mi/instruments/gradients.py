"""Activations of a prompt and the gradient of an answer's log-odds at them, on the plain transformers module.

One forward pass reads every token, layer and stream; one backward pass gives the gradients. Rows keep their edits. This module does NOT
know what is made of a gradient.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignblind_mi.models.adapters import switched
from alignblind_mi.models.edits import Row, Stream
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.tokens import Taps, TokenRow, left_pad

Where = tuple[int, Stream]


@dataclass(frozen=True, eq=False)
class Activations:
    """What a prompt's tokens have at places (layer, stream), and d(log-odds)/d(activation) there, in float32 on the CPU.

    values[place] and gradients[place]: [token, size]; log_odds in nats, NaN without answers.
    """

    values: Mapping[Where, Tensor]
    gradients: Mapping[Where, Tensor]
    log_odds: float = float("nan")


class _Keeper(Taps):
    """Taps that keep the activations they touch (after edits) and, where gradients are on, let everything behind the embedding have one."""

    def __init__(self, rows: list[TokenRow], first: list[int], wanted: Collection[Where], shift: Tensor | None = None) -> None:
        super().__init__(rows, first)
        self.shift = shift
        self.wanted, self.kept = {*wanted, (-1, "resid_post")}, dict[Where, Tensor]()
        self.inside |= {layer for layer, stream in wanted if stream != "resid_post"}

    def any(self, layer: int, *streams: Stream) -> bool:
        return super().any(layer, *streams) or any((layer, stream) in self.wanted for stream in streams)

    def touch(self, layer: int, stream: Stream, value: Float[Tensor, "row column size"], *, skip: int = 0
              ) -> Float[Tensor, "row column size"]:
        value = super().touch(layer, stream, value, skip=skip)
        if layer < 0 and self.shift is not None:
            value = value.clone()
            for row, first in zip(value, self.first, strict=True):
                row[-first : len(self.shift) - first] += self.shift.to(row)
        if (layer, stream) in self.wanted:
            value = value.detach().requires_grad_(torch.is_grad_enabled()) if layer < 0 else value.clone()
            self.kept[layer, stream] = value
        return value


def activations(model: HookedModel, row: Row, places: Collection[Where]) -> Activations:
    """The activations of one row's tokens at places, after its edits, under the model's adapter."""
    (tokens,) = model.token_rows([row])
    with torch.no_grad():
        keeper, _ = _forward(model, [tokens], places, 1)
    return Activations({place: keeper.kept[place][0].float().cpu() for place in places}, {})


def log_odds_gradients(model: HookedModel, row: Row, answers: tuple[str, str], places: Collection[Where],
                       shift: Float[Tensor, "token d_model"] | None = None) -> Activations:
    """Activations of one row's tokens and the gradients of log P(first answer) - log P(second answer) at them.

    Both answers are read behind the prompt in one batch; a prompt's activation counts for both, so its gradients add up. `shift` is added
    to the embeddings of the prompt's tokens.
    """
    if model.spec.tensor_parallel:
        raise ModelError(f"gradients on {model.spec.name} are not taken with tensor parallelism: load it in one process.")
    (tokens,) = model.token_rows([row])
    (choices,) = model.continuation_ids([row], [list(answers)])
    rows = [TokenRow((*tokens.ids, *ids), tokens.edits) for ids in choices]
    with torch.enable_grad():
        keeper, logits = _forward(model, rows, places, 1 + max(map(len, choices)), shift)
        first, second = (_log_prob(logits[i], torch.tensor(ids)) for i, ids in enumerate(choices))
        found = torch.autograd.grad(first - second, [keeper.kept[place] for place in places], allow_unused=True)
    n, begin = len(tokens.ids), [-first for first in keeper.first]
    values = {place: keeper.kept[place][0, begin[0] : begin[0] + n].detach().float().cpu() for place in places}
    return Activations(values, {place: _summed(grad, begin, n, values[place]) for place, grad in zip(places, found, strict=True)},
                       float((first - second).detach()))


def _forward(model: HookedModel, rows: list[TokenRow], places: Collection[Where], keep: int, shift: Tensor | None = None
             ) -> tuple[_Keeper, Tensor]:
    engine = model.engine if isinstance(model.engine, PlainEngine) else PlainEngine(model.engine.model, model.engine.budget)
    if not engine.padded and len({len(row.ids) for row in rows}) > 1:
        raise ModelError(f"gradients on {model.spec.name} need answers of the same number of tokens: its rows cannot be padded.")
    ids, mask = left_pad([row.ids for row in rows], engine.device)
    keeper = _Keeper(rows, [len(row.ids) - ids.shape[1] for row in rows], places, shift)
    with model.lock, switched(model.peft, model.treatment.adapter), engine.tapped(keeper):
        out = engine.forward(ids, mask, None, use_cache=False, logits_to_keep=keep)
    return keeper, out.logits


def _log_prob(logits: Float[Tensor, "token vocabulary"], ids: Int[Tensor, " answer"]) -> Float[Tensor, ""]:
    """Log-probability of the last tokens of a row."""
    before = logits[-len(ids) - 1 : -1].float().log_softmax(-1)
    return before.gather(1, ids.to(before.device)[:, None]).sum()


def _summed(grad: Tensor | None, begin: list[int], n: int, like: Tensor) -> Tensor:
    """The gradient at a prompt's tokens, which stand in every row behind its padding. None: nothing that follows depends on it."""
    return torch.zeros_like(like) if grad is None else sum((grad[i, at : at + n].float().cpu() for i, at in enumerate(begin)),
                                                            torch.zeros_like(like))
