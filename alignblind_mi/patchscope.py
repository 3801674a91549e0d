"""Patchscopes: put a hidden representation into another prompt and let the model say what it is (Ghandeharioun et al. 2024).

The source is any set of recorded vectors; the target is a prompt with a marked placeholder. This module does NOT know senses or scores.
"""

from jaxtyping import Float
from torch import Tensor

from alignblind_mi.edits import Edit, Row, Site
from alignblind_mi.prompts import Prompt


def patchscope_rows(resid: Float[Tensor, "source d_model"], target: Prompt, layer: int, *, mark: str = "placeholder") -> list[Row]:
    """One row per source vector: it replaces the residual stream after `layer` at every token of the target's `mark`.

    Source: Ghandeharioun et al. 2024, with the identity mapping; "Aligned but Blind" injects at layer 2.
    """
    site = Site(layer, mark, tokens="all")
    return [Row(target, (Edit(site, vector),)) for vector in resid]
