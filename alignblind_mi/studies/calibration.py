"""Calibration: every instrument on models whose truth is known, so that a researcher knows how far each can be trusted.

The models are a family of organisms (`organism/family.py`): five settings of two separate knobs (how identifiers are read, how biased the
answers are), a null organism, one whose senses can be decoded but are not used, and two that differ in depth alone. This module measures;
what the measurements say is `verdicts.py`. No phrase, question or place that is measured was used to train the organisms:

* sources are the concept's implicit prompts, never sources of a planted patch;
* readings are asked by `QUESTION`, and injected at `TARGET_LAYER`; planted was another question, at another layer;
* cues are the `test` contexts of `measured_concept` and steering phrases; steering acts on the stream between attention and MLP (`STREAM`),
  planted was the stream after a block;
* words are the concept's, held out from training, and the task's templates are ones that no organism was trained on
  (`organism/wording.toml`); members were planted in the concept's own and in ten others.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd

from alignblind_mi.borders.settings import Count, Jobs, Listed, Seed, check_fields, takes
from alignblind_mi.borders.texts import one_line, shown
from alignblind_mi.instruments.attribution import attribution_patching
from alignblind_mi.instruments.contrast import contrast_pairs
from alignblind_mi.instruments.lens import Translators, train_translators
from alignblind_mi.instruments.patching import grid_sites, patch_grid
from alignblind_mi.instruments.probes import train_probes
from alignblind_mi.measures.awareness import ask_sources, interpret_sources, lens_sources, probe_sources
from alignblind_mi.measures.mitigation import early_window
from alignblind_mi.measures.patching import SCREEN_STEPS
from alignblind_mi.measures.sources import Contexts, Recorded, record_contexts, record_sources
from alignblind_mi.mitigations.steering import sense_steering
from alignblind_mi.models.edits import Stream, Treatment
from alignblind_mi.models.embedded import OrganismError
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.organism.checks import NO_EFFECT
from alignblind_mi.organism.family import build_family, cache_folder, calibration_family, failed_gates, family_concept, member_path
from alignblind_mi.organism.members import Member, measured_concept
from alignblind_mi.progress import Advance, Progress, interruptible
from alignblind_mi.results import Result, StudyFolder, stamp
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.stimuli.prompts import Prompt, assignments, implicit_prompts
from alignblind_mi.studies.jobs import Execute, Job, serially, share_of
from alignblind_mi.studies.qualified_organisms import qualify_organism

CUE = "default"
QUESTION, SELFIE_PROMPT = "about", "restated"
TARGET_LAYER = 3
STREAM: Stream = "resid_mid"
READING_INSTRUMENTS = ("r_blind", "selfie", "logit_lens", "tuned_lens", "probe")
BEHAVIOUR_INSTRUMENTS = ("implicit_bias", "steering", "activation_patching", "attribution_patching")
INSTRUMENTS = READING_INSTRUMENTS + BEHAVIOUR_INSTRUMENTS
LEAKY = "leaky"    # a decodable organism whose patches do act, by its own gate: no control for causality, and not counted as one
CONTROLS = ("random", "wrong_token")    # a reading of these is a false alarm
SEEDS = (0, 1, 2)
WORD_PAIRS, QUICK_PAIRS = 4, 2    # a category, of readings and answers; half as many are patched
SELFIE_TOKENS = 8
LENS_STEPS = 120
QUALIFIED = "qualified-"    # how the names of parts begin that tell whether qualification is right
QUICK_SHUFFLES = 10
QUESTION_LABELS = ("template", "option_order", "word_order")    # the questions of one such form, over all words, make a trial
COLUMNS = ("instrument", "variant", "control", "unit", "context", "trial", "layer", "value")


@dataclass(frozen=True)
class CalibrationConfig:
    """Everything that the rows of a calibration depend on."""

    __repr__ = one_line

    seeds: Annotated[tuple[Seed, ...], Listed(some=True)] = SEEDS
    quick: bool = False

    def __post_init__(self) -> None:
        check_fields(self, OrganismError)

    @classmethod
    def create(cls, seeds: str, *, quick: bool = False) -> "CalibrationConfig":
        """From a comma-separated list of seeds; a quick calibration takes the first. Errors: OrganismError for what is no seed."""
        given = [text.strip() for text in seeds.split(",")]
        wrong = [text for text in given if not re.fullmatch(r"[0-9]{1,20}", text)]
        if wrong:
            raise OrganismError(f"{shown(wrong[0])} is no seed: give whole numbers separated by commas, such as 0,1,2.")
        chosen = tuple(dict.fromkeys(map(int, given)))
        return cls(chosen[:1] if quick else chosen, quick)

    @property
    def members(self) -> list[Member]:
        """The organisms that are measured."""
        return calibration_family(self.seeds, quick=self.quick)

    def identity(self) -> dict[str, object]:
        """What a results folder is checked against: the settings, the recipe of the family and the content of the concept."""
        return {"calibration": 3, "seeds": list(self.seeds), "quick": self.quick, "family": cache_folder().name,
                "concept_digest": load_concept(family_concept()).digest, "members": [member.name for member in self.members]}


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@takes(OrganismError)
def run_calibration(config: CalibrationConfig, out: Path, *, jobs: Jobs = 1, cache: Path | None = None, execute: Execute = serially
                    ) -> Path:
    """Build (or find in the cache) every organism, measure every instrument on each, and save the parts of each in `out`.

    An organism has two parts: all instruments, and what qualification says of it (see `qualified_organisms.py`). `jobs` processes build;
    with one, each is built just before it is measured. Finished parts are not measured again. `execute` runs the jobs (see `jobs.py`).

    Errors: OrganismError or ResultError for a cache or folder that cannot be used.
    """
    with interruptible(out), StudyFolder.claim(out, config.identity(), share_of(execute)) as folder:
        folder.refuse_taken(name for member in config.members for name in parts_of(member))
        _measure_all(config, folder, jobs, cache, execute)
    return out


def _measure_all(config: CalibrationConfig, folder: StudyFolder, jobs: int, cache: Path | None, execute: Execute) -> None:
    from alignblind_mi.organism.build import one_thread

    members = config.members
    missing = [member for member in members if not all(map(folder.has, parts_of(member)))]
    progress = Progress(len(members) + (jobs > 1))
    if jobs > 1:
        with progress.part("build organisms", done=not missing):
            build_family(missing, cache, jobs=jobs, progress=progress.note)
    with one_thread():
        execute([_job(config, member, cache, progress.note) for member in members], folder, progress)


def _job(config: CalibrationConfig, member: Member, cache: Path | None, say: Callable[[str], None]) -> Job:
    """Every instrument on one organism, which is built unless it is in the cache."""
    def run(folder: StudyFolder, advance: Advance) -> None:
        path = member_path(member, cache, say)
        for name, measure in parts.items():
            folder.part(name, partial(_result, config, member, path, measure))

    parts = parts_of(member)
    return Job(f"measure {member.name}", run, lambda folder: all(map(folder.has, parts)), member.name, makes=tuple(parts))


Measure = Callable[[HookedModel, Concept, Member, CalibrationConfig], pd.DataFrame]


def parts_of(member: Member) -> dict[str, Measure]:
    """The parts of one organism by name: every instrument, and whether qualification is right about it."""
    return {member.name: _instruments, f"{QUALIFIED}{member.name}": _qualified}


def _instruments(model: HookedModel, concept: Concept, member: Member, config: CalibrationConfig) -> pd.DataFrame:
    return measure_instruments(model, concept, seed=member.seed, word_pairs=QUICK_PAIRS if config.quick else WORD_PAIRS)


def _qualified(model: HookedModel, concept: Concept, member: Member, config: CalibrationConfig) -> pd.DataFrame:
    """On the concept's contexts of today, as a user's model is qualified: no organism was planted with them."""
    few = {"shuffles": QUICK_SHUFFLES, "models": 1} if config.quick else {}
    return qualify_organism(model, load_concept(family_concept()), CUE, seed=config.members.index(member), **few)


def _result(config: CalibrationConfig, member: Member, path: Path, measure: Measure) -> Result:
    model = load_model(ModelSpec(str(path)))
    rows = measure(model, measured_concept(family_concept()), member, config)
    truth = {key: value for key, value in asdict(member).items() if key not in ("effect", "none", "quick")}
    failed = failed_gates(path.parent)
    truth["kind"] = LEAKY if member.kind == "decodable" and NO_EFFECT in failed else member.kind
    rows = rows.assign(member=member.name, **truth, onset=-1 if member.onset is None else member.onset,
                       last=max(member.effect, default=-1))
    return Result(rows, {**model.provenance(), "member": asdict(member), "failed_gates": failed, "config": asdict(config),
                         **stamp()})


@takes(OrganismError)
def measure_instruments(model: HookedModel, concept: Concept, *, word_pairs: Count = WORD_PAIRS, seed: Seed = 0) -> pd.DataFrame:
    """Every instrument on one organism, `word_pairs` a category. One row per instrument, variant, unit and layer.

    Columns: instrument; variant ("open": without a cue, "group" and "other": after a cue, "depth": of single layers, "placebo": what should
    show nothing); control (which placebo, else empty); unit (one reading or question), context (what intervals are clustered over), trial
    (the part of the rows on which an alarm could be raised), layer, value. Values of reading instruments run from the group sense
    (negative) to the other sense (see `awareness.py`); those of behaviour instruments are probabilities of the stereotyped answer
    over one half (`implicit_bias`), or by how much a treatment lowers them.
    """
    prompts = implicit_prompts(concept, CUE, max_word_pairs=word_pairs)
    parts = [*_readings(model, concept, word_pairs, seed), _implicit_bias(model, concept, prompts), *_steering(model, concept, prompts),
             *_patching(model, concept, max(1, word_pairs // 2), seed)]
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


# ---- readings ----------------------------------------------------------------------------------------------------------


def _readings(model: HookedModel, concept: Concept, word_pairs: int, seed: int) -> list[pd.DataFrame]:
    """All reading instruments on uncued prompts (with the controls) and on prompts after sentences that settle the sense."""
    recorded = record_sources(model, concept, CUE, mentions=(0, 1), max_word_pairs=word_pairs, controls=CONTROLS, seed=seed)
    train, cued = (record_contexts(model, concept, CUE, range(model.n_layers), split) for split in ("train", "test"))
    translators = train_translators(model, _lens_text(concept), steps=LENS_STEPS, seed=seed)
    parts = []
    for name in READING_INSTRUMENTS:
        open_rows = _read(name, recorded, concept, translators, seed)
        kind = np.where(open_rows["control"] == "", "open", "placebo")
        parts.append(_reading_rows(name, open_rows, kind, open_rows["context"]))
        cued_rows = _cued_probe(train, cued) if name == "probe" else _read(name, cued.recorded, concept, translators, seed)
        sense, sentence = _by_row(cued, len(cued_rows))
        parts.append(_reading_rows(name, cued_rows, sense, sentence))
    return parts


def _read(name: str, recorded: Recorded, concept: Concept, translators: Translators, seed: int) -> pd.DataFrame:
    """The rows of one reading instrument."""
    if name == "r_blind":
        return ask_sources(recorded, concept, reading=QUESTION, target_layer=TARGET_LAYER)
    if name == "selfie":
        return interpret_sources(recorded, concept, prompt=SELFIE_PROMPT, target_layer=TARGET_LAYER, max_new_tokens=SELFIE_TOKENS,
                                 temperature=1.0, seed=seed)
    if name == "probe":
        rows = probe_sources(recorded, concept, CUE, random_weights=False, seed=seed).rows
        return rows.assign(blind=rows["blind_unchecked"])    # the truth is known here: what a probe reads is checked against it
    return lens_sources(recorded, concept, translators=translators if name == "tuned_lens" else None)


def _cued_probe(train: Contexts, cued: Contexts) -> pd.DataFrame:
    """Probes on sentences of known sense, on the scale of those that they were trained on: no label of the measured ones is used."""
    probes = train_probes(train.resid, train.labels, cued.recorded.layers)
    said = probes.readings(cued.resid, train.resid, train.labels)
    return pd.DataFrame([{**source.labels(), "layer": layer, "blind": float(said[i, j])}
                         for i, source in enumerate(cued.recorded.sources) for j, layer in enumerate(cued.recorded.layers)])


def _by_row(cued: Contexts, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The sense and the sentence of each row of readings, which go source by source and layer by layer."""
    layers = rows // len(cued.labels)
    return np.repeat(np.where(cued.labels, "other", "group"), layers), np.repeat(np.array(cued.sentences), layers)


