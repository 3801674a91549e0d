"""Activation patching: activations of one run are put into another, place by place, to see which of them carry the difference.

Denoising puts the clean run's activations into the corrupt run and asks what is enough to bring the clean answer about; noising puts the
corrupt run's into the clean one and asks what is needed to keep it (Wang et al. 2023, arXiv 2211.00593; Heimersheim and Nanda 2024,
arXiv 2404.15255). Activations go where they come from: to the same token position. One row per pair, place and control. This module does
NOT know concepts: a pair brings its prompts, its answers and its labels.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.settings import AnyLayers, Listed, Names, Seed, Weight, many, takes
from alignblind_mi.instruments.contrast import Pair, Pairs, PatchError
from alignblind_mi.intervals.clustered import mean_interval
from alignblind_mi.models.edits import LAST, Edit, Row, Site, Sites, random_like
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.tokens import Encoded
from alignblind_mi.progress import counted
from alignblind_mi.stimuli.prompts import Prompt, Span

DIRECTIONS = ("denoise", "noise")
CONTROLS = ("random", "wrong_token", "same_sense", "control_phrase")
LAST_TOKEN, EVERY_TOKEN = "last_token", "every_token"    # marks that every prompt has here
MIN_DIFFERENCE = 0.25    # nats between the two runs below which a share of their difference says nothing
ROWS_AT_ONCE, VALUES_AT_ONCE = 4096, 2**27    # patched rows, and values of their vectors (half a GiB), that exist at a time
PLACE = ("direction", "layer", "stream", "mark", "occurrence", "position", "units")    # with `pair` and `control`: what a row is about


# ---- places ------------------------------------------------------------------------------------------------------------


@takes(PatchError)
def grid_sites(layers: AnyLayers, marks: Annotated[Sequence[str | tuple[str, int]], Listed()], streams: Names = ("resid_post",), *,
               units: Annotated[int | Sequence[int], Listed(alone=True)] = ()) -> list[Site]:
    """Sites over layers x marks x streams. A mark is a name (all of its mentions are patched together) or a name and a mention from 0.

    `last_token` is the prompt's last token, `every_token` becomes one site per token.
    """
    named = [mark if isinstance(mark, tuple) else (mark, None) for mark in marks]
    return [Site(layer, name, stream, "all", occurrence, many(units))    # type: ignore[arg-type]
            for stream, layer, (name, occurrence) in product(streams, many(layers), named)]


@takes(PatchError)
def head_sites(model: HookedModel, layers: AnyLayers, marks: Annotated[Sequence[str | tuple[str, int]], Listed()]) -> list[Site]:
    """One site per head, layer and mark: a head's output before the output projection (stream `z`)."""
    return [site for layer in many(layers) for head in range(model.n_units(layer, "z"))
            for site in grid_sites([layer], marks, ["z"], units=(head,))]


# ---- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A pair in one direction under a model's treatment: what is run, with every token marked, and where it comes from.

    `sources` maps "" to the run that is patched from, and each control that comes from a run of its own to that run.
    """

    pair: Pair
    direction: str
    target: Row
    sources: Mapping[str, Row]
    encoded: Encoded

    @property
    def tokens(self) -> list[int]:
        """Positions of the tokens that stand for text."""
        return [i for i, (start, end) in enumerate(self.encoded.offsets) if end > start]


@dataclass(frozen=True)
class Patch:
    """A site in one prompt: as it was asked for, and the token positions it is there."""

    site: Site
    positions: tuple[int, ...]

    def at(self, position: int) -> Site:
        """The site of one of its tokens."""
        return Site(self.site.layer, _token_mark(position), self.site.stream, units=self.site.units)


def cases(model: HookedModel, pairs: Sequence[Pair], direction: str) -> list[Case]:
    """The pairs under the model's treatment. Errors: PatchError for an unknown direction or prompts of unequal length."""
    if direction not in DIRECTIONS:
        raise PatchError(f"unknown direction {direction!r}. Known: {', '.join(DIRECTIONS)}.")
    return [_case(model, pair, direction) for pair in pairs]


