"""Linear probes: can the sense of an identifier be read off its residual stream along one direction, layer by layer?

The probe of a layer is the difference of the two class means, each dimension in units of its spread within the classes (mass-mean probing,
Marks and Tegmark 2024; a linear discriminant with a diagonal covariance): one direction, nothing to be tuned, and a reading that does not
saturate on inputs between the classes, as a logistic probe's does. A probe shows that something can be decoded, never that the model uses
it (Belinkov 2022): its accuracy stands beside that of control tasks (Hewitt and Liang 2019). This module does NOT know prompts or senses.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignblind_mi.borders.texts import one_line
from alignblind_mi.models.edits import EditError


@dataclass(frozen=True, eq=False)
class Probes:
    """One direction a layer. `scores` are signed distances from the midpoint of the training classes: positive is the label True."""

    __repr__ = one_line

    layers: tuple[int, ...]
    centre: Float[Tensor, "layer d_model"]
    direction: Float[Tensor, "layer d_model"]

    def scores(self, resid: Float[Tensor, "vector layer d_model"]) -> Float[np.ndarray, "vector layer"]:
        """Projections on each layer's direction, -1 and 1 at the means of the two training classes."""
        return np.asarray(((resid - self.centre) * self.direction).sum(-1).numpy(), dtype=float)

    def accuracy(self, resid: Float[Tensor, "vector layer d_model"], labels: Bool[np.ndarray, " vector"]) -> Float[np.ndarray, " layer"]:
        """Share of vectors on their label's side of the midpoint, per layer."""
        return ((self.scores(resid) > 0) == labels[:, None]).mean(0)

    def readings(self, resid: Float[Tensor, "vector layer d_model"], known: Float[Tensor, "example layer d_model"],
                 labels: Bool[np.ndarray, " example"]) -> Float[np.ndarray, "vector layer"]:
        """Scores on the scale of held-out examples whose label is `known`: -1 is their mean for False, 1 for True, cut off beyond.

        NaN at a layer where the held-out means are not in order: the probe found nothing there.
        """
        held = self.scores(known)
        low, high = held[~labels].mean(0), held[labels].mean(0)
        width = np.where(high > low, high - low, np.nan)
        return np.clip(2 * (self.scores(resid) - low) / width - 1, -1, 1)


def train_probes(resid: Float[Tensor, "vector layer d_model"], labels: Bool[np.ndarray, " vector"], layers: Sequence[int]) -> Probes:
    """The probe of every layer, from residual streams after `layers` and their labels.

    Errors: EditError unless both labels have at least two vectors.
    """
    if min(int(labels.sum()), int((~labels).sum())) < 2:
        raise EditError(f"a probe needs at least two examples of either label, got {int((~labels).sum())} and {int(labels.sum())}.")
    low, high = resid[~labels].mean(0), resid[labels].mean(0)
    within = torch.cat([resid[~labels] - low, resid[labels] - high]).square().mean(0).clamp_min(1e-12)
    difference = (high - low) / within
    return Probes(tuple(layers), (low + high) / 2, 2 * difference / (difference * (high - low)).sum(-1, keepdim=True).clamp_min(1e-12))


def bag_of_words(train: Sequence[str], labels: Bool[np.ndarray, " train"], test: Sequence[str], known: Bool[np.ndarray, " test"]) -> float:
    """What a probe of the words of a text alone is worth: the accuracy on `test` of the same probe on which words occur, in any order.

    Texts are templates: their {fields} are no words. What it gets right needs no model, and shows no sense that a model has made out.
    """
    words = [set(re.findall(r"\w+", re.sub(r"\{\w+\}", " ", text).lower())) for text in (*train, *test)]
    vocabulary = sorted(set().union(*words[: len(train)]))
    there = torch.tensor([[[float(word in said) for word in vocabulary]] for said in words])
    return float(train_probes(there[: len(train)], labels, [0]).accuracy(there[len(train) :], known)[0])


def shuffled(labels: Bool[np.ndarray, " vector"], groups: Sequence[str], seed: int) -> Bool[np.ndarray, " vector"]:
    """Labels of a control task: as many groups of either label as before, but which ones is drawn (Hewitt and Liang 2019)."""
    names = list(dict.fromkeys(groups))
    first = {group: bool(label) for group, label in zip(groups, labels, strict=True)}
    drawn = dict(zip(names, np.random.default_rng(seed).permutation([first[name] for name in names]), strict=True))
    return np.array([bool(drawn[group]) for group in groups])
