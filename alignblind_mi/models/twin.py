"""transformer-lens' view of a transformers model: a bridge on a copy of its modules, on the same weights; edits as hooks of the bridge.

This module is the only place that boots a bridge. It does NOT know how rows run on the model itself."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from alignblind_mi.borders.texts import one_line
from alignblind_mi.models.blocks import tolerance, trial_ids
from alignblind_mi.models.configs import quiet
from alignblind_mi.models.edits import hook_name
from alignblind_mi.models.spec import DTYPES, ModelError, ModelSpec
from alignblind_mi.models.tokens import Taps


@dataclass(frozen=True, eq=False)
class Cached:
    """Activations of a left-padded batch of prompts. `mask[i, t]` is 0 where row i has padding."""

    __repr__ = one_line

    tokens: Int[Tensor, "row token"]
    mask: Int[Tensor, "row token"]
    activations: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """The activations at one hook point, [row, token, ...] (attention patterns: [row, head, query, key])."""
        return self.activations[name]


class Twin:
    """transformer-lens' view of a transformers model: a copy of its modules on the same weights, with a bridge booted on it.

    Booted when it is first asked for. The copy is needed because the bridge forces eager attention on, and replaces modules of, the model
    that it is given.
    """

    def __init__(self, spec: ModelSpec, model: Any, tokenizer: Any) -> None:
        self.spec, self.model, self.tokenizer = spec, model, tokenizer

    @cached_property
    def module(self) -> Any:
        """The copied model (a PeftModel if there are adapters)."""
        return share_weights(self.model)

    @cached_property
    def bridge(self) -> Any:
        """The bridge. Errors: ModelError for an architecture that transformer-lens does not know."""
        from transformer_lens.model_bridge import TransformerBridge

        plain = self.module.base_model.model if hasattr(self.module, "peft_config") else self.module
        try:
            with quiet():
                bridge = TransformerBridge.boot_transformers(self.spec.source, hf_model=plain, tokenizer=copy.deepcopy(self.tokenizer),
                                                             dtype=DTYPES[str(self.spec.dtype)])
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"transformer-lens cannot carry {self.spec.name} ({str(error).splitlines()[0]}): rows run, but hook points, "
                             "attention patterns and its tools are not there.") from error
        difference = self._difference(bridge.eval(), plain)
        if difference > tolerance(plain):
            raise ModelError(f"transformer-lens' view of {self.spec.name} differs from the model by {difference:.2g} in log-probabilities: "
                             "rows run, but its hook points would show something else.")
        return bridge

    def _difference(self, bridge: Any, plain: Any) -> float:
        """The largest difference of next-token log-probabilities between the bridge and the model it was made from."""
        ids = torch.tensor([trial_ids(plain)], device=bridge.cfg.device)
        with torch.no_grad():
            theirs = self.model(ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
            return float((bridge.forward(ids)[:, -1].float().log_softmax(-1) - theirs.to(ids.device)).abs().max())


def share_weights(model: Any) -> Any:
    """A copy of a model's modules that uses the very same parameters and buffers (and offloaded weights)."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for module in model.modules():
        for hook in _accelerate_hooks(module):
            for name in ("weights_map", "tied_params_map"):
                shared = getattr(hook, name, None)
                if shared is not None:
                    memo[id(shared)] = shared
    return copy.deepcopy(model, memo)


def _accelerate_hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def bridge_hooks(taps: Taps) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    """The edits of a batch as hooks of the bridge.

    The bridge's hook_resid_mid is the input of the second norm: an edit there would miss the skip connection. It is made on attn_out.
    """
    hooks: list[tuple[str, Callable[[Tensor, Any], Tensor]]] = []
    for layer, stream in sorted(taps.edits, key=lambda where: (where[0], where[1] == "resid_mid")):
        if stream == "resid_mid":
            hooks += _mid_hooks(taps, layer)
        else:
            name = "blocks.0.hook_resid_pre" if layer < 0 else hook_name(layer, stream)
            hooks.append((name, lambda value, hook, layer=layer, stream=stream: _flat_touch(taps, layer, stream, value)))    # type: ignore[misc]
    return hooks


def _flat_touch(taps: Taps, layer: int, stream: Any, value: Tensor) -> Tensor:
    """The bridge has the heads of hook_z on an axis of their own."""
    return taps.touch(layer, stream, value.flatten(2)).view(value.shape)


def _mid_hooks(taps: Taps, layer: int) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    entering: list[Tensor] = []

    def before(value: Tensor, hook: Any) -> Tensor:
        entering[:] = [value]
        return value

    def after(value: Tensor, hook: Any) -> Tensor:
        return taps.touch(layer, "resid_mid", entering[0] + value) - entering[0]

    return [(f"blocks.{layer}.hook_resid_pre", before), (f"blocks.{layer}.hook_attn_out", after)]


def name_filter(names: Sequence[str] | Callable[[str], bool] | None, bridge: Any) -> Callable[[str], bool]:
    """Which hook points are kept. Errors: ModelError for a name that is none."""
    if names is None:
        return lambda name: True
    if callable(names):
        return names
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in bridge.hook_dict]
    if unknown:
        raise ModelError(f"unknown hook point {unknown[0]!r}. Examples: blocks.0.hook_resid_post, blocks.0.attn.hook_pattern, "
                         "blocks.0.hook_mlp_out; all of them: list(model.bridge.hook_dict).")
    wanted = set(names)
    return lambda name: name in wanted