def _case(model: HookedModel, pair: Pair, direction: str) -> Case:
    source, target = (pair.clean, pair.corrupt) if direction == "denoise" else (pair.corrupt, pair.clean)
    names = {"same_sense": "corrupt_sense" if direction == "denoise" else "clean_sense", "control_phrase": "control_phrase"}
    prompts = {"": source} | {control: pair.references[name] for control, name in names.items() if name in pair.references}
    rows = model.rows([target, *prompts.values()])
    encoded = model.encode([row.prompt for row in rows])
    for item in encoded[1:]:
        if len(item.ids) != len(encoded[0].ids):
            raise PatchError(f"{item.prompt.text!r} is {len(item.ids)} tokens and {target.text!r} is {len(encoded[0].ids)}: patching needs "
                             "prompts of equal length (see contrast_pairs).")
    marked = [replace(row, prompt=_with_token_marks(item)) for row, item in zip(rows, encoded, strict=True)]
    return Case(pair, direction, marked[0], dict(zip(prompts, marked[1:], strict=True)), replace(encoded[0], prompt=marked[0].prompt))


def _token_mark(position: int) -> str:
    return f"@{position}"


def _with_token_marks(encoded: Encoded) -> Prompt:
    """The prompt with a mark on each token that stands for text of its own."""
    spans = {_token_mark(i): (Span(start, end),) for i, (start, end) in enumerate(encoded.offsets)
             if end > start and encoded.tokens_of(Span(start, end))[-1] == i}
    return replace(encoded.prompt, marks={**encoded.prompt.marks, **spans})


def patches(case: Case, sites: Sequence[Site]) -> list[Patch]:
    """The sites in a case's prompts. Errors: PromptError for a mark that the prompt does not have."""
    found = []
    for site in sites:
        if site.mark == EVERY_TOKEN:
            found += [Patch(site, (position,)) for position in case.tokens]
        elif site.mark == LAST_TOKEN:
            found.append(Patch(site, (len(case.encoded.ids) - 1,)))
        else:
            found.append(Patch(site, tuple(sorted(set(case.encoded.at(site))))))
    return found


def label(model: HookedModel, number: int, case: Case, patch: Patch) -> dict[str, object]:
    """What a row is about: the pair's labels, the direction and the place."""
    words = [_shown(case.encoded.prompt.text[slice(*case.encoded.offsets[position])]) for position in patch.positions]
    site, head = patch.site, patch.site.units[0] if patch.site.stream == "z" and len(patch.site.units) == 1 else -1
    return {"model": model.spec.name, "treatment": model.treatment.name, "pair": str(number), **case.pair.labels,
            "direction": case.direction, "layer": site.layer, "stream": site.stream, "mark": site.mark,
            "occurrence": "all" if site.occurrence is None else str(site.occurrence), "position": patch.positions[-1],
            "token": " ".join(words), "n_tokens": len(patch.positions), "units": ",".join(map(str, site.units)), "head": head}


def _shown(token: str) -> str:
    """A token's text without the space before it; white space alone as it is written in code."""
    return token.strip() or repr(token)[1:-1]


# ---- the grid ----------------------------------------------------------------------------------------------------------


