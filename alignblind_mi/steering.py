"""Steering by replacement: identifiers of a prompt get the activations they have in a phrase that settles their sense.

Source: "Aligned but Blind", activation engineering: the residual at the identifiers of "Race: black and white" (controls: "Color: ...",
"Random: ...") replaces that of the bias prompt in a window of consecutive layers. This module does NOT know what steering changes.
"""

from collections.abc import Sequence

from alignblind_mi.concept import Concept, Cue
from alignblind_mi.edits import Edit, EditError, Row, Site, Stream, Treatment
from alignblind_mi.model import HookedModel
from alignblind_mi.prompts import steering_prompt

WINDOW_SHARE = 10 / 32    # the paper's window: 10 consecutive layers of Llama 3 8B's 32


def window_size(n_layers: int, share: float = WINDOW_SHARE) -> int:
    """Layers per window: the paper's share of the model's depth, at least one."""
    return max(1, int(share * n_layers + 0.5))


def layer_windows(n_layers: int, size: int | None = None) -> list[range]:
    """All windows of `size` consecutive layers (default: the paper's share of depth), from the first layer to the last."""
    width = size or window_size(n_layers)
    if width > n_layers:
        raise EditError(f"a window of {width} layers does not fit a model of {n_layers} layers.")
    return [range(start, start + width) for start in range(n_layers - width + 1)]


def steerable(cue: Cue) -> bool:
    """Whether a cue has one pair of identifiers: replacing one name by another would change who is asked about, not the sense."""
    return len(cue.marked) == 1 and len(cue.unmarked) == 1


def can_steer(concept: Concept, cue: str) -> bool:
    """Whether a study steers: the cue has the concept's senses, and one pair of identifiers."""
    return concept.has_senses(cue) and steerable(concept.cue(cue))


def sense_steering(model: HookedModel, concept: Concept, cue: str | Cue, sense: str, layers: Sequence[int], *,
                   stream: Stream = "resid_post") -> Treatment:
    """The treatment that replaces the identifiers' residual stream, after each of `layers`, by that in the phrase of `sense`.

    `sense` is a sense or a control of the concept; `stream` may be another place in those layers (see `Site`).

    Errors: EditError for a cue with several identifiers or a layer that does not exist; ConceptError for an unknown sense, or a concept
    or cue without senses.
    """
    cue = concept.cue(cue) if isinstance(cue, str) else cue
    concept.both_senses(cue)
    if not steerable(cue):
        raise EditError(f"the cue {cue.name!r} draws from several identifiers: replacing one by another would change who is asked about. "
                        "Steer a cue with one pair of identifiers.")
    phrase = steering_prompt(concept, cue, sense)
    sites = [Site(layer, mark, stream) for layer in layers for mark in ("marked", "unmarked")]
    vectors = model.record([Row(phrase)], sites)[0]
    edits = tuple(Edit(site, vector) for site, vector in zip(sites, vectors, strict=True))
    family = "steering" if sense == concept.group_sense else "placebo"
    name = f"steer_{sense}_{min(layers)}-{max(layers)}"
    return Treatment(name, edits, family=family, details={"phrase": phrase.text, "sense": sense, "layers": f"{min(layers)}-{max(layers)}"})
