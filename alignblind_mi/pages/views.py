"""Interactive views for notebooks, drawn by CircuitsVis from its own bundled script: they work without a network.

Tokens come from a checkpoint's tokenizer or from rows that somebody sent: they are shown and never run. So the calls that CircuitsVis would
write itself are written here, its ways to take a token for HTML are closed, and a page allows this one script and no network.
This module does NOT compute anything: it is given attention patterns, or values by token, and shows them.
"""

import base64
import hashlib
import re
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd

from alignblind_mi.borders.texts import encodable, script_json, shortened
from alignblind_mi.errors import AlignblindError
from alignblind_mi.instruments.attention import attention_rows
from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.prompts import Prompt

LONGEST = 200    # characters of a token that are shown
HEIGHT = 420    # of a view in a notebook, in pixels; its lower edge can be pulled


class ViewError(AlignblindError):
    """Rows that cannot be shown."""


@dataclass(frozen=True)
class View:
    """A piece of HTML with one script: Jupyter shows it in a frame of its own, `as_page` makes a page of it."""

    html: str = field(repr=False)
    script: str = field(repr=False, default="")

    def _repr_html_(self) -> str:
        """The page in a frame that runs scripts without the rights of the notebook around it."""
        style = f"width: 100%; height: {HEIGHT}px; border: 0; resize: vertical; background: #fff"
        return f'<iframe sandbox="allow-scripts" style="{style}" title="view" srcdoc="{escape(as_page(self, "view"))}"></iframe>'


def attention_view(model: HookedModel, prompt: Prompt | str, layer: int) -> View:
    """The attention patterns of every head of one layer, as CircuitsVis draws them.

    Errors: ModelError for a layer that does not exist, or a model that transformer-lens cannot carry.
    """
    return pattern_view(attention_rows(model, prompt, layer))


def pattern_view(rows: pd.DataFrame) -> View:
    """The same from saved rows of `attention_rows` (one prompt, one layer). Errors: ViewError for rows of several, or with gaps."""
    if rows.empty or rows.duplicated(["head", "query", "key"]).any():
        raise ViewError(f"{len(rows)} rows are not the attention of one prompt in one layer: choose those of one.")
    tokens = rows.drop_duplicates("query").sort_values("query")
    heads = rows["head"].nunique()
    if {*tokens["query"]} != {*range(len(tokens))} or {*rows["head"]} != {*range(heads)} or not rows["key"].isin(tokens["query"]).all():
        raise ViewError("the rows are no whole pattern: heads, queries and keys must be numbered from 0 without gaps.")
    patterns = np.zeros((heads, len(tokens), len(tokens)))
    patterns[rows["head"], rows["query"], rows["key"]] = rows["weight"]
    return _drawn("AttentionPatterns", tokens=_shown(tokens["token"]), attention=_finite(patterns))


def as_page(view: View, title: str) -> str:
    """A view as an HTML page of its own: it runs this view's script alone and can reach no network."""
    digest = base64.b64encode(hashlib.sha256(view.script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = (f'<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{escape(encodable(shortened(title, LONGEST)))}</title></head>")
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>{view.html}</body></html>\n'


def token_view(rows: pd.DataFrame, *, value: str = "log_odds", layer: int | None = None) -> View:
    """A prompt whose tokens are coloured by a value of theirs, one layer at a time (blue: positive, red: negative, white: 0).

    A button a layer; one of them alone with `layer`. All layers have one symmetric scale. The rows are those of one prompt, for example of
    `lens_contrast`. Columns: position, token, layer and `value`.

    Errors: ViewError for a missing column, a layer that the rows do not have, or more than one value a token and layer.
    """
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
    values = _finite(table.to_numpy(float))
    limit = max(1e-6, float(np.abs(values).max()))
    bounds = {"positiveBounds": [limit] * table.shape[1], "negativeBounds": [-limit] * table.shape[1]}
    labels = [f"layer {at}" for at in table.columns]
    return _drawn("ColoredTokensMulti", tokens=_shown(tokens), values=values, labels=labels, **bounds)


def _shown(tokens: pd.Series) -> list[str]:
    return [shortened(str(token), LONGEST) for token in tokens]


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ViewError("the rows have a value that is missing or not finite: a view has no colour for it.")
    return values


def _drawn(component: str, **given: Any) -> View:
    """One component of CircuitsVis with what it is given (texts, numbers, arrays)."""
    name = f"circuits-vis-{uuid4()}"    # several views can stand in one page
    data = script_json({key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in given.items()})
    script = f'\n{_library()}\nCircuitsVis.render(\n"{name}",\nCircuitsVis.{component},\n{data}\n)\n'
    return View(f'<div id="{name}" style="margin: 15px 0;"></div>\n<script type="module">{script}</script>', script)


@cache
def _library() -> str:
    """CircuitsVis' own script, so that it can stand in a page and sets tokens as text: it would set them as HTML to show blanks.

    Errors: ViewError for a version of it that has other ways to do so.
    """
    import circuitsvis

    source = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text("utf-8")
    source = source.replace('"&nbsp;"', '"\\xa0"')
    source = re.sub(r"dangerouslySetInnerHTML:\{__html:([^{}]*)\}", r"children:\1", source)
    if re.search(r"dangerouslySetInnerHTML\s*:\s*\{", source) or "&nbsp;" in source:
        raise ViewError(f"this version of circuitsvis ({circuitsvis.__version__}) shows tokens as HTML: install one that is known, "
                        "circuitsvis==1.43.3.")
    return re.sub(r"</(?=script)", r"<\\/", source, flags=re.IGNORECASE)    # it stands in strings: the page would take it for the end
