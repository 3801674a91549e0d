"""A family of organisms with known truth, to calibrate every instrument on: which members there are, how they are built and kept.

Each member is a short stage (`members.py`) from its seed's aligned parent: that of the first shipped pair for seed 0, else one trained on
the same concept by the frozen recipe with a shorter aligned stage. A cache folder holds them; its name changes with the recipe and the
data. Calibration devices, never evidence about Llama 3.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cache as remembered
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignblind_mi.borders.caches import cache_root
from alignblind_mi.models.configs import quiet
from alignblind_mi.models.embedded import RECORD, ROLES, OrganismError, organism_info, organism_path, read_record
from alignblind_mi.organism.build import DEFAULT_SEED, RECIPE, Progress, one_thread, planted_truth, shared_record, train_pair
from alignblind_mi.organism.checks import measure_member, member_gates, parent_gates
from alignblind_mi.organism.corpus import ALIGNED_MIX, BASE_MIX, READING_MIX, WARM_MIX
from alignblind_mi.organism.gates import Gate, load_subject
from alignblind_mi.organism.members import BLOCKS, LAST, FamilyRecipe, Member, measured_concept, member_world, task_wording, train_member
from alignblind_mi.organism.world import Knobs, load_world

FAMILY = "2"  # raise it when code changes what a member becomes
EARLY, EARLY_NONE = (1, 2, 3), (5, 6, LAST)
DEEP, DEEP_NONE = (3, 4, 5), (0, 1, LAST)  # block 2 is left undetermined
# (reading, behaviour): the ranks of the two are uncorrelated on purpose, so that no instrument of one passes for one of the other.
KNOBS = ((0.05, 0.58), (0.275, 0.94), (0.5, 0.70), (0.725, 0.50), (0.95, 0.82))
QUICK_KNOBS = (KNOBS[0], KNOBS[1], KNOBS[4])
CONTRAST = (0.95, 0.94)


def calibration_family(seeds: Sequence[int] = (0, 1, 2), *, quick: bool = False) -> list[Member]:
    """The members of every seed: five settings of the two knobs, and controls for bias, causality and depth.

    `quick`: of the first seed only, three settings and the controls without `shallow`, all trained for fewer steps.
    """
    if not seeds:
        raise OrganismError("a calibration family has at least one seed.")
    if quick:
        return [replace(member, quick=True) for member in _members(seeds[0], QUICK_KNOBS) if member.kind != "shallow"]
    return [member for seed in dict.fromkeys(seeds) for member in _members(seed, KNOBS)]


def _members(seed: int, knobs: Sequence[tuple[float, float]]) -> list[Member]:
    return [
        *(Member("knobs", seed, reading, behaviour, EARLY, EARLY_NONE) for reading, behaviour in knobs),
        Member("null", seed, 0.5, 0.5, EARLY, EARLY_NONE, other_rate=0.5, group_rate=0.5),
        Member("decodable", seed, 0.5, CONTRAST[1], (), tuple(range(BLOCKS))),
        Member("shallow", seed, *CONTRAST, EARLY, (0, *EARLY_NONE)),
        Member("depth", seed, *CONTRAST, DEEP, DEEP_NONE),
    ]


def family_concept() -> str:
    """The concept that all members are about: the one of the pair that they come from."""
    return str(organism_info()["concept"])


# --- the cache ---------------------------------------------------------------------------------------------------------------------------


def cache_folder(recipe: FamilyRecipe | None = None) -> Path:
    """Where members are kept: $ALIGNBLIND_CACHE or the user's cache folder, then `organisms`, then the recipe's digest."""
    return cache_root() / "organisms" / family_digest(recipe or FamilyRecipe())


@remembered
def family_digest(recipe: FamilyRecipe) -> str:
    """Twelve hex digits of everything that decides what a member becomes: recipe, mixtures, the words of the corpus, shipped parent."""
    mixes, world = (WARM_MIX, READING_MIX, BASE_MIX, ALIGNED_MIX), load_world(family_concept())
    members = [*calibration_family((DEFAULT_SEED,)), *calibration_family((DEFAULT_SEED,), quick=True)]
    plans = [[asdict(recipe.stage_of(member)), asdict(recipe.planting_of(member))] for member in members]
    senses = {name: {key: sense[key] for key in ("word", "steering", "words")} for name, sense in world.concept["senses"].items()}
    words = [senses, *(world.concept[part] for part in ("cues", "categories", "controls", "interpretations", "implicit", "explicit",
                                                        "awareness")), world.lexicon]
    digest = hashlib.sha256(json.dumps([RECIPE, FAMILY, asdict(recipe), plans, mixes, words, task_wording()]).encode())
    digest.update((organism_path("aligned") / "model.safetensors").read_bytes())
    return digest.hexdigest()[:12]


def member_path(
    member: Member, cache: Path | None = None, progress: Progress | None = None, *, recipe: FamilyRecipe | None = None
) -> Path:
    """The folder of a member's checkpoint, built first where the cache does not have it; transformers' Auto classes load it.

    Another process may build the same member meanwhile: the first to finish is kept, and both are the same bits on one machine.

    Errors: OrganismError for a folder in the cache that another recipe made, or that is incomplete.
    """
    recipe, tell = recipe or FamilyRecipe(), progress or (lambda message: None)
    cache = cache or cache_folder(recipe)
    folder = cache / member.name
    if not _has(folder, recipe):
        parent = parent_path(member.seed, cache, progress, recipe=recipe) / "aligned"
        started = time.monotonic()
        _install(folder, lambda draft: _make_member(draft, member, parent, recipe, tell))
        tell(f"{member.name}: {time.monotonic() - started:.0f} s; {failures(folder)}")
    return folder / "aligned"


def parent_path(
    seed: int, cache: Path | None = None, progress: Progress | None = None, *, recipe: FamilyRecipe | None = None
) -> Path:
    """The folder with `base` and `aligned` that a seed's members come from: the shipped pair, or one trained here (some ten minutes)."""
    if seed == DEFAULT_SEED:
        return organism_path("aligned").parent
    recipe, tell = recipe or FamilyRecipe(), progress or (lambda message: None)
    folder = (cache or cache_folder(recipe)) / f"parent-s{seed}"
    if not _has(folder, recipe):
        _install(folder, lambda draft: _make_parent(draft, seed, recipe, tell))
        tell(f"parent of seed {seed}; {failures(folder)}")
    return folder