@takes(PatchError)
def patch_grid(model: HookedModel, pairs: Pairs, sites: Sites, *, direction: str = "denoise",
               controls: Names = CONTROLS, min_difference: Weight = MIN_DIFFERENCE, seed: Seed = 0,
               progress: Callable[[int], None] | None = None) -> pd.DataFrame:
    """Patch every site of every pair, exactly, under the model's treatment; one row per pair, site and control.

    A site is patched as a whole: all its tokens, heads or neurons together. `direction`: `denoise` (clean activations into the corrupt
    run) or `noise` (the reverse). Controls, where the pair has what they need: `random` (a seeded random vector of the source
    activation's norm), `wrong_token` (the source run's activation at another token), `same_sense` (that of a prompt which says in another
    phrase what the patched prompt says), `control_phrase` (that of one whose phrase is about nothing in particular; a placebo where a
    prompt without a cue reads as the patched one does).

    Columns: model, treatment, the pair's labels, pair, direction, control ("" is the patch itself), layer, stream, mark, occurrence ("all"
    or a number), position (the last patched token's), token, n_tokens, units, head (-1: not one head); log_odds (nats, of the pair's two
    answers after the patch), clean and corrupt (those of the two runs without a patch), moved (nats, from the patched run's own), effect
    (the share of the difference between the runs that was moved: 1 is the source's answer; NaN where the runs differ by less than
    `min_difference` nats), p_stereotyped (probability of the stereotyped answer among the two), flipped (1 if the more probable answer
    became that of the source run, else 0; NaN where both runs prefer the same one). `progress` is told how many rows were finished.

    Errors: PatchError for an unknown direction or control, no sites, or a token that cannot be patched alone; EditError for a site that the
    model does not have.
    """
    pairs, sites = many(pairs), many(sites)
    unknown = [control for control in controls if control not in CONTROLS]
    if unknown or not sites:
        raise PatchError(f"unknown control {unknown[0]!r}. Known: {', '.join(CONTROLS)}." if unknown else "no sites to patch were given.")
    every = cases(model, pairs, direction)
    found = [patches(case, sites) for case in every]
    size = _pairs_at_once(model, found, 1 + len(controls))
    records: list[dict[str, object]] = []
    told = 0
    with counted(f"patching ({direction})", len(every), "pairs") as advance:
        for start in range(0, len(every), size):
            some = range(start, min(start + size, len(every)))
            made = _measured(model, [every[i] for i in some], [found[i] for i in some], controls, seed)
            for i, case, (clean, corrupt), scores in zip(some, *made, strict=True):
                records += [{**label(model, i, case, patch), "control": control,
                             **outcome(odds, clean, corrupt, direction, min_difference)} for patch, control, odds in scores]
            advance(len(some))
            if progress is not None:
                progress(len(records) - told)
                told = len(records)
    return pd.DataFrame.from_records(records)


