"""Which question reads a model? Settings of a patchscope, tried on sentences whose sense is known.

Every setting is scored by how well its readings tell the concept's `train` contexts of the two senses apart (AUC, the mean over layers).
Nothing here sees the `test` contexts, nor an ambiguous prompt. This module does NOT know verdicts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignblind_mi.borders.texts import one_line
from alignblind_mi.instruments.patchscope import Mapping, fit_affine, norm_matched, patchscope_rows
from alignblind_mi.measures.sources import Contexts
from alignblind_mi.models.edits import Tokens
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.questions import Question

MappingName = Literal["identity", "norm-matched", "affine"]
LEAST_MASS = 0.05    # of the probability must lie on the two answers: else a reading compares two answers that are hardly given
KEPT = 3            # questions that are tried with more than the first injection layer; then settings, with more mappings


@dataclass(frozen=True)
class Setting:
    """How a patchscope asks: the question, the layer after which it injects, the mapping, and the tokens of the placeholder."""

    __repr__ = one_line

    question: Question
    target_layer: int
    mapping: MappingName = "identity"
    tokens: Tokens = "all"

    def labels(self) -> dict[str, Any]:
        """The columns that name a setting."""
        return {"question": self.question.name, "text": self.question.prompt.text, "target_layer": self.target_layer,
                "mapping": self.mapping, "tokens": self.tokens}


@dataclass(frozen=True, eq=False)
class Scores:
    """What an instrument says of vectors: the other sense against the group one, and how much it has to say (both [vector, layer])."""

    __repr__ = one_line

    score: Float[np.ndarray, "vector layer"]
    mass: Float[np.ndarray, "vector layer"]


def ask_setting(model: HookedModel, resid: Float[Tensor, "vector layer d_model"], layers: Sequence[int], setting: Setting,
                pairs: Contexts) -> Scores:
    """The log-odds (nats) of the other answer against the group's, and the probability of both, when vectors are asked about.

    resid: recorded after `layers`. pairs: contexts recorded at all layers, which the affine mapping is fitted on.
    """
    question = setting.question
    rows = []
    for j, layer in enumerate(layers):
        mapping = _mapping(model, setting, layer, pairs)
        rows += patchscope_rows(resid[:, j], question.prompt, setting.target_layer, mapping=mapping, tokens=setting.tokens)
    probs = model.next_probs(rows, [question.group, question.other]).view(len(layers), len(resid), 2).transpose(0, 1)
    logs = probs.clamp_min(torch.finfo(torch.float32).tiny).log().numpy().astype(float)
    return Scores(logs[..., 1] - logs[..., 0], probs.sum(-1).numpy().astype(float))


def _mapping(model: HookedModel, setting: Setting, layer: int, pairs: Contexts) -> Mapping | None:
    if setting.mapping == "norm-matched":
        return norm_matched(model, setting.question.prompt, setting.target_layer)
    if setting.mapping == "affine" and layer != setting.target_layer:
        at = pairs.recorded.layers
        return fit_affine(pairs.resid[:, at.index(layer)], pairs.resid[:, at.index(setting.target_layer)])
    return None


def by_sentence(values: Float[np.ndarray, "vector layer"], sentences: Sequence[str]) -> Float[np.ndarray, "sentence layer"]:
    """The mean of each sentence's vectors, in the order of first mention."""
    names = list(dict.fromkeys(sentences))
    index = np.array([names.index(sentence) for sentence in sentences])
    return np.stack([values[index == i].mean(0) for i in range(len(names))])


def sentence_labels(contexts: Contexts) -> Bool[np.ndarray, " sentence"]:
    """Of each sentence, in the order of first mention, whether it settles the other sense."""
    return np.array(list(contexts.by_sentence.values()))


def areas(scores: Float[np.ndarray, "sentence layer"], labels: Bool[np.ndarray, "... sentence"]) -> Float[np.ndarray, "... layer"]:
    """The area under the ROC curve by layer: how often a sentence of the other sense scores above one of the group sense (ties half).

    Source: the Mann-Whitney statistic over the number of pairs (Hanley and McNeil 1982). labels: one labelling, or several.
    """
    from scipy.stats import rankdata

    ranks = np.asarray(rankdata(scores, axis=0), dtype=float)
    ones = labels.sum(-1, keepdims=True)
    return np.asarray((labels.astype(float) @ ranks - ones * (ones + 1) / 2) / (ones * (labels.shape[-1] - ones)), dtype=float)


@dataclass(frozen=True, eq=False)
class Tried:
    """A setting that was tried: its AUC and mass, means over sentences and layers of the `train` contexts."""

    __repr__ = one_line

    setting: Setting
    auc: float
    mass: float


def tune(model: HookedModel, train: Contexts, layers: Sequence[int], questions: Sequence[Question], first_layer: int,
         progress: Callable[[int], None] | None = None, *, kept: int = KEPT, ask: Callable[[Setting], Scores] | None = None
         ) -> list[Tried]:
    """Settings in the order in which they were tried; `best_of` chooses.

    First every question (whose words the tokenizer knows) at `first_layer`; then the `kept` best at four other injection layers up to the
    middle of the model; then the best of these with the other mappings and the last token of the placeholder. train: contexts recorded at
    all layers. ask: what answers a setting at these contexts and layers (default: `ask_setting`); a search that is repeated need not ask
    again.
    """
    resid, labels = train.resid[:, [train.recorded.layers.index(layer) for layer in layers]], sentence_labels(train)

    @lru_cache(None)
    def tried(setting: Setting) -> Tried:
        found = ask_setting(model, resid, layers, setting, train) if ask is None else ask(setting)
        auc = areas(by_sentence(found.score, train.sentences), labels).mean()
        if progress is not None:
            progress(resid.shape[0] * resid.shape[1])
        return Tried(setting, float(auc), float(found.mass.mean()))

    known = [question for question in questions if _askable(model, question)]
    found = [tried(Setting(question, first_layer)) for question in known]
    deeper = [layer for layer in injection_layers(model.n_layers) if layer != first_layer]
    found += [tried(replace(one.setting, target_layer=layer)) for one in _ranked(found)[:kept] for layer in deeper]
    best = _ranked(found)[:1]
    others: tuple[dict[str, Any], ...] = ({"mapping": "norm-matched"}, {"mapping": "affine"}, {"tokens": "last"})
    return [*found, *(tried(replace(one.setting, **how)) for one in best for how in others)]


def _askable(model: HookedModel, question: Question) -> bool:
    """Whether the tokenizer knows the words of a question, and both answers are single tokens."""
    try:
        model.check_known([question.prompt])
        return bool(len({model.token_id(word) for word in (question.group, question.other)}) == 2)
    except ModelError:
        return False


def injection_layers(n_layers: int) -> list[int]:
    """Layers that a tuned patchscope injects after: the first ones, and some up to the middle."""
    return sorted({min(layer, n_layers - 1) for layer in (0, 1, 2, n_layers // 8, n_layers // 4, n_layers // 2)})


def best_of(tried: Sequence[Tried]) -> Tried:
    """The setting with the largest AUC of those whose answers hold enough of the probability (of all, where none does)."""
    return _ranked(tried)[0]


def _ranked(tried: Sequence[Tried]) -> list[Tried]:
    return sorted(tried, key=lambda one: (one.mass >= LEAST_MASS, round(one.auc, 6), one.mass), reverse=True)