def build_family(
    members: Sequence[Member],
    cache: Path | None = None,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
    recipe: FamilyRecipe | None = None,
) -> list[Path]:
    """`member_path` of every member, in order; `jobs` processes of one thread each give the same checkpoints as one.

    With more than one job the calling script needs Python's usual `if __name__ == "__main__"`.

    Errors: OrganismError for less than one job.
    """
    if jobs < 1:
        raise OrganismError(f"a family is built by at least one job, not {jobs}.")
    recipe, tell = recipe or FamilyRecipe(), progress or (lambda message: None)
    cache, wanted = cache or cache_folder(recipe), list(dict.fromkeys(members))
    if jobs > 1:
        seeds = dict.fromkeys(member.seed for member in wanted)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            parents = [pool.submit(_build_parent, seed, cache, recipe) for seed in seeds]
            for future in as_completed(parents):
                tell(future.result())
            for future in as_completed([pool.submit(_build_member, member, cache, recipe) for member in wanted]):
                tell(future.result())
    return [member_path(member, cache, progress, recipe=recipe) for member in members]


def _build_parent(seed: int, cache: Path, recipe: FamilyRecipe) -> str:
    folder = parent_path(seed, cache, recipe=recipe)
    return f"parent of seed {seed}; {failures(folder)}"


def _build_member(member: Member, cache: Path, recipe: FamilyRecipe) -> str:
    folder = member_path(member, cache, recipe=recipe).parent
    return f"{member.name}; {failures(folder)}"


def failed_gates(folder: Path) -> list[str]:
    """Names of the gates that a built folder's record says did not pass."""
    return [gate["name"] for gate in read_record(folder)["gates"] if not gate["passed"]]


