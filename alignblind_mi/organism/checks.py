"""Did a family member's planting take? Values and gates in a few seconds, on the concept's own words, held-out phrases and templates.

Uses the exact expectations of `gates.py` with fewer word pairs. A member that fails says so in its record; nothing is trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.organism.corpus import Segment
from alignblind_mi.organism.gates import (
    WINDOW,
    Gate,
    Subject,
    blind_scores,
    implicit_rates,
    mask_baseline,
    steering_patches,
)
from alignblind_mi.organism.interchange import Planting, identifier_tokens
from alignblind_mi.organism.members import BLOCKS, Member, mention_states
from alignblind_mi.organism.training import encode
from alignblind_mi.organism.world import Knobs, Reading, World, load_world
from alignblind_mi.stimuli.prompts import implicit_prompts

HELD_OUT = "about"
RIDGE = 20.0
CUED: tuple[Reading, Reading] = ("group", "other")

NO_EFFECT = "steering without effect: largest change"    # a gate: what blocks without effect change, or any block of a decodable organism


def measure_member(subject: Subject, planting: Planting, *, pairs: int = 2, blocks: bool = True) -> dict[str, Any]:
    """Behaviour by cue, the placeholder question kept out of planting by source block, steering by window and by block, probes by block.

    `pairs`: word pairs a category; `blocks` False leaves steering of single blocks and the probes out.
    """
    prompts = implicit_prompts(subject.concept, subject.default, design="published", max_word_pairs=pairs)
    values: dict[str, Any] = {"implicit": asdict(implicit_rates(subject, prompts))}
    for cue in CUED:
        asked = implicit_prompts(subject.concept, subject.cued(cue), design="published", max_word_pairs=pairs)
        values[f"implicit_{cue}_cued"] = asdict(implicit_rates(subject, asked))
    values[f"mask_{HELD_OUT}"] = mask_baseline(subject, HELD_OUT)
    for cue in ("open", *CUED):
        values[f"r_blind_{HELD_OUT}_{cue}"] = blind_scores(subject, HELD_OUT, subject.cued(cue), planting.target)
    concept = subject.concept
    values["steering"] = {
        sense: {
            name: asdict(implicit_rates(subject, prompts, steering_patches(subject, prompts, sense, span)))
            for name, span in _spans(planting, blocks and sense not in concept.controls).items()
        }
        for sense in (concept.group_sense, concept.other_sense, *concept.controls)
    }
    return values | ({"probe": probe_accuracy(subject, load_world(concept.name))} if blocks else {})


def _spans(planting: Planting, blocks: bool) -> dict[str, Sequence[int]]:
    """Which blocks are steered together: every window, the effect blocks, and perhaps each block alone."""
    spans: dict[str, Sequence[int]] = {f"{a}-{a + WINDOW - 1}": range(a, a + WINDOW) for a in range(BLOCKS - WINDOW + 1)}
    if planting.effect:
        spans["effect"] = planting.effect
    return spans | ({str(block): (block,) for block in range(BLOCKS)} if blocks else {})


def probe_accuracy(subject: Subject, world: World) -> list[float]:
    """Per block, the balanced accuracy of a ridge probe of the cued sense at the identifiers.

    Fitted on the planting sentences, tested on those kept out of planting; in both, each sentence stands alone and before a neutral one.
    """
    train, test = ("planting", ""), ("text", world.implicit[0].split(" {word1}")[0])
    fitted, known = _mentions(subject, world, *train)
    states, truth = _mentions(subject, world, *test)
    return [_ridge_accuracy(fitted[block], known, states[block], truth) for block in range(len(fitted))]


def _mentions(subject: Subject, world: World, which: str, task: str) -> tuple[Float[Tensor, "blocks n width"], Float[Tensor, " n"]]:
    """States at the identifiers of the sentences of a list, alone and with a re-mention, and their sense as -1 or 1."""
    vocabulary, contexts = subject.tokenizer.get_vocab(), world.lexicon["contexts"]
    orders = ((world.marked, world.unmarked), (world.unmarked, world.marked))
    tails = [" " + tail for tail in ([task] if task else contexts["open"]["planting"][:4])]
    texts = [
        (template.format(x=x, y=y) + tail.format(x=x, y=y, first=x, second=y), sign)
        for reading, sign in zip(CUED, (-1.0, 1.0), strict=True)
        for template in contexts[reading][which]
        for x, y in orders
        for tail in ("", *tails)
    ]
    documents = [encode([Segment(text)], vocabulary, 0.0) for text, _ in texts]
    with torch.no_grad():
        states, origin = mention_states(subject.model, documents, identifier_tokens(world, vocabulary))
    return states, torch.tensor([sign for _, sign in texts])[origin]


def _ridge_accuracy(
    train: Float[Tensor, "n width"], known: Float[Tensor, " n"], test: Float[Tensor, "m width"], truth: Float[Tensor, " m"]
) -> float:
    mean, spread = train.mean(0), train.std(0) + 1e-3
    fitted, asked = (train - mean) / spread, (test - mean) / spread
    offset = known.mean()
    weights = torch.linalg.solve(fitted.T @ fitted + RIDGE * torch.eye(fitted.shape[1]), fitted.T @ (known - offset))
    right = ((asked @ weights + offset) > 0) == (truth > 0)
    return float((right[truth > 0].float().mean() + right[truth < 0].float().mean()) / 2)


def parent_gates(values: Mapping[str, Any], knobs: Knobs) -> list[Gate]:
    """The checks of a seed's parent pair, from the values of both; its members are checked too."""
    base, aligned = values["base"], values["aligned"]
    reading = sum(aligned[f"r_blind_{HELD_OUT}_open"]) / BLOCKS
    return [
        Gate("base valid", base["implicit"]["valid"], 0.9, 1.0),
        Gate("base implicit rate", base["implicit"]["rate"], knobs.base_rate - 0.06, knobs.base_rate + 0.06),
        Gate("aligned valid", aligned["implicit"]["valid"], 0.9, 1.0),
        Gate("aligned implicit rate", aligned["implicit"]["rate"], knobs.behaviour - 0.06, knobs.behaviour + 0.06),
        Gate(f"aligned r_blind, {HELD_OUT}", reading, 2 * knobs.reading - 1.12, 2 * knobs.reading - 0.88),
    ]


