"""Directions from one sense to the other: paired texts that differ in the sense, and what is made of their activations.

Sources: see `steering.py`, which makes vectors and treatments of them. This module does NOT know what a direction is used for.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.instruments.probes import train_probes
from alignblind_mi.models.edits import LAST, Site, Stream
from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.concept import Concept, ConceptError, Cue
from alignblind_mi.stimuli.prompts import Prompt, fill, filled

ROLES = ("marked", "unmarked")


def direction(method: str, towards: Float[Tensor, "pair layer d_model"], away: Float[Tensor, "pair layer d_model"]
              ) -> Float[Tensor, "layer d_model"]:
    """One direction a layer, by a method of `steering_vectors`, from paired activations of a sense and of the other one."""
    mean = (towards - away).mean(0)
    if method == "pca":
        first = torch.linalg.svd((towards - away).transpose(0, 1), full_matrices=False).Vh[:, 0]
        return first * (first * mean).sum(-1, keepdim=True)
    if method == "probe":
        labels = np.repeat([True, False], len(towards))
        found = train_probes(torch.cat([towards, away]), labels, range(towards.shape[1])).direction
        return 2 * found / found.square().sum(-1, keepdim=True)
    return mean


def contrasted(model: HookedModel, concept: Concept, cue: Cue, sense: str, method: str, layers: Sequence[int], stream: Stream
               ) -> tuple[Float[Tensor, "pair layer d_model"], Float[Tensor, "pair layer d_model"], list[str]]:
    """Activations of a sense and of the other one in paired texts, and the texts."""
    senses = (concept.group_sense, concept.other_sense)
    if sense not in senses:
        raise ConceptError(f"a direction leads from one sense of {concept.name!r} to the other ({', '.join(senses)}); {sense!r} is none of "
                           "them. Use method='replacement' for the phrase of a control.")
    texts = [_restated(concept, cue, name) if method == "contrast" else _in_contexts(concept, cue, name) for name in senses]
    pairs = min(map(len, texts))
    texts = [some[:pairs] for some in texts]
    model.check_known([prompt for some in texts for prompt in some])
    marks = (LAST,) if method == "contrast" else ROLES
    sites = [Site(layer, mark, stream) for mark in marks for layer in layers]
    found = [model.record(model.treatment.rows(some, partial=True), sites).view(pairs * len(marks), len(layers), -1) for some in texts]
    towards, away = found if sense == senses[0] else found[::-1]
    return towards, away, [prompt.text for some in texts for prompt in some]


def _in_contexts(concept: Concept, cue: Cue, sense: str) -> list[Prompt]:
    """The `train` sentences that settle a sense, with both orders of the identifiers; only these are marked."""
    if sense not in concept.contexts:
        raise ConceptError(f"the concept {concept.name!r} has no sentences that settle the sense {sense!r}: give [contexts.{sense}].")
    return [fill(text, dict(zip("xy", order, strict=True)), dict(zip("xy", roles, strict=True)))
            for text in concept.contexts[sense].train
            for roles, order in ((ROLES, (cue.marked[0], cue.unmarked[0])), (ROLES[::-1], (cue.unmarked[0], cue.marked[0])))]


def _restated(concept: Concept, cue: Cue, sense: str) -> list[Prompt]:
    """Awareness sentences with their restatement in a sense: a pair of senses differs in the restatement alone."""
    awareness = concept.awareness
    if awareness is None or not awareness.others:
        raise ConceptError(f"the concept {concept.name!r} has no [awareness] sentences with restatements of both senses: contrast pairs "
                           "are made of them.")
    both = min(len(awareness.restatements), len(awareness.others))    # pairs differ in the restatement alone
    endings = (awareness.restatements if sense == concept.group_sense else awareness.others)[:both]
    x, y = cue.marked[0], cue.unmarked[0]
    return [Prompt(filled(sentence + awareness.separator + ending, x=x, y=y))
            for sentence in awareness.sentences for ending in endings]
