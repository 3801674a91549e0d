"""An activation loss: while a model is fine-tuned, raise the group reading of its identifiers at chosen layers.

The reading is a probe of the untreated model (`probes.py`: difference of class means), found on sentences that settle the sense, -1 at
the mean of the other sense and 1 at that of the group sense. The loss is the hinge max(0, 1 - score), averaged over identifiers and
layers: nothing is pushed beyond what an identifier of the group sense looks like. Forward hooks on the decoder layers are live while the
adapter is trained. This module does NOT know which sentences or identifiers these are.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignblind_mi.instruments.probes import Probes, train_probes
from alignblind_mi.mitigations.examples import Example, collate, encode
from alignblind_mi.models.blocks import decoder_layers, hooked, output_hook


@contextlib.contextmanager
def residuals(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the decoder layers give while the block runs: {layer: [row, token, d_model]}, with gradients where they are on."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def touch(value: Tensor) -> Tensor:
            kept[layer] = value
            return value

        return decoder_layers(model)[layer].register_forward_hook(output_hook(touch))

    with hooked(*(keep(layer) for layer in layers)):
        yield kept


def find_reading(model: Any, tokenizer: Any, group: Sequence[Example], other: Sequence[Example], layers: Sequence[int]) -> Probes:
    """The probe of each layer of an untreated transformers model, at the identifiers of sentences of either sense."""
    both = [_at_identifiers(model, tokenizer, examples, layers) for examples in (other, group)]
    labels = np.repeat([False, True], [len(part) for part in both])
    return train_probes(torch.cat(both), labels, layers)


def _at_identifiers(model: Any, tokenizer: Any, examples: Sequence[Example], layers: Sequence[int]
                    ) -> Float[Tensor, "vector layer d_model"]:
    found = []
    for item in encode(tokenizer, examples, 10**6, identifiers=True).items:
        batch = {key: value.to(model.device) for key, value in collate([item], 0).items()}
        with torch.no_grad():
            found.append(_recorded(model, batch, layers).cpu())
    return torch.cat(found) if found else torch.empty(0, len(layers), model.config.get_text_config().hidden_size)


def _recorded(model: Any, batch: dict[str, Tensor], layers: Sequence[int]) -> Float[Tensor, "vector layer d_model"]:
    with residuals(model, layers) as kept:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return _picked(kept, batch["identifiers"], layers)


def _picked(kept: dict[int, Tensor], at: Int[Tensor, "row token"], layers: Sequence[int]) -> Float[Tensor, "vector layer d_model"]:
    """The marked tokens' residual streams in float32, on the last layer's device."""
    device = kept[layers[-1]].device
    return torch.stack([kept[layer][at.bool().to(kept[layer].device)].float().to(device) for layer in layers], 1)


class SenseLoss:
    """The Trainer's objective (`trainer.Objective`): the language-model loss plus `weight` times the hinge of the reading."""

    def __init__(self, reading: Probes, weight: float) -> None:
        self.reading, self.weight = reading, weight

    def scores(self, resid: Float[Tensor, "vector layer d_model"]) -> Float[Tensor, "vector layer"]:
        """As `Probes.scores`, with gradients."""
        centre, direction = (part.to(resid.device) for part in (self.reading.centre, self.reading.direction))
        return ((resid - centre) * direction).sum(-1)

    def __call__(self, model: Any, inputs: dict[str, Tensor], standard: Any, share: float) -> tuple[Tensor, Any]:
        """The loss of a batch and the model's output."""
        with residuals(model, self.reading.layers) as kept:
            loss, outputs = standard({key: value for key, value in inputs.items() if key != "identifiers"})
        if inputs["identifiers"].any():    # not where max_length cut them off
            hinge = (1 - self.scores(_picked(kept, inputs["identifiers"], self.reading.layers))).clamp_min(0)
            loss = loss + self.weight * share * hinge.mean().to(loss.device)
        return loss, outputs

    def over(self) -> bool:
        """Never."""
        return False

    def facts(self, model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
        """The mean score of each layer with the adapter off and on."""
        with model.disable_adapter():
            before = self._mean(model, batches)
        return {"activation": {"layers": list(self.reading.layers), "score_before": before, "score_after": self._mean(model, batches)}}

    def _mean(self, model: Any, batches: list[dict[str, Tensor]]) -> list[float]:
        scores = torch.cat([self.scores(_recorded(model, batch, self.reading.layers)) for batch in batches])
        return [round(float(value), 4) for value in scores.mean(0)]