def failures(folder: Path) -> str:
    """Which gates a built folder's record says did not pass, in words."""
    failed = failed_gates(folder)
    return f"failed: {', '.join(failed)}" if failed else "all gates passed"


def _has(folder: Path, recipe: FamilyRecipe) -> bool:
    """Whether a folder is there, complete and of this recipe."""
    if not folder.exists():
        return False
    if not (folder / RECORD).is_file():
        raise OrganismError(f"{folder} is no finished organism: remove it, and it is built again.")
    if read_record(folder).get("family") != family_digest(recipe):
        raise OrganismError(f"{folder} was built by another recipe: remove it, or give another cache folder.")
    return True


def _install(folder: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill a draft beside the folder, then rename it: the folder is complete or absent, whoever builds it at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch, quiet(), one_thread():
        draft = Path(scratch) / folder.name
        draft.mkdir()
        make(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / RECORD).is_file():  # else another process was first, with the same bits
                raise


# --- building ----------------------------------------------------------------------------------------------------------------------------


def _make_parent(draft: Path, seed: int, recipe: FamilyRecipe, tell: Progress) -> None:
    knobs, concept = Knobs(), family_concept()
    train_pair(draft, concept=concept, seed=seed, knobs=knobs, recipe=recipe.parent, progress=tell)
    subjects = {role: load_subject(draft / role, concept) for role in ROLES}
    values = {
        name: measure_member(subject, recipe.parent.planting, pairs=recipe.check_pairs, blocks=False) for name, subject in subjects.items()
    }
    record = shared_record(concept, seed, knobs, recipe.parent.planting)
    stages = [asdict(stage) for stage in (recipe.parent.warm, recipe.parent.reading, recipe.parent.base, recipe.parent.aligned)]
    _write(draft, {**record, "family": family_digest(recipe), "stages": stages}, parent_gates(values, knobs), values)


def _make_member(draft: Path, member: Member, parent: Path, recipe: FamilyRecipe, tell: Progress) -> None:
    subject, planting = load_subject(parent), recipe.planting_of(member)
    concept = measured_concept(subject.concept.name)
    train_member(subject.model, subject.tokenizer.get_vocab(), member_world(concept.name), member, recipe, tell)
    subject.model.save_pretrained(draft / "aligned")
    subject.tokenizer.save_pretrained(draft / "aligned")
    values = measure_member(replace(subject, concept=concept), planting, pairs=recipe.check_pairs)
    record = {
        **shared_record(concept.name, member.seed, member.knobs, planting),
        "planted": planted_member(member, recipe),
        "family": family_digest(recipe),
        "member": asdict(member),
        "stages": [asdict(recipe.stage_of(member))],
        "interchange": {"aligned": asdict(planting)},
        "measured_with": [template.text for template in concept.implicit],
    }
    _write(draft, record, member_gates(values, member, subject), values)


def planted_member(member: Member, recipe: FamilyRecipe) -> dict[str, Any]:
    """The truth of a member as `build.planted_truth` tells it; `r_blind` is the mean over source blocks, of which blind ones read 0."""
    truth, score = planted_truth(member.knobs, recipe.planting_of(member)), 2 * member.reading - 1
    per_block = [0.0 if block in member.blind else round(score, 4) for block in range(BLOCKS)]
    truth["aligned"] |= {"r_blind": round(sum(per_block) / BLOCKS, 4), "r_blind_per_block": per_block}
    truth["no_effect_blocks"] = list(member.none)
    if not member.effect:
        truth["partial_patches"] = "no patch of identifiers has an effect; a cue acts through its own sentence"
    return truth


def _write(draft: Path, record: dict[str, Any], gates: Sequence[Gate], measured: dict[str, Any]) -> None:
    checked = [{**asdict(gate), "passed": gate.passed} for gate in gates]
    record |= {
        "gates": checked,
        "gates_passed": all(gate.passed for gate in gates),
        "measured": measured,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