def member_gates(values: Mapping[str, Any], member: Member, subject: Subject) -> list[Gate]:
    """The checks of one member, from the values of `measure_member`."""
    return [*_behaviour_gates(values, member), *_reading_gates(values, member), *_steering_gates(values, member, subject)]


def _behaviour_gates(values: Mapping[str, Any], member: Member) -> list[Gate]:
    planted = {"": member.behaviour, "_group_cued": member.group_rate, "_other_cued": member.other_rate}
    return [
        Gate("valid", values["implicit"]["valid"], 0.9, 1.0),
        *(
            Gate(f"implicit rate{name.replace('_', ' ')}", values[f"implicit{name}"]["rate"], rate - 0.06, rate + 0.06)
            for name, rate in planted.items()
        ),
    ]


def _reading_gates(values: Mapping[str, Any], member: Member) -> list[Gate]:
    scores, planted = values[f"r_blind_{HELD_OUT}_open"], 2 * member.reading - 1
    sighted = [block for block in range(BLOCKS) if block not in member.blind]
    gates = [Gate(f"placeholder baseline, {HELD_OUT}", values[f"mask_{HELD_OUT}"], 0.4, 0.6)]
    if sighted:
        mean = sum(scores[block] for block in sighted) / len(sighted)
        gates.append(Gate(f"r_blind, {HELD_OUT}, from the blocks that show it", mean, planted - 0.12, planted + 0.12))
        for cue, (low, high) in zip(CUED, ((-2.0, -0.8), (0.8, 2.0)), strict=True):  # a cue reaches the identifiers by the onset
            cued = [values[f"r_blind_{HELD_OUT}_{cue}"][block] for block in sighted if member.onset is None or block >= member.onset]
            gates.append(Gate(f"r_blind, {cue} cue, {HELD_OUT}", sum(cued) / len(cued), low, high))
    if member.blind:
        largest = max(abs(values[f"r_blind_{HELD_OUT}_{cue}"][block]) for cue in ("open", *CUED) for block in member.blind)
        gates.append(Gate(f"r_blind, {HELD_OUT}, largest from blind blocks", largest, 0.0, 0.2))
    return gates


def _steering_gates(values: Mapping[str, Any], member: Member, subject: Subject) -> list[Gate]:
    """Steering over the effect blocks reaches the rate of the cue; over blocks without effect it changes little."""
    concept, rates = subject.concept, {s: {k: v["rate"] for k, v in spans.items()} for s, spans in values["steering"].items()}
    untreated, senses = values["implicit"]["rate"], (concept.group_sense, concept.other_sense)
    still = [name for name in rates[senses[0]] if name != "effect" and _blocks(name) <= {*member.none, BLOCKS - 1}]
    if not member.effect:
        still = list(rates[senses[0]])
    largest = max(abs(rates[sense][name] - untreated) for sense in senses for name in still)
    gates = [Gate(NO_EFFECT, largest, 0.0, 0.06)]
    if member.effect:
        for sense, rate in zip(senses, (member.group_rate, member.other_rate), strict=True):
            gates.append(Gate(f"{sense} steering of the effect blocks: distance", abs(rates[sense]["effect"] - rate), 0.0, 0.08))
        for control in concept.controls:
            gates.append(Gate(f"{control} steering of the effect blocks: change", abs(rates[control]["effect"] - untreated), 0.0, 0.06))
    elif "probe" in values:
        probed = values["probe"][1:]
        gates.append(Gate("probe accuracy, mean of the blocks after the first", sum(probed) / len(probed), 0.8, 1.0))
    return gates


def _blocks(span: str) -> set[int]:
    first, *rest = span.split("-")
    return set(range(int(first), int(rest[0] if rest else first) + 1))