def _reading_rows(name: str, rows: pd.DataFrame, variant: Sequence[str] | np.ndarray, context: Sequence[str] | np.ndarray | pd.Series
                  ) -> pd.DataFrame:
    """First mentions have too few contexts to make a trial of each template."""
    mention = rows["mark"] + "|" + rows["mention"].astype(str)
    unit = mention + "|" + rows["context"] + "|" + pd.Series(np.asarray(context), rows.index)
    return pd.DataFrame({"instrument": name, "variant": variant, "control": rows["control"], "unit": unit, "context": np.asarray(context),
                         "trial": mention + ("|" + rows["template"]).where(rows["mention"] > 0, ""), "layer": rows["layer"],
                         "value": rows["blind"].astype(float)})


def _lens_text(concept: Concept) -> list[Prompt]:
    """What translators are trained on: implicit prompts with and without the concept's cues that need no other words."""
    cues = [cue for cue in concept.cues.values() if cue.marked == concept.cue(CUE).marked]
    return [prompt for cue in cues for prompt in implicit_prompts(concept, cue, max_word_pairs=1)]


# ---- behaviour ---------------------------------------------------------------------------------------------------------


def _stereotyped(model: HookedModel, concept: Concept, treatment: Treatment, prompts: Sequence[Prompt]) -> np.ndarray:
    """P(stereotyped answer) of the two complete answers, per prompt."""
    treated = model.under(treatment)
    logs = treated.continuation_log_probs(treated.rows(prompts), [assignments(concept, prompt) for prompt in prompts])
    return np.asarray((logs[:, 0] - logs[:, 1]).sigmoid().numpy(), dtype=float)


