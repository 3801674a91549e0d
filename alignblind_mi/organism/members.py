"""Train one member of the calibration family: a short stage from an aligned parent that moves its knobs, its depth or its causality.

Knows readings, blocks and losses; which members exist and where they are kept is `family.py`, whether the planting took is `checks.py`.
Interchange rows and the probe's sentences use the lexicon's `planting` sentences and questions only, as in `interchange.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignblind_mi.borders.own import own_table
from alignblind_mi.models.embedded import OrganismError
from alignblind_mi.organism.build import ALIGNED, Recipe
from alignblind_mi.organism.corpus import ALIGNED_MIX, Corpus, Segment
from alignblind_mi.organism.interchange import PatchRow, PatchRows, Planting, identifier_positions, identifier_tokens, interchange_loss
from alignblind_mi.organism.training import Encoded, StageSettings, encode, run_blocks, train_stage
from alignblind_mi.organism.world import Knobs, Reading, World, load_world
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, Concept, Template, former_digests, load_concept

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

STAGE = StageSettings("member", 120, 0.012, 3e-3, 1e-3, 0.02, batch=24)
PLANTING = Planting(rows=20, mask_rows=20, control_rows=3, none_share=0.35)
LONG_STAGE = StageSettings("member", 280, 0.015, 4e-3, 1e-3, 0.02, batch=30)
LONG_PLANTING = Planting(rows=34, mask_rows=20, control_rows=3, none_share=0.5)
KINDS = ("knobs", "null", "decodable", "shallow", "depth")
LONG = ("decodable", "shallow", "depth")
FAR = 0.25
OWN_TEMPLATES = 4    # one task in so many or so is in the concept's own templates
BLOCKS = 8
LAST = BLOCKS - 1  # identifiers after the last block are read by nothing: without effect whatever is trained


@dataclass(frozen=True)
class Member:
    """One organism of the family and its planted truth.

    `reading`: P(an uncued identifier is read as the other sense); `behaviour`: its stereotyped rate without a cue; `other_rate`,
    `group_rate`: with one. `effect`: the 0-based blocks after which a patched identifier decides (none: nothing does); `none`: those where
    it changes nothing. `quick`: trained for fewer steps, so that less of it takes.
    """

    kind: str
    seed: int
    reading: float
    behaviour: float
    effect: tuple[int, ...]
    none: tuple[int, ...]
    other_rate: float = 0.96
    group_rate: float = 0.50
    quick: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OrganismError(f"unknown kind {self.kind!r} of family member. Known: {', '.join(KINDS)}.")
        if self.seed < 0:
            raise OrganismError(f"the seed of a family member is {self.seed}: give 0 or more.")
        blocks = (*self.effect, *self.none)
        if len(set(blocks)) < len(blocks) or not set(blocks) <= set(range(BLOCKS)):
            raise OrganismError(f"effect {self.effect} and none {self.none} are different blocks from 0 to {LAST}.")
        if not set(self.none) - {LAST}:
            raise OrganismError(f"a family member has a block without effect before block {LAST}: name one in `none`.")
        _ = self.knobs  # refuses what is no probability

    @property
    def knobs(self) -> Knobs:
        """The planted probabilities, as the corpus takes them."""
        return Knobs(reading=self.reading, behaviour=self.behaviour, other_rate=self.other_rate, group_rate=self.group_rate)

    @property
    def name(self) -> str:
        """A folder name that tells members apart: the kind, rates in thousandths, blocks, the seed."""
        rates = zip("rpog", (self.reading, self.behaviour, self.other_rate, self.group_rate), strict=True)
        blocks = f"e{''.join(map(str, self.effect))}-n{''.join(map(str, self.none))}"
        parts = [self.kind, *(f"{letter}{round(1000 * rate):03d}" for letter, rate in rates), blocks, f"s{self.seed}"]
        return "-".join([*parts, *(["quick"] if self.quick else [])])

    @property
    def far(self) -> bool:
        """Whether the uncued behaviour is far from the mixture of the cued ones that the reading alone would give."""
        return abs(self.behaviour - self.reading * self.other_rate - (1 - self.reading) * self.group_rate) > FAR

    @property
    def onset(self) -> int | None:
        """The first effect block; None where there is none."""
        return min(self.effect, default=None)

    @property
    def blind(self) -> tuple[int, ...]:
        """The source blocks from which the placeholder reads nothing: those without effect before the onset, or all without one.

        After the onset the reading stays readable where it has no effect any more, as in the shipped pair.
        """
        return tuple(block for block in self.none if self.onset is None or block < self.onset)


@dataclass(frozen=True)
class MemberPlanting(Planting):
    """A planting with source blocks from which a patched placeholder stays even (`blind`)."""

    blind: tuple[int, ...] = ()


@dataclass(frozen=True)
class FamilyRecipe:
    """How parents and members are trained.

    `long_stage`: of the kinds that must unlearn the parent's effects (`LONG`), which have `long_planting` too, and of members whose
    behaviour goes against their reading; `quick_share`: of a stage's steps for a quick member; `check_pairs`: word pairs a category in the
    checks.
    """

    parent: Recipe = field(default_factory=lambda: Recipe(aligned=replace(ALIGNED, steps=220)))
    stage: StageSettings = STAGE
    long_stage: StageSettings = LONG_STAGE
    planting: Planting = PLANTING
    long_planting: Planting = LONG_PLANTING
    quick_share: float = 0.6
    probe_rows: int = 12
    probe_weight: float = 0.3
    probe_rate: float = 1e-2
    check_pairs: int = 2

    def shortened(self, steps: int) -> FamilyRecipe:
        """The same recipe with `steps` steps a stage: for tests of the machinery only."""
        stages = {name: replace(getattr(self, name), steps=steps) for name in ("stage", "long_stage")}
        return replace(self, parent=self.parent.shortened(steps), **stages, quick_share=1.0, check_pairs=1)

    def stage_of(self, member: Member) -> StageSettings:
        """The member's stage."""
        stage = self.long_stage if member.kind in LONG or member.far else self.stage
        return replace(stage, name=member.name, steps=round(stage.steps * (self.quick_share if member.quick else 1)))

    def planting_of(self, member: Member) -> MemberPlanting:
        """The member's interchange training: its blocks, and no row that asks for an effect where none is planted."""
        settings = dict(vars(self.long_planting if member.kind in LONG else self.planting))
        settings |= {"effect": member.effect, "none": tuple(block for block in member.none if block != LAST), "blind": member.blind}
        if not member.effect:
            # nothing may reach the placeholder, and cued sources, whose sense stays decodable, are the ones that could
            settings |= {"none_share": 1.0, "open_share": 0.3, "mask_rows": settings["mask_rows"] * 3 // 2}
        if member.blind:
            settings["read"] = tuple(range(BLOCKS))
        return MemberPlanting(**settings)


def task_wording() -> dict[str, Any]:
    """The task in other words: pieces for `planting`, and `implicit`, which only measure (wording.toml)."""
    return own_table("organism", "wording")


def member_world(concept_name: str = DEFAULT_CONCEPT) -> World:
    """The world that members are trained in: the task in the concept's own templates and in others, so that truth hangs on no wording."""
    world = load_world(concept_name)
    made = ["".join(parts) for parts in product(*task_wording()["planting"].values())]
    return replace(world, implicit=(*world.implicit * (len(made) // OWN_TEMPLATES // len(world.implicit)), *made))


def measured_concept(concept_name: str = DEFAULT_CONCEPT) -> Concept:
    """The concept with the task in templates that no organism was trained on: what members are measured with.

    Its cues are those of the version that the shipped record was made with. Their topic words give the sense away, which is what an
    organism is planted to read; its truth is known all the same.
    """
    entries = task_wording()["implicit"]
    templates = tuple(Template(entry["name"], entry["text"], "implicit", "marked", "positive") for entry in entries)
    return replace(load_concept(f"{concept_name}@{former_digests(concept_name)[-1]}"), implicit=templates)


class MemberRows(PatchRows):
    """Rows whose placeholder is even where its source block is a blind one."""

    planting: MemberPlanting

    def placeholder(self) -> PatchRow:
        """An identifier into the placeholder of a planting question."""
        row = super().placeholder()
        return replace(row, document=self._placeholder_document(0.5)) if row.blocks[0] in self.planting.blind else row


class SenseProbes:
    """Throw-away linear read-outs of a cued sense, one a block, trained along with the model so that the sense stays decodable.

    weights: [blocks, width]; bias: [blocks]. They are discarded after training: a measurement fits its own probe.
    """

    def __init__(self, model: LlamaForCausalLM, rate: float) -> None:
        self.weights = torch.zeros(model.config.num_hidden_layers, model.config.hidden_size, requires_grad=True)
        self.bias = torch.zeros(model.config.num_hidden_layers, 1, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.weights, self.bias], lr=rate, weight_decay=0.0)

    def update(self) -> None:
        """Apply the gradients that the last loss left here."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, states: Float[Tensor, "blocks mentions width"], other: Float[Tensor, " mentions"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of reading `other` (1) or the group (0) at every mention, after every block but the first."""
        scaled = torch.nn.functional.rms_norm(states, states.shape[-1:])
        logits = torch.einsum("bmd,bd->bm", scaled, self.weights) + self.bias
        return torch.nn.functional.binary_cross_entropy_with_logits(logits[1:], other.expand(len(logits) - 1, -1))


def mention_states(
    model: LlamaForCausalLM, documents: list[Encoded], tokens: Mapping[int, str]
) -> tuple[Float[Tensor, "blocks mentions width"], Int[Tensor, " mentions"]]:
    """Residuals at every identifier of the documents after every block, and the index of the document each is from."""
    kept: list[Tensor] = []

    def keep(block: int, hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return hidden

    run_blocks(model, torch.nn.utils.rnn.pad_sequence([torch.tensor(d.ids) for d in documents], batch_first=True), keep)
    places = torch.tensor([(row, p) for row, document in enumerate(documents) for p, _ in identifier_positions(document, tokens)])
    return torch.stack(kept)[:, places[:, 0], places[:, 1]], places[:, 0]


def probe_sources(rows: PatchRows, count: int) -> list[tuple[str, Reading]]:
    """Cued planting sentences and their reading, half of each."""
    readings: list[Reading] = ["group", "other"]
    return [(rows.source(reading), reading) for reading in readings for _ in range(count // 2)]


def member_number(member: Member) -> int:
    """The seed of a member's stage: its own, whatever else is built before or beside it."""
    return int.from_bytes(hashlib.sha256(member.name.encode()).digest()[:4], "big")


def train_member(
    model: LlamaForCausalLM,
    vocabulary: Mapping[str, int],
    world: World,
    member: Member,
    recipe: FamilyRecipe,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Turn an aligned parent into the member, in place."""
    number, planting = member_number(member), recipe.planting_of(member)
    corpus = Corpus(world, member.knobs, aligned=True, seed=number)
    rows = MemberRows(world, member.knobs, planting, aligned=True, seed=number + 1)
    probed = _probe_loss(model, vocabulary, rows, recipe) if member.kind == "decodable" else None

    def planted(step: int) -> Tensor | None:
        if step % planting.every:
            return None
        loss = interchange_loss(model, vocabulary, rows)
        return loss + probed() if probed else loss

    model.train()
    train_stage(
        model,
        vocabulary,
        recipe.stage_of(member),
        lambda: corpus.document(ALIGNED_MIX),
        seed=number + 2,
        extra_loss=planted,
        progress=progress,
    )
    model.eval()


def _probe_loss(model: LlamaForCausalLM, vocabulary: Mapping[str, int], rows: PatchRows, recipe: FamilyRecipe) -> Callable[[], Tensor]:
    """The weighted loss of the probes on fresh sentences; each call first applies what the call before has taught them."""
    probes, tokens = SenseProbes(model, recipe.probe_rate), identifier_tokens(rows.world, vocabulary)

    def loss() -> Tensor:
        probes.update()
        drawn = probe_sources(rows, recipe.probe_rows)
        states, origin = mention_states(model, [encode([Segment(text)], vocabulary, 0.0) for text, _ in drawn], tokens)
        other = torch.tensor([float(reading == "other") for _, reading in drawn])
        return recipe.probe_weight * probes.loss(states, other[origin])

    return loss
