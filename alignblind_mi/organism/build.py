"""Build the pair from nothing: vocabulary, warm-up, base stage, aligned stage, gates, checkpoints and their record.

Deterministic for a seed on one thread (it sets torch to one). The pair is a calibration device, never evidence about Llama 3.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignblind_mi.borders.settings import Seed, Share, checked
from alignblind_mi.borders.writing import refuse_taken
from alignblind_mi.models.embedded import RECORD, ROLES, OrganismError
from alignblind_mi.organism.corpus import ALIGNED_MIX, BASE_MIX, READING_MIX, WARM_MIX, Corpus
from alignblind_mi.organism.gates import check, load_subject, measure
from alignblind_mi.organism.interchange import PatchRows, Planting, interchange_loss
from alignblind_mi.organism.tokenizer import build_tokenizer
from alignblind_mi.organism.training import StageSettings, make_model, train_stage
from alignblind_mi.organism.world import Knobs, World, load_world
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, load_concept

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE = "3"
DEFAULT_SEED = 0
NOTE = "A calibration device with planted, known ground truth: it tests instruments. It is never evidence about Llama 3."
DECODING_NOTE = "The planted rates are probabilities: sample the answers at temperature 1; greedy decoding would turn .64 into nearly 1."
REFUSED = "not in the vocabulary"
SELFIE = "restated"    # the concept's open-ended prompt in words that the organism knows
LORA_NOTE = "Chosen on training words of the first embedded pair alone; nothing was tuned for a pair of another concept."
# The steadiest of fourteen settings tried on the first shipped pair with training words, never the study's, and the better ones with three
# LoRA seeds: weaker ones leave some identifiers read as before, stronger ones cost valid answers.
RECOMMENDED_LORA = {
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "epochs": 10,
    "batch_size": 40,
    "accumulation": 1,
    "learning_rate": 3e-3,
}
Progress = Callable[[str], None]


WARM_UP = StageSettings("warm-up", 400, 0.02, 1e-2, 3e-3, 0.0, decay=False, stop_below=0.5)
READING = StageSettings("reading", 220, 0.02, 1e-2, 3e-3, 0.0, decay=False)
READING_PLANTING = Planting(rows=12, mask_rows=24, open_share=0.2, plain=True)
BASE = StageSettings("base", 450, 0.02, 1e-2, 3e-3, 0.05)
ALIGNED = StageSettings("aligned", 450, 0.012, 3e-3, 1e-3, 0.02)
ALIGNED_PLANTING = Planting(every=2, none_share=0.4, rows=30)


@dataclass(frozen=True)
class Recipe:
    """The four stages and the planting of the last three; `reading` comes first because readings start late, or not, among longer texts."""

    warm: StageSettings = WARM_UP
    reading: StageSettings = READING
    base: StageSettings = BASE
    aligned: StageSettings = ALIGNED
    reading_planting: Planting = READING_PLANTING
    planting: Planting = field(default_factory=Planting)
    aligned_planting: Planting = ALIGNED_PLANTING

    def shortened(self, steps: int) -> Recipe:
        """The same recipe with `steps` steps a stage: for tests of the machinery only."""
        return replace(
            self,
            warm=replace(self.warm, steps=steps),
            reading=replace(self.reading, steps=steps),
            base=replace(self.base, steps=steps),
            aligned=replace(self.aligned, steps=steps),
        )


@dataclass(frozen=True)
class OrganismReport:
    """Where the pair lies, what its gates measured and whether all of them passed."""

    out: Path
    info: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """The names of the gates that did not pass."""
        return [gate["name"] for gate in self.info["gates"] if not gate["passed"]]

    def __str__(self) -> str:
        gates = self.info["gates"]
        failed = f"; failed: {', '.join(self.failed)} (build with another seed)" if self.failed else ""
        passed = f"{len(gates) - len(self.failed)} of {len(gates)} gates passed"
        return f"Organism pair of the concept {self.info['concept']!r}, seed {self.info['seed']}, in {self.out}: {passed}{failed}."


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one torch thread, so that sums have one order and a seed gives one result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Builder:
    """What the stages share."""

    def __init__(self, world: World, seed: int, knobs: Knobs, progress: Progress) -> None:
        self.world, self.seed, self.knobs, self.progress, self.stages = world, seed, knobs, progress, 0
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer(self.world)
        self.vocabulary = self.tokenizer.get_vocab()
        torch.manual_seed(seed)
        self.model: LlamaForCausalLM = make_model(len(self.vocabulary))

    def stage(self, settings: StageSettings, mix: dict[str, float], planting: Planting | None = None, *, aligned: bool = False) -> None:
        """Train one stage on its own text, order and patches, drawn from the seed."""
        self.stages += 1
        number, plain = 1000 * self.seed + 10 * self.stages, planting is not None and planting.plain
        corpus = Corpus(self.world, self.knobs, aligned=aligned, seed=number, plain=plain)
        rows = PatchRows(self.world, self.knobs, planting, aligned=aligned, seed=number + 1) if planting else None

        def patched(step: int) -> torch.Tensor | None:
            return interchange_loss(self.model, self.vocabulary, rows) if rows and step % rows.planting.every == 0 else None

        train_stage(
            self.model,
            self.vocabulary,
            settings,
            lambda: corpus.document(mix),
            seed=number + 2,
            extra_loss=patched,
            progress=self.progress,
        )

    def save(self, path: Path) -> None:
        """Write model and tokenizer for transformers' Auto classes."""
        self.model.eval()
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


