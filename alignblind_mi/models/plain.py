"""The plain path: the same rows through transformers' own forward pass, batched, with masked hooks for the edits.

Nothing is shared between rows and nothing is left out. It is what the engine is tested against (beside plain Hugging Face one row at a
time), it runs any causal language model whose layers can be hooked, and it is there to be chosen: `ModelSpec(engine="plain")`.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignblind_mi.models.blocks import decoder_layers, hooked, inner_taps, input_device, output_hook, text_config
from alignblind_mi.models.budget import Budget
from alignblind_mi.models.tokens import Later, Reader, Taps, TokenRow, left_pad, positions


@dataclass(eq=False)
class Batch:
    """Rows whose prompts have been read by the model's own forward pass: see `engine.Batch`."""

    engine: "PlainEngine"
    index: list[int]
    last: Float[Tensor, "row vocabulary"]
    mask: Bool[Tensor, "row column"]
    past: Any
    later: Later
    found: Float[Tensor, "row read value"] | None = None

    def logits(self) -> Float[Tensor, "row vocabulary"]:
        """Logits after the last column, in float32."""
        return self.last

    def is_finite(self) -> bool:
        """Whether the logits of the next token, or what was read, are numbers; a logit may be minus infinity."""
        return bool((self.last < torch.inf).all()) if self.found is None else bool(self.found.isfinite().all())

    def log_probs_of(self, ids: Int[Tensor, " target"]) -> Float[Tensor, "row target"]:
        """Exact log-probabilities of some next tokens, on the CPU."""
        return self.last.log_softmax(-1)[:, ids.to(self.last.device)].cpu()

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


class PlainEngine:
    """Runs token rows by a transformers model's own forward pass. See the module's docstring."""

    name = "plain"

    def __init__(self, model: Any, budget: Budget) -> None:
        self.model, self.budget, self.device = model, budget, input_device(model)
        self.n_layers = int(text_config(model).num_hidden_layers)
        self.layers = decoder_layers(model)
        self.takes = set(inspect.signature(model.forward).parameters)

    def batches(self, rows: Sequence[TokenRow], room: int | None, reader: Reader | None = None) -> Iterator[Batch]:
        """Read all rows, long ones first, in batches: see `engine.Engine.batches`."""
        length = [len(row.ids) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -length[i])
        for index in self.budget.parts(order, length, length, room):
            yield self._read([rows[i] for i in index], index, room, reader)

    def _read(self, rows: Sequence[TokenRow], index: list[int], room: int | None, reader: Reader | None) -> Batch:
        ids, mask = left_pad([row.ids for row in rows], self.device)
        taps = Taps(rows, [len(row.ids) - ids.shape[1] for row in rows], reader)
        with self.tapped(taps):
            out = self.forward(ids, mask, None, use_cache=room is not None, logits_to_keep=1)
        return Batch(self, index, out.logits[:, -1].float(), mask, out.past_key_values, Later.of(rows), taps.found)

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
        return self.model(ids, attention_mask=mask.long(), past_key_values=past, use_cache=use_cache,
                          **{name: value for name, value in optional.items() if name in self.takes})
