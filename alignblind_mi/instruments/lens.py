"""Logit lens and tuned lens: what every layer of the residual stream would answer, at every token of a prompt.

The logit lens (nostalgebraist 2020) reads a residual stream through the model's own final norm and unembedding; the tuned lens (Belrose et
al. 2023) first moves it by an affine translator of its layer, trained to give the model's final answer. This module does NOT know senses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignblind_mi.borders.settings import AnyLayers, Count, LearningRate, Seed, Words, many, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.models.blocks import unembed
from alignblind_mi.models.edits import EditError, Site
from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.prompts import Prompt, Prompts, Span, as_prompts

HELD_OUT = 5    # every fifth token position is kept from the training of translators, to see what they have gained


@dataclass(frozen=True, eq=False)
class Translators:
    """One affine translator a layer, h -> h + W h + b. `kl_before` and `kl_after`: nats from the final answer on held-out positions."""

    __repr__ = one_line

    layers: tuple[int, ...]
    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    kl_before: Float[Tensor, " layer"]
    kl_after: Float[Tensor, " layer"]

    def __call__(self, resid: Float[Tensor, "vector layer d_model"]) -> Float[Tensor, "vector layer d_model"]:
        """Residual streams after each of `layers`, translated."""
        return resid + torch.einsum("vld,led->vle", resid, self.weight) + self.bias

    def at(self, layers: Sequence[int]) -> "Translators":
        """The translators of some layers. Errors: EditError for a layer without one."""
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise EditError(f"there is no translator for layer {missing[0]}; there are for {', '.join(map(str, self.layers))}.")
        index = [self.layers.index(layer) for layer in layers]
        return Translators(tuple(layers), self.weight[index], self.bias[index], self.kl_before[index], self.kl_after[index])


@dataclass(frozen=True, eq=False)
class _Streams:
    """Residual streams at all tokens of some prompts, what they have in common once, and the last layer's there."""

    resid: Float[Tensor, "position layer d_model"]
    final: Float[Tensor, "position d_model"]


def token_marks(model: HookedModel, prompt: Prompt) -> tuple[Prompt, list[str]]:
    """The prompt with a mark `token_0`, `token_1` ... for each of its tokens that stands for text, and the tokens' texts."""
    (item,) = model.encode([prompt])
    spans = [Span(*offset) for offset in item.offsets if offset[1] > offset[0]]
    marks = {f"token_{i}": (span,) for i, span in enumerate(spans)}
    return replace(prompt, marks={**prompt.marks, **marks}), [prompt.text[span.start : span.end] for span in spans]


@takes(EditError)
def logit_lens(model: HookedModel, prompts: Prompts, words: Words, *, layers: AnyLayers | None = None,
               translators: Translators | None = None) -> pd.DataFrame:
    """Layers x tokens x words: the log-probability (nats) and probability of single-token words as the next token at every place.

    With `translators` it is the tuned lens. The vocabulary exists for a few places at a time. Columns: the prompt's labels, model,
    treatment, prompt, token, position, layer, word, log_prob, prob. At the last layer the logit lens is the model's own answer.

    Errors: EditError for a layer that does not exist or has no translator; ModelError for a word of several tokens, or a model whose answer
    is not its final norm and head alone.
    """
    prompts = as_prompts(prompts)
    if not prompts:
        raise EditError("a lens needs at least one prompt.")
    layers = list(range(model.n_layers)) if layers is None else list(many(layers))
    frames = [_lens(model, prompt, words, layers, translators) for prompt in prompts]
    return pd.concat(frames, ignore_index=True)


def _lens(model: HookedModel, prompt: Prompt, words: Sequence[str], layers: list[int], translators: Translators | None) -> pd.DataFrame:
    tokens, resid = _record(model, prompt, layers)
    logs = lens_readings(model, resid, layers, words, translators)
    return pd.DataFrame.from_records([
        {**prompt.labels, "model": model.spec.name, "treatment": model.treatment.name, "prompt": prompt.text, "token": token, "position": i,
         "layer": layer, "word": word, "log_prob": float(logs[i, j, k]), "prob": float(logs[i, j, k].exp())}
        for i, token in enumerate(tokens) for j, layer in enumerate(layers) for k, word in enumerate(words)])


@takes(EditError)
def lens_contrast(rows: pd.DataFrame, word: str, against: str) -> pd.DataFrame:
    """log P(word) - log P(against) in nats, from rows of `logit_lens` that hold both words; one row per prompt, token and layer.

    Columns: those of the rows without word, log_prob and prob, and log_odds. Errors: EditError for a word that the rows do not hold.
    """
    lacking = next((name for name in (word, against) if name not in set(rows["word"])), None)
    if lacking is not None:
        raise EditError(f"the lens has not read the word {lacking!r}; it has read {', '.join(map(repr, rows['word'].unique()))}.")
    keys = ["model", "treatment", "prompt", "position", "layer"]
    first, second = (rows[rows["word"] == name].drop_duplicates(keys) for name in (word, against))
    both = first.merge(second[[*keys, "log_prob"]], on=keys, suffixes=("", "_against"), validate="one_to_one")
    return both.assign(log_odds=both["log_prob"] - both["log_prob_against"]).drop(columns=["word", "log_prob", "prob", "log_prob_against"])