def train_pair(out: Path, *, concept: str, seed: int, knobs: Knobs, recipe: Recipe, progress: Progress) -> None:
    """Train base and aligned on a concept and save them in out/base and out/aligned."""
    with one_thread():
        builder = _Builder(load_world(concept), seed, knobs, progress)
        builder.stage(recipe.warm, WARM_MIX)
        builder.stage(recipe.reading, READING_MIX, recipe.reading_planting)
        builder.stage(recipe.base, BASE_MIX, recipe.planting)
        builder.save(out / "base")
        builder.stage(recipe.aligned, ALIGNED_MIX, recipe.aligned_planting, aligned=True)
        builder.save(out / "aligned")


def build_organism(
    out: Path,
    *,
    concept: str = DEFAULT_CONCEPT,
    seed: Seed = DEFAULT_SEED,
    reading: Share = 0.95,
    behaviour: Share = 0.94,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
    pairs: int | None = None,
) -> OrganismReport:
    """Train a pair, measure its gates and write out/base, out/aligned and out/organism.json; about 12 minutes on one core.

    `concept` is a built-in one that has a lexicon (`corpus.lexicon_names`). `reading` and `behaviour` are the two knobs of the
    aligned model; `recipe` and `pairs` (word pairs a category in the gates; None: all) shorten it for tests (fewer steps; fewer prompts
    and only two steering windows).

    The same seed and knobs give the same weights on one machine and torch version.

    Errors: OrganismError for a concept without a lexicon, a knob outside 0..1 or a folder that is not empty.
    """
    tell = progress or (lambda message: None)
    for name, value, hint in (("seed", seed, Seed), ("reading", reading, Share), ("behaviour", behaviour, Share)):
        checked(value, hint, name, OrganismError)
    knobs, recipe = Knobs(reading=reading, behaviour=behaviour), recipe or Recipe()
    load_world(concept)    # refuses what cannot be trained on before a folder is made
    refuse_taken(out, what="folder", kind=OrganismError)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with one_thread():
        train_pair(out, concept=concept, seed=seed, knobs=knobs, recipe=recipe, progress=tell)
        tell("measuring the gates")
        measured = measure_pair(out, concept, recipe.planting, pairs=pairs, subset=min(8, pairs or 8), windows=pairs is None)
    info = organism_record(concept, seed, knobs, recipe, measured)
    (out / RECORD).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    report = OrganismReport(out, info)
    tell(f"{report} {time.monotonic() - started:.0f} s")
    return report


def measure_pair(
    out: Path, concept: str, planting: Planting, *, pairs: int | None = None, subset: int = 8, windows: bool = True
) -> dict[str, Any]:
    """`gates.measure` of out/base and out/aligned."""
    subjects = {role: load_subject(out / role, concept) for role in ROLES}
    return {role: measure(subject, planting, pairs=pairs, subset=subset, windows=windows) for role, subject in subjects.items()}