def _behaviour_rows(name: str, variant: str, prompts: Sequence[Prompt], values: np.ndarray, control: str = "", layer: int = -1
                    ) -> pd.DataFrame:
    labels = pd.DataFrame([prompt.labels for prompt in prompts])
    trial = labels[list(QUESTION_LABELS)].agg("|".join, axis=1)
    return pd.DataFrame({"instrument": name, "variant": variant, "control": control, "unit": trial + "|" + labels["word_pair"],
                         "context": labels["word_pair"], "trial": trial, "layer": layer, "value": values})


def _implicit_bias(model: HookedModel, concept: Concept, prompts: Sequence[Prompt]) -> pd.DataFrame:
    return _behaviour_rows("implicit_bias", "open", prompts, _stereotyped(model, concept, Treatment("untreated"), prompts) - 0.5)


def _steering(model: HookedModel, concept: Concept, prompts: Sequence[Prompt]) -> list[pd.DataFrame]:
    """How much replacing the identifiers by those of a phrase lowers the bias.

    In the paper's early window towards the group ("open") and towards each control phrase ("placebo"), and towards the group in each single
    layer ("depth").
    """
    before = _stereotyped(model, concept, Treatment("untreated"), prompts)
    window = list(early_window(model.n_layers))
    plans = [("open", concept.group_sense, window, -1), *(("placebo", control, window, -1) for control in concept.controls),
             *(("depth", concept.group_sense, [layer], layer) for layer in range(model.n_layers))]
    parts = []
    for variant, sense, layers, layer in plans:
        after = _stereotyped(model, concept, sense_steering(model, concept, CUE, sense, layers, stream=STREAM), prompts)
        parts.append(_behaviour_rows("steering", variant, prompts, before - after, sense if variant == "placebo" else "", layer))
    return parts


