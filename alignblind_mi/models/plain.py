"""The plain path: the same rows through transformers' own forward pass, batched, with masked hooks for the edits.

Nothing is shared between rows and nothing is left out. It is what the engine is tested against (beside plain Hugging Face one row at a
time), it runs any causal language model whose layers can be hooked, and it is there to be chosen: `ModelSpec(engine="plain")`.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignblind_mi.models.blocks import decoder_layers, hooked, inner_taps, input_device, output_hook, position_limit, text_config
from alignblind_mi.models.budget import Budget
from alignblind_mi.models.tokens import Later, Reader, Taps, TokenRow, left_pad, positions


class _Said:
    """What both kinds of batches say of the next token."""

    last: Float[Tensor, "row vocabulary"]
    found: Float[Tensor, "row read value"] | None
    extend: Callable[[Tensor, Tensor], Tensor]

    def logits(self) -> Float[Tensor, "row vocabulary"]:
        """Logits after the last column, in float32."""
        return self.last

    def is_finite(self) -> bool:
        """Whether the logits of the next token, or what was read, are numbers; a logit may be minus infinity."""
        return bool((self.last < torch.inf).all()) if self.found is None else bool(self.found.isfinite().all())

    def log_probs_of(self, ids: Int[Tensor, "*row target"]) -> Float[Tensor, "row target"]:
        """Exact log-probabilities of some next tokens, of every row or each row's own, on the CPU."""
        return self.last.log_softmax(-1).gather(1, ids.to(self.last.device).expand(len(self.last), -1)).cpu()

    def score(self, ids: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new-1"]:
        """Read more tokens of every row, but the last; the log-probability of each but the first (0 in padding), on the CPU."""
        logits = self.extend(ids[:, :-1], real[:, :-1])
        found = logits.log_softmax(-1).gather(2, ids[:, 1:, None].to(logits.device))[..., 0].cpu()
        return torch.where(real[:, 1:], found, 0.0)    # padding may have a probability of 0


@dataclass(eq=False)
class Batch(_Said):
    """Rows whose prompts have been read by the model's own forward pass: see `engine.Batch`."""

    engine: "PlainEngine"
    index: list[int]
    last: Float[Tensor, "row vocabulary"]
    mask: Bool[Tensor, "row column"]
    past: Any
    later: Later
    found: Float[Tensor, "row read value"] | None = None

    def extend(self, tokens: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new vocabulary"]:
        """Read more tokens of every row and return the logits after each; `real` is False in padding on the right."""
        self.mask = torch.cat([self.mask, real.to(self.mask.device)], 1)
        taps = self.later.taps(tokens.shape[1])
        with nullcontext() if taps is None else self.engine.tapped(taps):
            out = self.engine.forward(tokens.to(self.mask.device), self.mask, self.past)
        self.past, logits = out.past_key_values, out.logits.float()
        self.last = logits[:, -1]
        return logits

    def select(self, rows: Int[Tensor, " row"]) -> "Batch":
        """The batch of these rows only (or of some rows more than once); this one is used up."""
        self.past.batch_select_indices(rows)    # on the CPU: layers may lie on several devices
        index = [self.index[i] for i in rows.tolist()]
        return Batch(self.engine, index, self.last[rows], self.mask[rows], self.past, self.later.select(rows))

    def copy(self) -> "Batch":
        """A batch that can be used up while this one stays."""
        return Batch(self.engine, self.index, self.last, self.mask, copy.deepcopy(self.past), self.later)


@dataclass(eq=False)
class Anew(_Said):
    """The same of a model whose cache cannot be used: at every step its rows are read from their beginning, with their edits."""

    engine: "PlainEngine"
    index: list[int]
    last: Float[Tensor, "row vocabulary"]
    rows: list[TokenRow]
    found: Float[Tensor, "row read value"] | None = None

    def extend(self, tokens: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new vocabulary"]:
        """Read more tokens of every row and return the logits after each; `real` is False in padding on the right."""
        new = [[int(t) for t, there in zip(some, is_real, strict=True) if there]
               for some, is_real in zip(tokens.tolist(), real.tolist(), strict=True)]
        self.rows = [_grown(row, more) for row, more in zip(self.rows, new, strict=True)]
        out = self.last.new_zeros(len(self.rows), tokens.shape[1], self.last.shape[-1])
        for some in [range(len(self.rows))] if self.engine.padded else [[i] for i in range(len(self.rows))]:
            part = [self.rows[i] for i in some]
            ids, mask = left_pad([row.ids for row in part], self.engine.device)
            with self.engine.tapped(Taps(part, [len(row.ids) - ids.shape[1] for row in part])):
                logits = self.engine.forward(ids, mask, None, use_cache=False).logits.float()
            for i, of_row in zip(some, logits, strict=True):
                if new[i]:
                    out[i, : len(new[i])] = of_row[-len(new[i]) :]
                    self.last[i] = of_row[-1]
        return out

    def select(self, rows: Int[Tensor, " row"]) -> "Anew":
        """The batch of these rows only (or of some rows more than once)."""
        chosen = rows.tolist()
        return Anew(self.engine, [self.index[i] for i in chosen], self.last[rows.to(self.last.device)], [self.rows[i] for i in chosen])

    def copy(self) -> "Anew":
        """A batch that can be used up while this one stays."""
        return Anew(self.engine, list(self.index), self.last.clone(), list(self.rows))


def _grown(row: TokenRow, new: list[int]) -> TokenRow:
    """A row with more tokens, and the edits that act on them."""
    places = range(len(row.ids), len(row.ids) + len(new))
    later = tuple(replace(edit, at=edit.at._replace(position=at)) for at in places for edit in row.later)
    return replace(row, ids=(*row.ids, *new), edits=(*row.edits, *later), reads=())


class PlainEngine:
    """Runs token rows by a transformers model's own forward pass. See the module's docstring."""

    name = "plain"

    def __init__(self, model: Any, budget: Budget) -> None:
        """`padded`: rows of different lengths run together; `cached`: what was read is kept for the tokens that follow. The trial at load
        (`trial.py`) switches off what a model does not bear: recurrent ones often neither."""
        self.model, self.budget, self.device, self.limit = model, budget, input_device(model), position_limit(model)
        self.padded = self.cached = True
        self.n_layers = int(text_config(model).num_hidden_layers)
        self.scored = budget.logit_rows    # tokens scored at a time
        self.layers = decoder_layers(model)
        parameters = inspect.signature(model.forward).parameters.values()
        self.takes = {one.name for one in parameters}
        self.takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)

    def batches(self, rows: Sequence[TokenRow], room: int | None, reader: Reader | None = None) -> "Iterator[Batch | Anew]":
        """Read all rows, long ones first, in batches: see `engine.Engine.batches`."""
        length = [len(row.ids) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -length[i])
        alike = [order] if self.padded else [list(same) for _, same in groupby(order, key=length.__getitem__)]
        for some in alike:
            for index in self.budget.parts(some, length, length, room):
                yield self._read([rows[i] for i in index], index, room, reader)

    def _read(self, rows: Sequence[TokenRow], index: list[int], room: int | None, reader: Reader | None) -> "Batch | Anew":
        ids, mask = left_pad([row.ids for row in rows], self.device)
        taps = Taps(rows, [len(row.ids) - ids.shape[1] for row in rows], reader)
        with self.tapped(taps):
            out = self.forward(ids, mask, None, use_cache=room is not None and self.cached, logits_to_keep=1)
        if not self.cached:
            return Anew(self, index, out.logits[:, -1].float(), list(rows), taps.found)
        return Batch(self, index, out.logits[:, -1].float(), mask, getattr(out, "past_key_values", None), Later.of(rows), taps.found)

    @contextmanager
    def tapped(self, taps: Taps) -> Iterator[None]:
        """The model with the edits and readings of a batch in it."""
        with ExitStack() as stack:
            for hook in self._hooks(taps):
                stack.enter_context(hook)
            yield

    def _hooks(self, taps: Taps) -> Iterator[Any]:
        if taps.any(-1, "resid_post"):
            def entering(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return (taps.touch(-1, "resid_post", args[0]), *args[1:]), kwargs

            yield hooked(self.layers[0].register_forward_pre_hook(entering, with_kwargs=True))
        for index, layer in enumerate(self.layers):
            yield inner_taps(layer, index, taps)
            if taps.any(index, "resid_post"):
                hook = output_hook(lambda value, index=index: taps.touch(index, "resid_post", value))    # type: ignore[misc]
                yield hooked(layer.register_forward_hook(hook))

    def forward(self, ids: Int[Tensor, "row new"], mask: Bool[Tensor, "row column"], past: Any, *, use_cache: bool = True,
                logits_to_keep: int = 0) -> Any:
        """The model's forward pass on new tokens behind what is cached; the mask covers all columns."""
        optional = {"position_ids": positions(mask)[:, -ids.shape[1] :], "logits_to_keep": logits_to_keep}
        usual = {"attention_mask": mask.long(), "past_key_values": past, "use_cache": use_cache}
        given = {name: value for name, value in usual.items() if name in self.takes or (self.takes_all and name != "past_key_values")}
        return self.model(ids, **given, **{name: value for name, value in optional.items() if name in self.takes})
