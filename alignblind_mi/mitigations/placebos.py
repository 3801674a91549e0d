"""Noise that does as much as a treatment, and no more in common with it: the placebo of steering, and what each of both does.

Vectors of the same norms are no match. Noise that is drawn anew for each layer partly cancels, where a direction adds up over its window;
a random vector in place of an activation takes away what all activations have in common. So noise keeps one direction over all layers, is
added to what is there, and is scaled until it displaces the residual stream as far as the treatment does, where the window ends.
This module does NOT know what is asked, nor what noise changes in the answers.
"""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.settings import Count, Seed, many, takes
from alignblind_mi.models.edits import GENERATED, LAST, UNTREATED, Edit, EditError, Site, Sites, Treatment, Treatments, random_like
from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.prompts import Prompt, Prompts, as_prompts

log = logging.getLogger(__name__)
SEEDS = 5    # how often noise is drawn: one draw says little of chance
SAMPLE = 16    # prompts on which displacement and divergence are measured
NOISE_PAIRS = 8    # word pairs a category that each draw is asked, where a measure would ask more
TOLERANCE = 0.005    # of the treatment's displacement
STEPS = 24    # a proportional one is enough where the stream is near to linear: three or four of them
EFFECTS = ("placebo", "placebo_of", "placebo_seed", "displacement", "kl_prompts")    # what rows say of their treatment
Tokens = list[Float[Tensor, "_ d_model"]]    # one tensor a prompt


@takes(EditError)
def noise_like(model: HookedModel, treatment: Treatment, prompts: Prompts, *, seed: Seed = 0) -> Treatment:
    """The placebo of any steering: noise at the same places that displaces the residual stream as far, where the treated window ends.

    What is added, or ablated, becomes one random direction for all layers, with the treatment's norms. What is replaced stays, plus noise
    as long as it is far from what would have replaced it, token by token: in the first layer the whole of it, and from there on as much
    more, in the same direction, as the displacement grows (or less of it in the first layer, where it shrinks). One scale makes the
    displacement after the last treated layer, averaged over the treated tokens of (at most 16 of) the prompts, the treatment's within half
    a per cent. Where one vector acts at several marks, one direction does. `details` hold `of`, `seed` and `scale`.

    Errors: EditError for a treatment without edits, or whose edits act at no token of the prompts.
    """
    return _matched(model, treatment, as_prompts(prompts), [seed])[0]


@takes(EditError)
def noise_placebos(model: HookedModel, treatment: Treatment, prompts: Prompts, *, n: Count = SEEDS, seed: Seed = 0) -> list[Treatment]:
    """`noise_like`, drawn n times: by the seeds `seed`, `seed` + 1 and so on. Errors: as there."""
    return _matched(model, treatment, as_prompts(prompts), range(seed, seed + n))


@takes(EditError)
def treatment_effects(model: HookedModel, treatments: Treatments, prompts: Prompts, *, sites: Sites = ()) -> pd.DataFrame:
    """What treatments do to a model, whatever comes of it: one row each, measured on at most 16 of the prompts.

    Columns: treatment; placebo (its kind, empty for what is none), placebo_of and placebo_seed (of noise; empty and -1 else); layer and
    tokens (where the stream was read, and how many tokens in all); displacement (mean norm of the change of the residual stream, treated
    less untreated, in its units); kl_prompts (divergence of the untreated next-token distribution after a prompt from the treated one,
    mean over prompts, nats). The stream is read at the treated tokens after the last treated layer; of what has no edits (adapters,
    prefixes), at `sites`, and without them displacement is NaN. What acts on generated tokens alone is measured as if it acted on the
    prompt's last one.
    """
    some, plain = _sampled(as_prompts(prompts)), model.under(UNTREATED)
    before, records, streams = plain.next_log_probs(plain.rows(some)), [], dict[tuple[Site, ...], Tokens]()
    for treatment in many(treatments):
        shown, where = _readable(treatment), _ends(treatment) or tuple(many(sites))
        if where not in streams:
            (streams[where],) = _streams(model, [UNTREATED], some, where)
        (treated,) = _streams(model, [shown], some, where)
        view = model.under(shown)
        after = view.next_log_probs(view.rows(some, partial=True))
        about = treatment.details
        records.append({
            "treatment": treatment.name, "placebo": about.get("placebo", "other" if treatment.family == "placebo" else ""),
            "placebo_of": about.get("of", ""), "placebo_seed": int(about.get("seed", -1)) if "of" in about else -1,
            "layer": max((site.layer for site in where), default=-1), "tokens": sum(map(len, treated)),
            "displacement": _displacement(treated, streams[where]), "kl_prompts": float((before.exp() * (before - after)).sum(-1).mean())})
    return pd.DataFrame.from_records(records)


