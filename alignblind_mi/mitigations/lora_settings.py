"""What is trained of a LoRA adapter: its settings, the layers and the modules. Does NOT train."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from alignblind_mi.borders.reading import foreign
from alignblind_mi.borders.settings import (
    Count,
    Layer,
    LearningRate,
    Listed,
    Name,
    Names,
    PartialShare,
    Rank,
    Seed,
    Tokens,
    Weight,
    Whole,
    check_fields,
    many,
    shown,
    takes,
    widened,
)
from alignblind_mi.borders.texts import one_line
from alignblind_mi.errors import AlignblindError
from alignblind_mi.models.blocks import decoder_layers
from alignblind_mi.models.configs import load_config, quiet
from alignblind_mi.models.spec import ModelSpec

# Shares of depth. Early and late are the paper's split (layers 0-19 and 20-31 of 32); middle is 10-21 of 32.
LAYER_GROUPS = {"early": (0.0, 0.625), "middle": (0.3125, 0.6875), "late": (0.625, 1.0), "all": (0.0, 1.0)}
LONGEST = 2000    # characters of a text that names layers


class LoraError(AlignblindError):
    """Training data, layers or settings that cannot be used."""


@widened
@dataclass(frozen=True)
class LoraSettings:
    """Hyper-parameters; the defaults are the paper's for Llama 3 8B (batch 4 x 4 accumulation steps), also called `PAPER`.

    validation_share: share of the sentences that the loss is measured on after each epoch; the best epoch is kept. patience: training stops
    after so many epochs without a better one (0: never). activation_weight: weight of the activation loss (`sense_loss.py`) beside the
    language-model loss, after activation_layers (empty: the trained ones); 0 is none.
    """

    __repr__ = one_line

    rank: Rank = 4
    alpha: Count = 32
    dropout: PartialShare = 0.1
    modules: Annotated[tuple[Name, ...], Listed()] = ("q_proj", "v_proj")
    epochs: Count = 7
    batch_size: Count = 4
    accumulation: Count = 4
    learning_rate: LearningRate = 2e-4
    warmup_share: PartialShare = 0.06
    weight_decay: Weight = 0.01
    max_length: Tokens = 256
    seed: Seed = 0
    validation_share: PartialShare = 0.0
    patience: Whole = 0
    activation_weight: Weight = 0.0
    activation_layers: Annotated[tuple[Layer, ...], Listed(alone=True)] = ()

    def __post_init__(self) -> None:
        check_fields(self, LoraError)
        if not self.modules:
            raise LoraError("modules is empty ('' names none): name the projections to train, e.g. q_proj and v_proj.")
        if self.patience and not self.validation_share:
            raise LoraError("patience needs validation_share above 0: without held-out sentences no epoch is better than another.")


PAPER = LoraSettings()
"""The hyper-parameters of "Aligned but Blind" for Llama 3 8B."""


def layer_group(name: str, n_layers: int) -> range:
    """The layers of a group: early, middle, late or all, as shares of the model's depth (rounded half up)."""
    if name not in LAYER_GROUPS:
        raise LoraError(f"unknown layer group {name!r}. Known: {', '.join(LAYER_GROUPS)}.")
    start, stop = (int(share * n_layers + 0.5) for share in LAYER_GROUPS[name])
    return range(start, max(stop, start + 1))


@takes(LoraError)
def choose_layers(which: str | int | Sequence[int], n_layers: Count) -> list[int]:
    """Layers by a group's name ("early"), a text ("0-3,7") or one or many numbers; sorted. Errors: LoraError for one that is not there."""
    found = _read_layers(which, n_layers) if isinstance(which, str) else many(which)
    wrong = next((layer for layer in found if not 0 <= layer < n_layers), None)
    if wrong is not None or not found:
        said = "no layers are given" if wrong is None else f"layer {shown(wrong)} does not exist"
        raise LoraError(f"{said}: the model has layers 0-{n_layers - 1}{f', got {which!r}' if isinstance(which, str) else ''}.")
    return sorted(set(found))


def _read_layers(text: str, n_layers: int) -> Sequence[int]:
    if text in LAYER_GROUPS:
        return layer_group(text, n_layers)
    runs = [re.fullmatch(r"\s*(?:([0-9]+)\s*-\s*)?([0-9]+)\s*", part) for part in text.split(",")]
    if len(text) > LONGEST or not all(runs):
        raise LoraError(f"the layers {shown(text)} are neither a group ({', '.join(LAYER_GROUPS)}) nor numbers such as 0-3,7.")
    ends = [(int(run[1] or run[2]), int(run[2])) for run in runs if run]
    backwards = next((end for end in ends if end[0] > end[1]), None)
    if backwards is not None:
        raise LoraError(f"{backwards[0]}-{backwards[1]} runs backwards and holds no layers, so no layers are given there: write "
                        f"{backwards[1]}-{backwards[0]}.")
    beyond = [end[1] for end in ends if end[1] >= n_layers]    # found before a run is written out: it may be of any length
    return [max(n_layers, *(end[0] for end in ends if end[1] in beyond))] if beyond else [
        layer for first, last in ends for layer in range(first, last + 1)]


def layers_text(layers: Sequence[int]) -> str:
    """Layers as they are written: "0-3", "5", "0-3,7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


@takes(LoraError)
def check_modules(spec: ModelSpec, modules: Names) -> None:
    """Whether a model's layers have these projections, from its configuration alone. Errors: LoraError naming an unknown one."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = load_config(spec)
    with torch.device("meta"), quiet(), foreign(f"no model can be made by the configuration of {spec.name}", LoraError,
                                                "mend its config.json, or use another model"):
        empty = AutoModelForCausalLM.from_config(config)
    names = {name.split(".")[-1] for name, module in decoder_layers(empty)[0].named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for module in modules:
        if module not in names:
            raise LoraError(f"the layers of {spec.name} have no projection {module!r}. Known: {', '.join(sorted(names))}.")
