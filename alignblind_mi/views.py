"""Interactive views for notebooks, drawn by CircuitsVis from its own bundled script: they work without a network.

This module does NOT compute anything: it is given attention patterns, or values by token, and shows them.
"""

from dataclasses import dataclass, field
from html import escape

import numpy as np
import pandas as pd

from alignblind_mi.attention import attention_rows
from alignblind_mi.errors import AlignblindError
from alignblind_mi.model import HookedModel
from alignblind_mi.prompts import Prompt


class ViewError(AlignblindError):
    """Rows that cannot be shown."""


@dataclass(frozen=True)
class View:
    """A piece of HTML that Jupyter shows and that can be written into a page."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def attention_view(model: HookedModel, prompt: Prompt | str, layer: int) -> View:
    """The attention patterns of every head of one layer, as CircuitsVis draws them.

    Errors: ModelError for a layer that does not exist, or a model that transformer-lens cannot carry.
    """
    return pattern_view(attention_rows(model, prompt, layer))


def pattern_view(rows: pd.DataFrame) -> View:
    """The same from saved rows of `attention_rows` (one prompt, one layer). Errors: ViewError for rows of several."""
    from circuitsvis.attention import attention_patterns

    if rows.empty or rows.duplicated(["head", "query", "key"]).any():
        raise ViewError(f"{len(rows)} rows are not the attention of one prompt in one layer: choose those of one.")
    tokens = rows.drop_duplicates("query").sort_values("query")["token"].tolist()
    patterns = np.zeros((int(rows["head"].max()) + 1, len(tokens), len(tokens)))
    patterns[rows["head"], rows["query"], rows["key"]] = rows["weight"]
    return View(attention_patterns(tokens=tokens, attention=patterns).local_src)


def as_page(view: View, title: str) -> str:
    """A view as an HTML page of its own that needs no network."""
    head = f'<head><meta charset="utf-8"><title>{escape(title)}</title></head>'
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>{view.html}</body></html>\n'


def token_view(rows: pd.DataFrame, *, value: str = "log_odds", layer: int | None = None) -> View:
    """A prompt whose tokens are coloured by a value of theirs, one layer at a time (blue: positive, red: negative, white: 0).

    A button a layer; one of them alone with `layer`. All layers have one symmetric scale. The rows are those of one prompt, for example of
    `lens_contrast`. Columns: position, token, layer and `value`.

    Errors: ViewError for a missing column, a layer that the rows do not have, or more than one value a token and layer.
    """
    from circuitsvis.utils.render import render

    lacking = [name for name in ("position", "token", "layer", value) if name not in rows]
    if lacking:
        raise ViewError(f"the rows have no column {lacking[0]!r}; they have: {', '.join(map(str, rows.columns))}.")
    shown = rows if layer is None else rows[rows["layer"] == layer]
    if shown.empty:
        raise ViewError(f"the rows have no layer {layer}; they have: {', '.join(map(str, sorted(rows['layer'].unique())))}.")
    if shown.duplicated(["position", "layer"]).any():
        raise ViewError("the rows are of several prompts or models: choose those of one.")
    table = shown.pivot(index="position", columns="layer", values=value)
    tokens = shown.drop_duplicates("position").set_index("position")["token"].loc[table.index]
    values = table.to_numpy(float)
    limit = max(1e-6, float(np.abs(values).max()))
    bounds = {"positiveBounds": [limit] * table.shape[1], "negativeBounds": [-limit] * table.shape[1]}
    labels = [f"layer {at}" for at in table.columns]
    return View(render("ColoredTokensMulti", tokens=list(tokens), values=values, labels=labels, **bounds).local_src)
