"""Attribution patching: what a patch would do, to first order, for every place at the cost of two forward passes and a backward one.

The estimate is (source activation - target activation) . d(log-odds)/d(activation), the gradient taken in the run that would be patched
(Nanda 2023, neelnanda.io/mechanistic-interpretability/attribution-patching; Syed, Rager and Conmy 2023, arXiv 2310.10348). Where the answer
is saturated that gradient says little; `steps` takes its mean along the way from the target's embeddings to the source's (integrated
gradients: Sundararajan et al. 2017; Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806). It screens; it does not measure:
`screen_agreement` says how well it agrees with the exact grid. transformer-lens' own tool
(tools.analysis.attribution_patching) scores heads and MLP outputs on the bridge; this one takes the same sites, treatments and answers
as `patch_grid`, residual streams and neurons among them.
"""

from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.settings import AnyLayers, Names, Weight, many, takes
from alignblind_mi.instruments.contrast import Pairs, PatchError
from alignblind_mi.instruments.gradients import Activations, Where, activations, log_odds_gradients
from alignblind_mi.instruments.patching import MIN_DIFFERENCE, PLACE, Case, Patch, cases, grid_sites, label, log_odds, patches
from alignblind_mi.models.edits import Site, Sites
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.tokens import place

EMBEDDING: Where = (-1, "resid_post")


@takes(PatchError)
def attribution_patching(model: HookedModel, pairs: Pairs, sites: Sites, *, direction: str = "denoise",
                         steps: int = 1, min_difference: Weight = MIN_DIFFERENCE) -> pd.DataFrame:
    """First-order estimates of the patches of `patch_grid`, under the model's treatment; one row per pair and site.

    `steps` 1 takes the gradient in the run that would be patched; k > 1 takes the mean of k gradients on the way to the source run, at the
    cost of k backward passes.

    Columns: the labels and places of `patch_grid`, clean, corrupt, attribution (nats: estimate of `moved`), effect_estimate (its share of
    the difference between the runs; NaN where that is below `min_difference` nats).
    """
    pairs, sites = many(pairs), many(sites)
    records: list[dict[str, object]] = []
    for i, case in enumerate(cases(model, pairs, direction)):
        found = patches(case, sites)
        source, target = _both_runs(model, case, {_where(patch.site) for patch in found}, steps)
        other = float(log_odds(model, [case.sources[""]], [case.pair.answers])[0])
        clean, corrupt = (other, target.log_odds) if direction == "denoise" else (target.log_odds, other)
        difference = other - target.log_odds
        for patch in found:
            moved = float(_products(model, patch, source, target).sum())
            records.append({**label(model, i, case, patch), "clean": clean, "corrupt": corrupt, "attribution": moved,
                            "effect_estimate": moved / difference if abs(difference) >= min_difference else float("nan")})
    return pd.DataFrame.from_records(records)


def _where(site: Site) -> Where:
    at = place(site.layer, site.stream, 0)
    return at.layer, at.stream


def _both_runs(model: HookedModel, case: Case, places: set[Where], steps: int) -> tuple[Activations, Activations]:
    """The source's activations, and the target's with the gradients there. Errors: PatchError for less than one step."""
    if steps < 1:
        raise PatchError(f"a gradient is taken at one point or more, got steps={steps}.")
    ordered = sorted({*places, EMBEDDING})
    source = activations(model, case.sources[""], ordered)
    target = log_odds_gradients(model, case.target, case.pair.answers, ordered)
    if steps == 1:
        return source, target
    way = source.values[EMBEDDING] - target.values[EMBEDDING]
    gradients = [log_odds_gradients(model, case.target, case.pair.answers, ordered, way * (k + 0.5) / steps).gradients
                 for k in range(steps)]
    return source, replace(target, gradients={at: torch.stack([each[at] for each in gradients]).mean(0) for at in ordered})


