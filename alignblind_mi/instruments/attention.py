"""Attention patterns of a prompt as tidy rows. The patterns are transformer-lens' own (`HookedModel.bridge`)."""

import numpy as np
import pandas as pd

from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.prompts import Prompt


def attention_rows(model: HookedModel, prompt: Prompt | str, layer: int) -> pd.DataFrame:
    """Every head's attention pattern in one layer, under the model's treatment; one row per head, query and key (key <= query).

    Columns: model, treatment, prompt, layer, head, query, key (token positions, the BOS is 0), token (the query's text), weight (0 to 1;
    the weights of a query sum to 1). Errors: ModelError for a layer that does not exist, or a model that transformer-lens cannot carry.
    """
    prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
    (heads,) = model.cache(prompt, [f"blocks.{layer}.attn.hook_pattern"]).activations.values()
    (item,) = model.encode([row.prompt for row in model.rows([prompt])])
    tokens = np.array([model.tokenizer.decode([i]) for i in item.ids])
    pattern = heads[0].float().cpu().numpy()
    head, query, key = (index.ravel() for index in np.indices(pattern.shape))
    seen = key <= query
    rows = pd.DataFrame({"layer": layer, "head": head, "query": query, "key": key, "token": tokens[query], "weight": pattern.ravel()})
    return rows[seen].assign(model=model.spec.name, treatment=model.treatment.name, prompt=prompt.text).reset_index(drop=True)