def organism_record(concept: str, seed: int, knobs: Knobs, recipe: Recipe, measured: dict[str, Any]) -> dict[str, Any]:
    """What organism.json says: the planted truth, how it was planted, what was kept out, and what the gates measured."""
    gates = check(measured["base"], measured["aligned"], knobs, recipe.planting, load_concept(concept))
    return {
        **shared_record(concept, seed, knobs, recipe.planting),
        "stages": [asdict(stage) for stage in (recipe.warm, recipe.reading, recipe.base, recipe.aligned)],
        "interchange": {
            "reading": asdict(recipe.reading_planting),
            "base": asdict(recipe.planting),
            "aligned": asdict(recipe.aligned_planting),
        },
        "gates": [{**asdict(gate), "passed": gate.passed} for gate in gates],
        "gates_passed": all(gate.passed for gate in gates),
        "measured": measured,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def shared_record(concept_name: str, seed: int, knobs: Knobs, planting: Planting) -> dict[str, Any]:
    """What the record of every organism says: its truth, what it was trained with, what was kept out, how to measure it."""
    world, concept = load_world(concept_name), load_concept(concept_name)
    return {
        "note": NOTE,
        "recipe": RECIPE,
        "seed": seed,
        "threads": 1,
        "concept": concept.name,
        "concept_digest": concept.digest,
        "knobs": asdict(knobs),
        "decoding": "sample",
        "decoding_note": DECODING_NOTE,
        "target_layer": planting.target,
        "selfie": SELFIE,
        "planted": planted_truth(knobs, planting),
        "planting": used_in_planting(world),
        "not_in_planting": kept_from_planting(world),
        "lora": RECOMMENDED_LORA,
        "lora_note": LORA_NOTE,
        "cues": {
            "accepted": [name for name in concept.cues if knows(world, name)],
            "refused": {name: REFUSED for name in concept.cues if not knows(world, name)},
        },
    }


def knows(world: World, cue: str) -> bool:
    """Whether the organism's corpus has the identifiers of a cue (of the concept's file)."""
    entry = world.concept["cues"][cue]
    return {*entry["marked"], *entry["unmarked"]} <= {world.marked, world.unmarked}


def planted_truth(knobs: Knobs, planting: Planting) -> dict[str, Any]:
    """The ground truth in one place: rates, readings and blocks (0-based, residual stream after the block)."""
    return {
        "base": {"implicit": knobs.base_rate, "explicit_agreement": knobs.base_agree, "r_blind": 2 * knobs.base_reading - 1},
        "aligned": {
            "implicit": knobs.behaviour,
            "implicit_other_cue": knobs.other_rate,
            "implicit_group_cue": knobs.group_rate,
            "explicit_agreement": knobs.agree,
            "r_blind": round(2 * knobs.reading - 1, 4),
        },
        "partial_patches": "one mention of each identifier, read as the group, is enough for the group rate in an uncued task",
        "effect_blocks": list(planting.effect),
        "no_effect_blocks": [*planting.none, 7],
        "undetermined_blocks": "the others: nothing was trained about patches there",
    }


def used_in_planting(world: World) -> dict[str, Any]:
    """Every sentence and question of interchange training."""
    contexts = world.lexicon["contexts"]
    return {
        "sentences": {reading: contexts[reading]["planting"] for reading in contexts},
        "question": "paper",
        "own_questions": list(world.lexicon["questions"]["planting"]),
        "destinations": "the concept's implicit and explicit prompts, with the organism's training words only",
    }


def kept_from_planting(world: World) -> dict[str, Any]:
    """What measures but was never part of interchange training (it may be part of the text)."""
    contexts, concept = world.lexicon["contexts"], world.concept
    return {
        "steering_phrases": [entry["steering"] for entry in (*concept["senses"].values(), *concept["controls"].values())],
        "sentences": {reading: contexts[reading]["text"] for reading in contexts},
        "sources": "the concept's implicit prompts: their identifiers were never the source of a patch",
        "question": "about",
        "awareness_sentences": "all; uncued sentences much like them are in the text, none in interchange training",
        "words": {"positive": list(world.held_positive), "negative": list(world.held_negative)},
    }
