"""Patching study: at which layers, tokens, heads does a model carry what settles its answer?

Pairs of prompts that differ in one thing (`contrast_pairs`), patched in both directions, with controls. One row per patch. Nothing here
knows how a treatment works: the model it is given is already under one.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import pandas as pd

from alignblind_mi.borders.settings import AnyLayers, Count, Listed, Names, Seed, SomeNames, many, takes
from alignblind_mi.instruments.attribution import attribution_patching
from alignblind_mi.instruments.contrast import Contexts, PatchError, contrast_pairs
from alignblind_mi.instruments.patching import (
    CONTROLS,
    DIRECTIONS,
    EVERY_TOKEN,
    PLACE,
    grid_sites,
    head_sites,
    patch_grid,
    summarise_patching,
)
from alignblind_mi.models.edits import Site
from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.concept import Concept, Cue

PARTS = ("residual", "added", "heads", "screen")
MARKS: dict[str, tuple[str, ...]] = {
    "context": ("context", "context_identifiers", "identifiers", "all_identifiers", "positive", "negative", "last_token"),
    "identifiers": ("identifiers", "positive", "negative", "last_token"),
}
HEAD_MARKS = {"context": ("all_identifiers", "last_token"), "identifiers": ("identifiers", "last_token")}
CONTROLS_OF_PARTS = ("random",)    # of parts that are many and small; the residual stream has all the controls asked for
PLACEBOS = ("random", "wrong_token", "same_sense")    # what no reading of the prompt should depend on
THRESHOLD = 0.25
SCREEN_STEPS = 5    # of attribution patching: with one step the gradient is often saturated

Mark = str | tuple[str, int]
Marks = Annotated[Sequence[Mark], Listed()]


@takes(PatchError)
def measure_patching(model: HookedModel, concept: Concept, cue: str | Cue, *, swap: str = "context", contexts: Contexts | None = None,
                     parts: Names = PARTS, directions: SomeNames = DIRECTIONS, controls: Names = CONTROLS,
                     layers: AnyLayers | None = None, marks: Marks | None = None, categories: Names = (),
                     max_word_pairs: Count = 2, steps: int = SCREEN_STEPS, seed: Seed = 0, progress: Callable[[int], None] | None = None
                     ) -> pd.DataFrame:
    """Patch the contrast pairs of a cue at every layer; `max_word_pairs` a category bounds them.

    `parts`: `residual` (the stream after each layer, at each of `marks`), `added` (what attention and MLP add there), `heads` (each head,
    at the identifiers and the last token), `screen` (attribution patching of all of these, with `steps`). `contexts` and `swap` as in
    `contrast_pairs`; `marks` as in `grid_sites`, `every_token` among them. The residual stream is patched with all `controls`, the other
    parts with the random one of them.

    Columns: those of `patch_grid`, and with the screen attribution and effect_estimate (NaN for controls). `progress` is told how many
    rows were finished.

    Errors: PatchError for an unknown part, swap, direction or control, or pairs that cannot be compared; ModelError if the tokenizer does
    not know a word.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise PatchError(f"unknown part {unknown[0]!r}. Known: {', '.join(PARTS)}.")
    pairs = contrast_pairs(model, concept, cue, swap=swap, contexts=contexts, categories=categories, max_word_pairs=max_word_pairs,
                           seed=seed)
    layers = range(model.n_layers) if layers is None else many(layers)
    grids = _grids(model, parts, layers, marks or MARKS[swap], HEAD_MARKS[swap], controls)
    found = []
    for direction in directions:
        rows = pd.concat([patch_grid(model, pairs, sites, direction=direction, controls=some, seed=seed, progress=progress)
                          for sites, some in grids], ignore_index=True)
        if "screen" in parts:
            screen = attribution_patching(model, pairs, [site for sites, _ in grids for site in sites], direction=direction, steps=steps)
            rows = _with_screen(rows, screen)
        found.append(rows)
    return pd.concat(found, ignore_index=True)


def _grids(model: HookedModel, parts: Sequence[str], layers: Sequence[int], marks: Sequence[Mark], head_marks: Sequence[Mark],
           controls: Sequence[str]) -> list[tuple[list[Site], list[str]]]:
    """The sites of the parts that are asked for, with their controls. Errors: PatchError where the parts have no sites."""
    few = [control for control in controls if control in CONTROLS_OF_PARTS]
    grids = {"residual": (grid_sites(layers, marks), list(controls)), "added": (grid_sites(layers, marks, ("attn_out", "mlp_out")), few),
             "heads": (head_sites(model, layers, head_marks), few)}
    chosen = [grid for part, grid in grids.items() if part in parts]
    if not chosen:
        raise PatchError(f"no part to patch was given: name some of {', '.join(grids)}.")
    return chosen


def _with_screen(rows: pd.DataFrame, screen: pd.DataFrame) -> pd.DataFrame:
    keys = ["pair", "control", *PLACE]
    return rows.merge(screen.assign(control="")[[*keys, "attribution", "effect_estimate"]], on=keys, how="left", validate="many_to_one")


# ---- what the rows say -------------------------------------------------------------------------------------------------