def _pairs_at_once(model: HookedModel, found: Sequence[Sequence[Patch]], kinds: int) -> int:
    """How many pairs are patched together, by the rows and the vectors that the largest of them needs."""
    rows = max((len(each) * kinds for each in found), default=1)
    values = max((sum(len(patch.positions) for patch in each) * kinds for each in found), default=1) * model.d_model
    return max(1, min(ROWS_AT_ONCE // rows, VALUES_AT_ONCE // values))


def outcome(log_odds: float, clean: float, corrupt: float, direction: str, min_difference: float = MIN_DIFFERENCE) -> dict[str, float]:
    """What a patch did, against the two runs without it: see `patch_grid`."""
    source, target = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    moved, difference = log_odds - target, source - target
    flippable = (source > 0) != (target > 0)
    return {"log_odds": log_odds, "clean": clean, "corrupt": corrupt, "moved": moved,
            "effect": moved / difference if abs(difference) >= min_difference else float("nan"),
            "p_stereotyped": float(1 / (1 + np.exp(-log_odds))),
            "flipped": float((log_odds > 0) == (source > 0)) if flippable else float("nan")}


_Scores = list[tuple[Patch, str, float]]


def _measured(model: HookedModel, every: Sequence[Case], found: Sequence[Sequence[Patch]], controls: Sequence[str], seed: int
              ) -> tuple[Sequence[Case], list[tuple[float, float]], list[_Scores]]:
    """(clean, corrupt) log-odds of each case, and those of each of its patches and controls."""
    wrong = [_wrong_tokens(case, each, seed) if "wrong_token" in controls else {} for case, each in zip(every, found, strict=True)]
    vectors = _source_vectors(model, every, found, wrong, controls)
    plans = [[(patch, control, edits) for patch in each for control, edits in _edits(case, patch, vectors[i], wrong[i], controls, seed)]
             for i, (case, each) in enumerate(zip(every, found, strict=True))]
    rows, answers = [], []
    for case, plan in zip(every, plans, strict=True):
        patched = [replace(case.target, edits=case.target.edits + edits) for _, _, edits in plan]
        rows += [case.target, case.sources[""], *patched]
        answers += [case.pair.answers] * (len(patched) + 2)
    odds = iter(log_odds(model, rows, answers).tolist())
    ends, scores = [], []
    for case, plan in zip(every, plans, strict=True):
        target, source = next(odds), next(odds)
        ends.append((source, target) if case.direction == "denoise" else (target, source))
        scores.append([(patch, control, next(odds)) for patch, control, _ in plan])
    return every, ends, scores


def log_odds(model: HookedModel, rows: Sequence[Row], answers: Sequence[tuple[str, str]]) -> Float[Tensor, " row"]:
    """log P(first answer) - log P(second answer) after each row, in nats."""
    found = model.continuation_log_probs(rows, answers)
    return found[:, 0] - found[:, 1]


def _wrong_tokens(case: Case, found: Sequence[Patch], seed: int) -> dict[tuple[Patch, int], int]:
    """For every token of every patch another token of the prompt that the patch leaves alone; the same for all layers and streams."""
    chosen = {}
    for patch in found:
        others = [position for position in case.tokens if position not in patch.positions]
        for position in patch.positions if others else ():
            chosen[patch, position] = random.Random(f"{seed}|{case.encoded.prompt.text}|{patch.positions}|{position}").choice(others)
    return chosen


def _source_vectors(model: HookedModel, every: Sequence[Case], found: Sequence[Sequence[Patch]],
                    wrong: Sequence[Mapping[tuple[Patch, int], int]], controls: Sequence[str]) -> list[dict[str, dict[Site, Tensor]]]:
    """Activations of every run that something is patched from, by case, run ("" is the source) and token site."""
    asked: list[tuple[int, str, Row, tuple[Site, ...]]] = []
    for i, (case, each) in enumerate(zip(every, found, strict=True)):
        own = dict.fromkeys(patch.at(position) for patch in each for position in patch.positions)
        for name, row in case.sources.items():
            if name == "":
                asked.append((i, name, row, (*dict.fromkeys((*own, *(patch.at(other) for (patch, _), other in wrong[i].items()))),)))
            elif name in controls:
                asked.append((i, name, row, tuple(own)))
    out: list[dict[str, dict[Site, Tensor]]] = [{} for _ in every]
    for (i, name, _, _), vectors in zip(asked, record_each(model, [(row, sites) for _, _, row, sites in asked]), strict=True):
        out[i][name] = vectors
    return out


def record_each(model: HookedModel, asked: Sequence[tuple[Row, tuple[Site, ...]]]) -> list[dict[Site, Tensor]]:
    """Activations of rows at sites of their own. Rows that ask for the same sites run together."""
    groups: dict[tuple[Site, ...], list[int]] = {}
    for i, (_, sites) in enumerate(asked):
        groups.setdefault(sites, []).append(i)
    out: list[dict[Site, Tensor]] = [{} for _ in asked]
    for sites, index in groups.items():
        _check_tokens([asked[i][0] for i in index], sites)
        sizes: dict[int, list[Site]] = {}
        size_of = cache(lambda layer, stream, units: model.site_size(Site(layer, LAST, stream, units=units)))
        for site in sites:
            sizes.setdefault(size_of(site.layer, site.stream, site.units), []).append(site)
        for part in sizes.values():
            for i, vectors in zip(index, model.record([asked[i][0] for i in index], part), strict=True):
                out[i] |= zip(part, vectors, strict=True)
    return out


def _check_tokens(rows: Sequence[Row], sites: Sequence[Site]) -> None:
    """Errors: PatchError for a token that stands for no text, or for a part of a character."""
    for row in rows:
        lacking = next((site.mark for site in sites if site.mark not in row.prompt.marks), None)
        if lacking is not None:
            raise PatchError(f"token {lacking[1:]} of {row.prompt.text!r} stands for no text of its own: choose another mark or prompt.")


def _edits(case: Case, patch: Patch, vectors: Mapping[str, Mapping[Site, Tensor]], wrong: Mapping[tuple[Patch, int], int],
           controls: Sequence[str], seed: int) -> list[tuple[str, tuple[Edit, ...]]]:
    """The patch itself and its controls, each as edits of the target."""
    sites = [patch.at(position) for position in patch.positions]
    given: dict[str, list[Tensor]] = {"": [vectors[""][site] for site in sites]}
    for control in controls:
        if control == "random":
            given[control] = [random_like(vectors[""][site], f"{seed}|{case.encoded.prompt.text}|{site}") for site in sites]
        elif control == "wrong_token" and (patch, patch.positions[0]) in wrong:
            given[control] = [vectors[""][patch.at(wrong[patch, position])] for position in patch.positions]
        elif control in vectors:
            given[control] = [vectors[control][site] for site in sites]
    return [(control, tuple(Edit(site, vector) for site, vector in zip(sites, values, strict=True))) for control, values in given.items()]


# ---- summaries ---------------------------------------------------------------------------------------------------------


@takes(PatchError)
def summarise_patching(rows: pd.DataFrame, by: Names = ("direction", "control", "stream", "mark", "layer"), *,
                       cluster: Names = ("word_pair", "template")) -> pd.DataFrame:
    """One row per group: the effect and how sure it is.

    Columns: `by`, n, undefined (share of rows without an effect of their own: their two runs hardly differ), mean, low, high (the effect
    of the group and its 95 % interval, see below), moved, log_odds, p_stereotyped (means over all n), flipped (share of the rows that
    could flip), flippable (how many could).

    The effect of a group is the share of the difference between its two runs that patching moves, by least squares over all its rows:
    sum(moved * difference) / sum(difference^2), with difference = corrupt - clean for `noise`, clean - corrupt for `denoise`. A mean of
    the rows' own ratios would be governed by those whose two runs hardly differ. The interval is that of a ratio (linearised; Cochran
    1977, section 6.4) over the `cluster` columns (`intervals.mean_interval`): NaN where none of them has two values, or nothing differs.

    Errors: PatchError for a missing column.
    """
    lacking = [name for name in (*by, *cluster, "effect", "moved", "clean", "corrupt", "direction") if name not in rows]
    if lacking:
        raise PatchError(f"the rows have no column {lacking[0]!r}; they have: {', '.join(map(str, rows.columns))}.")
    grouped = rows.groupby(list(by), sort=False, dropna=False)
    return pd.DataFrame.from_records([{**dict(zip(by, key, strict=True)), **_summary(group, cluster)} for key, group in grouped])


def _summary(group: pd.DataFrame, cluster: Sequence[str]) -> dict[str, Any]:
    mean, low, high = _moved_share(group, cluster)
    flippable = group["flipped"].dropna()
    return {"n": len(group), "undefined": float(group["effect"].isna().mean()), "mean": mean, "low": low, "high": high,
            **{name: group[name].mean() for name in ("moved", "log_odds", "p_stereotyped")},
            "flipped": flippable.mean(), "flippable": len(flippable)}


def _moved_share(group: pd.DataFrame, cluster: Sequence[str]) -> tuple[float, float, float]:
    """(share, low, high): see `summarise_patching`."""
    sign = group["direction"].map({"noise": -1.0, "denoise": 1.0}).to_numpy(float)
    apart, moved = sign * (group["clean"] - group["corrupt"]).to_numpy(float), group["moved"].to_numpy(float)
    squares = float(apart @ apart)
    if not squares > 0:
        return math.nan, math.nan, math.nan
    share = float(moved @ apart) / squares
    values = share + (moved - share * apart) * apart / (squares / len(group))    # how much a row moves the share; their mean is the share
    low, high = mean_interval(values, [group[name].to_numpy() for name in cluster])
    return share, low, high
