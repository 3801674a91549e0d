"""Interactive views for notebooks, drawn by CircuitsVis from its own bundled script: they work without a network.

This module does NOT compute anything: it is given a model's cache and shows it.
"""

from dataclasses import dataclass, field

from alignblind_mi.model import HookedModel
from alignblind_mi.prompts import Prompt


@dataclass(frozen=True)
class View:
    """A piece of HTML that Jupyter shows and that can be written into a page."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def attention_view(model: HookedModel, prompt: Prompt | str, layer: int) -> View:
    """The attention patterns of every head of one layer, as CircuitsVis draws them.

    Errors: EditError / ModelError for a layer that does not exist.
    """
    from circuitsvis.attention import attention_patterns

    prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
    pattern = model.cache(prompt, [f"blocks.{layer}.attn.hook_pattern"])
    (item,) = model.encode([row.prompt for row in model.treatment.rows([prompt])])
    tokens = [model.tokenizer.decode([i]) for i in item.ids]
    (heads,) = pattern.activations.values()
    return View(attention_patterns(tokens=tokens, attention=heads[0].float()).local_src)