@takes(PatchError)
def depth_profile(rows: pd.DataFrame, *, mark: str = "all_identifiers", stream: str = "resid_post", controls: Names = PLACEBOS,
                  by: Names = ("model", "treatment", "direction")) -> pd.DataFrame:
    """The effect of patching a mark by layer, beside its controls; one row per `by` and layer.

    A guarded answer of even odds is also what a model gives when its representation is broken, so a denoising effect means something only
    above `random` and `wrong_token`. `control_phrase` is left out: a phrase about nothing does change the reading of a guarded prompt.

    Columns: `by`, layer, n, undefined, mean, low, high (see `summarise_patching`), control (the strongest), control_mean (its mean),
    control_low, control_high (from the lowest to the highest end of all controls' intervals; NaN without controls).

    Errors: PatchError if nothing was patched there.
    """
    here = rows[(rows["mark"] == mark) & (rows["stream"] == stream) & (rows["units"] == "") & (rows["occurrence"] == "all")]
    if here.empty:
        raise PatchError(f"no row patches {stream} at {mark!r}; marks: {', '.join(map(str, rows['mark'].unique()))}; "
                         f"streams: {', '.join(map(str, rows['stream'].unique()))}.")
    keys = [*by, "layer"]
    effects = summarise_patching(here[here["control"] == ""], keys)[[*keys, "n", "undefined", "mean", "low", "high"]]
    against = summarise_patching(here[here["control"].isin(list(controls))], [*keys, "control"])
    if against.empty:
        return effects.assign(control="", control_mean=float("nan"), control_low=float("nan"), control_high=float("nan"))
    hull = against.groupby(keys, sort=False).agg(control_low=("low", "min"), control_high=("high", "max")).reset_index()
    ranked = against.sort_values("mean", ascending=False, na_position="last").drop_duplicates(keys)
    strongest = ranked.rename(columns={"mean": "control_mean"})[[*keys, "control", "control_mean"]]
    return effects.merge(strongest, on=keys, how="left").merge(hull, on=keys, how="left")


class Depth(NamedTuple):
    """The first and the last layer (0-based) after which a patch has an effect."""

    first: int
    last: int


@takes(PatchError)
def effect_span(profile: pd.DataFrame, threshold: float = THRESHOLD) -> Depth | None:
    """From where to where a `depth_profile` of one model, treatment and direction shows an effect; None if nowhere.

    A layer counts if its mean effect is at least `threshold` and its interval lies above the controls' (above zero where there are none).

    Errors: PatchError for a profile of several.
    """
    if profile["layer"].duplicated().any():
        raise PatchError("the profile holds several models, treatments or directions: choose the rows of one.")
    above = profile["low"] > profile["control_high"].fillna(0.0)
    layers = profile[above & (profile["mean"] >= threshold)]["layer"]
    return Depth(int(layers.min()), int(layers.max())) if len(layers) else None


@takes(PatchError)
def heatmap_table(rows: pd.DataFrame, across: str = "", *, stream: str = "resid_post", mark: str = "all_identifiers",
                  controls: Names = ("random",)) -> pd.DataFrame:
    """Mean effects by layer for `patch_heatmap`, a panel per direction, and one for each of `controls` that was measured there.

    Columns: panel, layer, place, mean, low, high, n.

    `across`: `mark` (each mark that was patched), `token` (each token, of rows made with `every_token`; one column per position) or `head`
    (each head at `mark`; `stream` is then z); default: the first of these that the rows have. Errors: PatchError for another `across`, no
    such rows, or rows of several models or treatments.
    """
    several = next((name for name in ("model", "treatment") if name in rows and rows[name].nunique() > 1), None)
    if several is not None:
        raise PatchError(f"the rows are of several {several}s ({', '.join(map(str, rows[several].unique()))}): choose those of one, a map "
                         "would average over them.")
    chosen = {"mark": (rows["stream"] == stream) & (rows["mark"] != EVERY_TOKEN) & (rows["units"] == ""),
              "token": (rows["stream"] == stream) & (rows["mark"] == EVERY_TOKEN),
              "head": (rows["head"] >= 0) & (rows["mark"] == mark)}
    across = across or next((name for name, there in chosen.items() if there.any()), "mark")
    if across not in chosen:
        raise PatchError(f"unknown across={across!r}. Known: {', '.join(chosen)}.")
    here = rows[chosen[across] & rows["control"].isin(["", *controls])]
    here = here.sort_values("position" if across == "token" else "layer", kind="stable")
    if here.empty:
        raise PatchError(f"no row to show across {across}: nothing was patched there.")
    panel = here["direction"] + (", control: " + here["control"]).where(here["control"] != "", "")
    table = summarise_patching(here.assign(panel=panel, place=_places(here, across)), ("panel", "layer", "place"))
    order = {name: i for i, name in enumerate(f"{way}{end}" for way in rows["direction"].unique()
                                              for end in ("", *(f", control: {control}" for control in controls)))}
    table = table.sort_values("panel", key=lambda panels: panels.map(order), kind="stable").reset_index(drop=True)
    return table[["panel", "layer", "place", "mean", "low", "high", "n"]]


def _places(rows: pd.DataFrame, across: str) -> pd.Series:
    """What the columns of a heat map are called; a position with several tokens has none in its name."""
    if across == "head":
        return rows["head"].astype(str)
    if across == "mark":
        return rows["mark"] + ("#" + rows["occurrence"]).where(rows["occurrence"] != "all", "")
    words = rows.groupby("position")["token"].agg(lambda tokens: tokens.iloc[0] if tokens.nunique() == 1 else "·")
    return rows["position"].astype(str) + " " + rows["position"].map(words)