def _products(model: HookedModel, patch: Patch, source: Activations, target: Activations) -> Float[Tensor, "token size"]:
    """(source - target) x gradient, for the tokens and features of a patch."""
    where, tokens = _where(patch.site), list(patch.positions)
    products = (source.values[where][tokens] - target.values[where][tokens]) * target.gradients[where][tokens]
    features = model.site_features(patch.site)
    return products[:, list(features)] if features else products


@takes(PatchError)
def unit_attribution(model: HookedModel, pairs: Pairs, mark: str | tuple[str, int], *, stream: str = "post",
                     layers: AnyLayers | None = None, direction: str = "denoise", steps: int = 1) -> Float[Tensor, "layer unit"]:
    """Mean attribution (nats) of every head (`z`) or neuron (`post`) at a mark's tokens together, over pairs.

    Errors: PatchError for a stream without units.
    """
    if stream not in ("z", "post"):
        raise PatchError(f"the stream {stream!r} has no units: give 'z' (heads) or 'post' (neurons).")
    pairs, layers = many(pairs), range(model.n_layers) if layers is None else many(layers)
    sites = grid_sites(layers, [mark], [stream])
    total = torch.zeros(len(sites), model.n_units(sites[0].layer, stream))
    for case in cases(model, pairs, direction):
        found = patches(case, sites)
        source, target = _both_runs(model, case, {_where(site) for site in sites}, steps)
        products = torch.stack([_products(model, patch, source, target).sum(0) for patch in found])
        total += products.view(*total.shape, -1).sum(-1)
    return total / len(pairs)


@takes(PatchError)
def top_neuron_sites(model: HookedModel, pairs: Pairs, mark: str | tuple[str, int], k: int, *,
                     layers: AnyLayers | None = None, direction: str = "denoise", steps: int = 1) -> list[Site]:
    """For each layer one site with the k neurons of the largest |mean attribution| at a mark: candidates for an exact patch.

    Choose them on other pairs than those they are measured on.
    """
    layers = list(range(model.n_layers)) if layers is None else list(many(layers))
    scores = unit_attribution(model, pairs, mark, layers=layers, direction=direction, steps=steps)
    chosen = scores.abs().topk(min(k, scores.shape[1]), dim=1).indices
    return [site for layer, units in zip(layers, chosen.tolist(), strict=True)
            for site in grid_sites([layer], [mark], ["post"], units=tuple(sorted(units)))]


@takes(PatchError)
def screen_agreement(exact: pd.DataFrame, screen: pd.DataFrame | None = None, by: Names = ("direction", "stream")) -> pd.DataFrame:
    """How well a screen (`attribution_patching`) agrees with the exact grid (`patch_grid`), in nats moved, over pairs and places.

    Without `screen` the exact rows bring their own `attribution`, as those of `measure_patching` do.
    Columns: `by`, n, pearson, spearman (NaN where either is constant), mean_exact, mean_screen, largest_miss (the largest absolute
    difference). Errors: PatchError if the two have no place in common.
    """
    keys, patched = ["pair", *PLACE], exact[exact["control"] == ""]
    if screen is None and "attribution" not in exact:
        raise PatchError("the rows have no column 'attribution': give the screen's rows beside them.")
    both = patched
    if screen is not None:
        both = patched.drop(columns="attribution", errors="ignore").merge(screen[[*keys, "attribution"]], on=keys)
    if both.empty:
        raise PatchError("the exact rows and the screen have no place in common: make both from the same pairs and sites.")
    records = []
    for key, group in both.groupby(list(by), sort=False, dropna=False):
        moved, guess = group["moved"], group["attribution"]
        varies = len(group) > 1 and moved.nunique() > 1 and guess.nunique() > 1
        records.append({**dict(zip(by, key, strict=True)), "n": len(group),
                        **{name: moved.corr(guess, method=name) if varies else float("nan") for name in ("pearson", "spearman")},
                        "mean_exact": moved.mean(), "mean_screen": guess.mean(), "largest_miss": (moved - guess).abs().max()})
    return pd.DataFrame.from_records(records)