def lens_readings(model: HookedModel, resid: Float[Tensor, "vector layer d_model"], layers: Sequence[int], words: Sequence[str],
                  translators: Translators | None = None) -> Float[Tensor, "vector layer word"]:
    """Log-probabilities (nats) of words after residual streams that were recorded after `layers`."""
    read = resid if translators is None else translators.at(layers)(resid)
    return model.residual_log_probs(read.flatten(0, 1), words).unflatten(0, resid.shape[:2])


def _record(model: HookedModel, prompt: Prompt, layers: Sequence[int]) -> tuple[list[str], Float[Tensor, "position layer d_model"]]:
    """The texts of a prompt's tokens, and the residual streams there."""
    marked, tokens = token_marks(model, prompt)
    sites = [Site(layer, f"token_{i}") for i in range(len(tokens)) for layer in layers]
    return tokens, model.record(model.rows([marked]), sites)[0].unflatten(0, (len(tokens), len(layers)))


@takes(EditError)
def train_translators(model: HookedModel, prompts: Prompts, *, layers: AnyLayers | None = None, steps: Count = 200,
                      batch: Count = 256, learning_rate: LearningRate = 1e-3, seed: Seed = 0) -> Translators:
    """Train a translator for each layer on the tokens of `prompts`: least KL divergence (nats) from the model's final answer.

    Adam from the zero translator, `batch` positions a step; every fifth position is held out. A few thousand positions of text like the
    text that is to be read are enough for small models. Source: Belrose et al. 2023, section 3.

    Errors: EditError if the prompts hold fewer positions than a translator can be judged on.
    """
    layers = list(range(model.n_layers)) if layers is None else list(many(layers))
    model.residual_log_probs(torch.zeros(1, model.d_model), [])    # refuses models whose answer is not norm and head alone
    prompts = as_prompts(prompts)
    streams = _streams(model, prompts, layers)
    held = torch.arange(len(streams.final)) % HELD_OUT == 0
    if int(held.sum()) < 2:
        raise EditError(f"{len(prompts)} prompts with {len(held)} tokens are too few to train translators on: give more text.")
    order = torch.Generator().manual_seed(seed)
    train = torch.nonzero(~held)[:, 0]
    weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((len(layers), model.d_model, model.d_model),
                                                                        (len(layers), model.d_model)))
    optimiser = torch.optim.Adam([weight, bias], lr=learning_rate)
    for _ in range(steps):
        index = train[torch.randint(len(train), (min(batch, len(train)),), generator=order)]
        optimiser.zero_grad()
        final = _answers(model, streams.final[index])
        for j in range(len(layers)):    # layer by layer: the vocabulary exists for one of them at a time
            (_divergence(model, streams.resid[index, j], final, weight[j], bias[j]).mean() / len(layers)).backward()
        optimiser.step()
    chosen = torch.nonzero(held)[:, 0]
    with torch.no_grad():
        before, after = (torch.stack([_held_out(model, streams, chosen, j, scale * weight[j], scale * bias[j], batch)
                                      for j in range(len(layers))]) for scale in (0.0, 1.0))
    return Translators(tuple(layers), weight.detach(), bias.detach(), before, after)


def _held_out(model: HookedModel, streams: _Streams, chosen: Int[Tensor, " position"], j: int, weight: Tensor, bias: Tensor, batch: int
              ) -> Float[Tensor, ""]:
    """Mean divergence on held-out positions, some of them at a time."""
    return torch.cat([_divergence(model, streams.resid[part, j], _answers(model, streams.final[part]), weight, bias)
                      for part in chosen.split(batch)]).mean()


def _streams(model: HookedModel, prompts: Sequence[Prompt], layers: list[int]) -> _Streams:
    every = [*layers, model.n_layers - 1]
    resid = torch.cat([_record(model, prompt, every)[1] for prompt in prompts])
    _, first = np.unique(resid[:, -1].numpy(), axis=0, return_index=True)    # prompts that begin alike have the same streams there
    resid = resid[np.sort(first)]
    return _Streams(resid[:, :-1], resid[:, -1])


def _answers(model: HookedModel, resid: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocabulary"]:
    """Log-probabilities of the next token after residual streams."""
    plain = model.engine.model
    return unembed(plain, resid.to(plain.dtype).to(model.engine.device)).log_softmax(-1)


def _divergence(model: HookedModel, resid: Float[Tensor, "position d_model"], final: Float[Tensor, "position vocabulary"],
                weight: Float[Tensor, "d_model d_model"], bias: Float[Tensor, " d_model"]) -> Float[Tensor, " position"]:
    """KL(final answer || translated answer) in nats, of residual streams of one layer; `final` are log-probabilities."""
    return (final.exp() * (final - _answers(model, resid + resid @ weight.T + bias))).sum(-1).cpu()