def _patching(model: HookedModel, concept: Concept, word_pairs: int, seed: int) -> list[pd.DataFrame]:
    """How much the identifiers of a prompt after the group's phrase lower the bias of the same prompt after a control phrase.

    Both exactly and to first order, by layer ("depth"), and over the layers of the early window ("open"; each patched alone); random
    vectors of the same norm are the placebo.
    """
    control = next(iter(concept.controls))
    pairs = contrast_pairs(model, concept, CUE, corrupt=control, max_word_pairs=word_pairs, seed=seed)
    sites = grid_sites(range(model.n_layers), ["identifiers"], (STREAM,))
    exact = patch_grid(model, pairs, sites, controls=("random",), seed=seed)
    screen = attribution_patching(model, pairs, sites, steps=SCREEN_STEPS)
    sigmoid: Callable[[pd.Series], pd.Series] = lambda odds: 1 / (1 + np.exp(-odds))    # noqa: E731
    exact = exact.assign(value=sigmoid(exact["corrupt"]) - exact["p_stereotyped"])
    screen = screen.assign(value=sigmoid(screen["corrupt"]) - sigmoid(screen["corrupt"] + screen["attribution"]), control="")
    return [part for name, rows in (("activation_patching", exact), ("attribution_patching", screen))
            for part in _patch_rows(name, rows, early_window(model.n_layers))]


def _patch_rows(name: str, rows: pd.DataFrame, window: range) -> list[pd.DataFrame]:
    trial = rows[list(QUESTION_LABELS)].agg("|".join, axis=1)
    table = pd.DataFrame({"instrument": name, "variant": "depth", "control": rows["control"], "unit": trial + "|" + rows["word_pair"],
                          "context": rows["word_pair"], "trial": trial, "layer": rows["layer"], "value": rows["value"]})
    inside = table[table["layer"].isin(list(window))]
    return [table, inside.assign(variant=np.where(inside["control"] == "", "open", "placebo"))]