def with_effects(rows: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """Rows with what `treatment_effects` says of their treatments; nothing of those that were not measured."""
    return rows.merge(effects[["treatment", *EFFECTS]], on="treatment", how="left")


# ---- measuring ---------------------------------------------------------------------------------------------------------


def _sampled(prompts: Sequence[Prompt]) -> list[Prompt]:
    """At most SAMPLE of the prompts, in their order: the same ones each time, of all orders and templates."""
    if not prompts:
        raise EditError("there are no prompts to measure a treatment on: give those that are asked under it.")
    return [prompts[i] for i in sorted(random.Random(0).sample(range(len(prompts)), min(SAMPLE, len(prompts))))]


def _readable(treatment: Treatment) -> Treatment:
    """A treatment whose tokens a prompt has: what acts on generated tokens alone acts on the last one instead."""
    if any(edit.site.mark != GENERATED for edit in treatment.edits):
        return treatment
    return replace(treatment, edits=tuple(replace(edit, site=replace(edit.site, mark=LAST)) for edit in treatment.edits))


def _ends(treatment: Treatment) -> tuple[Site, ...]:
    """The treated tokens, after the last treated layer."""
    edits = _readable(treatment).edits
    last = max((edit.site.layer for edit in edits), default=-1)
    return tuple(dict.fromkeys(replace(edit.site, layer=last, stream="resid_post", units=()) for edit in edits))


def _streams(model: HookedModel, treatments: Sequence[Treatment], prompts: Sequence[Prompt], sites: Sequence[Site]) -> list[Tokens]:
    """The residual stream at sites under treatments of one adapter (or none), run together."""
    view = model.under(replace(UNTREATED, adapter=treatments[0].adapter))
    rows = [row for treatment in treatments for row in model.under(treatment).rows(prompts, partial=True)]
    found, n = view.record_tokens(rows, sites), len(prompts)
    return [found[k * n : (k + 1) * n] for k in range(len(treatments))]


def _displacement(treated: Tokens, clean: Tokens) -> float:
    """The mean norm of the change over all tokens; of a prompt that has more of them after a prefix, those at its end."""
    changes = [(a[len(a) - n :] - b[len(b) - n :]).norm(dim=-1) for a, b in zip(treated, clean, strict=True) for n in [min(len(a), len(b))]]
    every = torch.cat(changes)
    return float(every.mean()) if len(every) else math.nan


# ---- noise -------------------------------------------------------------------------------------------------------------


def _matched(model: HookedModel, treatment: Treatment, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Treatment]:
    """Noise by each seed, at the scale that displaces the stream as far as the treatment's edits do: proportional steps, or bisection."""
    if not treatment.edits:
        raise EditError(f"noise stands for edits, and the treatment {treatment.name!r} has none: adapters and prefixes have placebos of "
                        "their own kind (train_lora(kind='placebo'), another prefix).")
    some, sites, shown = _sampled(prompts), _ends(treatment), _readable(treatment)
    (clean,), (treated,) = (_streams(model, [one], some, sites) for one in (replace(shown, edits=()), shown))
    wanted = _displacement(treated, clean)
    if math.isnan(wanted):
        raise EditError(f"the treatment {treatment.name!r} acts at no token of these prompts: give prompts with its marks "
                        f"({', '.join(dict.fromkeys(edit.site.mark for edit in treatment.edits))}).")
    scales, within = dict.fromkeys(seeds, float(wanted > 0)), dict.fromkeys(seeds, (0.0, math.inf))
    left = [seed for seed in seeds if wanted > 0]
    for _ in range(STEPS):
        if not left:
            break
        found = _streams(model, [_readable(_noise(treatment, seed, scales[seed])) for seed in left], some, sites)
        moved = {seed: _displacement(tokens, clean) for seed, tokens in zip(left, found, strict=True)}
        left = [seed for seed in left if abs(moved[seed] - wanted) > TOLERANCE * wanted]
        for seed in left:
            low, high = within[seed] = (scales[seed], within[seed][1]) if moved[seed] < wanted else (within[seed][0], scales[seed])
            guess = scales[seed] * wanted / moved[seed] if moved[seed] > 0 else 2 * scales[seed]
            scales[seed] = guess if low < guess < high else (low + high) / 2 if high < math.inf else 2 * low
    if left:
        log.warning("noise by the seeds %s displaces the stream by other than %.4g, which %s does: see their rows.",
                    ", ".join(map(str, left)), wanted, treatment.name)
    return [_noise(treatment, seed, scales[seed]) for seed in seeds]


def _noise(treatment: Treatment, seed: int, scale: float) -> Treatment:
    """A treatment with a random direction for each vector that it has in a layer, the same in all layers, at a scale."""
    first: dict[tuple[int, int], str] = {}    # one vector at several marks of a layer stays one
    drawn: dict[tuple[int, str, str], Tensor] = {}
    edits, start = list[Edit](), min(edit.site.layer for edit in treatment.edits)
    for edit in treatment.edits:
        mark = first.setdefault((edit.site.layer, edit.vector.data_ptr()), f"{edit.site.mark}|{edit.site.occurrence}|{edit.site.units}")
        key = (edit.site.layer, edit.site.stream, mark)
        if key not in drawn:
            length = edit.vector if edit.how == "add" else torch.ones_like(edit.vector) / math.sqrt(edit.vector.numel())
            drawn[key] = random_like(length.float(), f"{seed}|{edit.site.stream}|{mark}")
        edits.append(_noisy(edit, drawn[key], scale, start))
    about = {"placebo": "noise", "of": treatment.name, "seed": str(seed), "scale": f"{scale:.6g}"}
    return replace(treatment, name=f"noise_like_{treatment.name}_seed{seed}", edits=tuple(edits), family="placebo",
                   details={**treatment.details, **about})


def _noisy(edit: Edit, drawn: Float[Tensor, " size"], scale: float, start: int) -> Edit:
    """What noise does in the place of an edit: it is added, as far as a replacement would have gone.

    A replacement is made anew in each layer, where noise adds up: a scale up to 1 is of the first layer alone, what is above of the others.
    """
    if edit.how != "replace":
        return replace(edit, vector=drawn, how="add", strength=scale * edit.strength)
    return replace(edit, vector=drawn, how="add", strength=min(scale, 1.0) if edit.site.layer == start else max(scale - 1.0, 0.0),
                   as_far_as=edit.vector)
