"""The comparison of mitigations: every rival measured in the same way, on the same held-out words, in parts that survive a kill.

Per rival: answers (balanced design, so that association and position separate; implicit and explicit), readings of the identifiers, side
effects, what it does to the stream, and what it costs. Noise is drawn several times: its first draw is a rival like the others, the further
ones are asked implicit questions alone (of `NOISE_PAIRS` word pairs a category, at most). A part is one Parquet file with its provenance.
This module does NOT know how a treatment works, nor how results are shown.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.borders.reading import read_object
from alignblind_mi.borders.settings import File, Names, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.errors import ResultError
from alignblind_mi.measures.awareness import measure_awareness, measure_lens, measure_probes, measure_selfie
from alignblind_mi.measures.behaviour import ask, ask_under, measure_behaviour
from alignblind_mi.measures.mitigation import identifier_sites
from alignblind_mi.measures.side_effects import measure_side_effects
from alignblind_mi.measures.sources import NEGATIVE_CONTROLS
from alignblind_mi.mitigations.directions import ROLES
from alignblind_mi.mitigations.lora import trainable
from alignblind_mi.mitigations.placebos import EFFECTS, NOISE_PAIRS, SEEDS, treatment_effects, with_effects
from alignblind_mi.models.configs import depth_of
from alignblind_mi.models.edits import UNTREATED, Treatment
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.tokens import unknown_words
from alignblind_mi.progress import Advance, Progress, interruptible
from alignblind_mi.results import Result, StudyFolder, check_parts, json_value, stamp
from alignblind_mi.statistics.rates import CLUSTERS
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import KINDS, implicit_prompts
from alignblind_mi.studies.config import StudyConfig, as_begun, asked_concept, organism_record
from alignblind_mi.studies.drawn import write_drawn
from alignblind_mi.studies.jobs import Execute, Job, serially, share_of
from alignblind_mi.studies.parts import instruments, skipped, writes_texts
from alignblind_mi.studies.qualifying import COMPETENCE, QUALIFIED, competence_work, has_instruments, instruments_work
from alignblind_mi.studies.rival_loads import (
    READING_PAIRS,
    ROUNDS,
    TIMED,
    comparison_parts,
    elsewhere,
    plan_of,
    reading_options,
    text_options,
    word_pairs,
)
from alignblind_mi.studies.rivals import UNTREATED_RIVAL, Plan, Rival, Training, noise_prompts
from alignblind_mi.studies.running import Models, check_fits, check_vocabulary
from alignblind_mi.studies.thinning import thinned_to_fit

MEASURED = ("answers", "readings", "effects", "elsewhere")
DRAWS = "draws"    # the part of the further draws of noise
QUALIFYING = (COMPETENCE, QUALIFIED)    # parts of both untreated models; of every treatment the first
FORMAT = 1


@takes(ModelError)
def run_comparison(config: StudyConfig, out: File, *, data: dict[str, Callable[[HookedModel], pd.DataFrame]] | None = None,
                   data_identity: str = "", skip: Names = (), execute: Execute = serially) -> Path:
    """Run or resume a comparison in `out`: the base model untreated, the aligned one under every rival. Returns `out`.

    `data`: further measures by name (such as a BBQ file's), each a function of a model under its treatment; `data_identity` says what they
    are of, so that a folder of other data is refused. `skip`: what is left out by name ("qualification"). `execute` runs the
    jobs (see `studies/jobs.py`).

    Errors: ModelError, ConceptError or ResultError before anything is computed where the input allows to see it; finished parts stay.
    """
    from alignblind_mi.organism.build import one_thread

    # An organism's matrices gain nothing from more threads, and one gives the same bits on every machine.
    config = as_begun(config, Path(out))
    config = thinned_to_fit(config, Path(out), partial(comparison_parts, unqualified=skipped(skip)))
    with one_thread() if organism_record(config.aligned) else nullcontext():
        return _run(config, Path(out), data or {}, data_identity, [] if skipped(skip) else list(QUALIFYING), execute)


def _run(config: StudyConfig, out: Path, data: dict[str, Callable[[HookedModel], pd.DataFrame]], data_identity: str,
         qualifying: Sequence[str], execute: Execute) -> Path:
    concept = asked_concept(config)
    check_fits(config, ("base", "aligned"), lora=trainable(concept, config.cue))
    split = check_vocabulary(config, concept, openly="selfie" in instruments(concept, config.cue, config.selfie))
    n_layers = depth_of(config.aligned)
    plan = plan_of(config, concept)
    names = [part_name("aligned", rival.name, name) for rival in plan.rivals
             for name in (*qualifying[:1], *MEASURED, *data, *([DRAWS] if rival.more is not None else []))]
    check_parts(names)
    identity = config.identity() | {"comparison": FORMAT, "data": sorted(data), "data_identity": data_identity}
    with interruptible(out), StudyFolder.claim(out, identity, share_of(execute)) as folder:
        folder.refuse_taken(names)
        write_drawn(out, {"plan.json": (json.dumps(described(plan, config.taken(n_layers).draws), indent=1) + "\n").encode()})
        wanted = [("base", UNTREATED_RIVAL), *(("aligned", rival) for rival in (UNTREATED_RIVAL, *plan.rivals))]
        trainings = [_training(training, out / "adapters") for training in plan.trainings]
        progress = Progress(len(trainings) + len(wanted))
        measures = {**{name: _measures()[name] for name in (*qualifying, *MEASURED)},
                    **{name: _of_data(measure) for name, measure in data.items()}}
        of = Measured(config, concept, Models(config, progress.note), measures, split, tuple(job.name for job in trainings),
                      [out / "adapters" / training.name for training in plan.trainings])
        execute([*trainings, *(_job(of, role, rival) for role, rival in wanted)], folder, progress)
    return out


@dataclass(frozen=True)
class Measured:
    """What the jobs of one comparison share: the measures, the one model in memory, and the trained adapters with their folders."""

    __repr__ = one_line

    config: StudyConfig
    concept: Concept
    models: Models
    measures: Mapping[str, "Measure"]
    split: Mapping[str, dict[str, int]]
    trained: tuple[str, ...]
    adapters: Sequence[Path]


def _job(of: Measured, role: str, rival: Rival) -> Job:
    """Every measure of one rival: they share the treatment, and what it costs to make. Then the further draws of noise."""
    measured = [name for name in of.measures if name != QUALIFIED or (rival is UNTREATED_RIVAL and has_instruments(of.config, of.concept))]
    measured += [DRAWS] if rival.more is not None else []

    def missing(folder: StudyFolder) -> list[str]:
        return [name for name in measured if not folder.has(part_name(role, rival.name, name))]

    def run(folder: StudyFolder, advance: Advance) -> None:
        model = of.models.get(role, of.adapters if role == "aligned" else ())
        treatment, cost = _treated(model, rival, folder.path / "adapters", of.concept, of.config)
        note = {"role": role, "rival": rival.name, "family": rival.family, "details": treatment.details, "prefix": treatment.prefix,
                "cost": cost, "effect": _effect(model, treatment, rival, of.concept, of.config),
                "split_identifiers": of.split.get(model.spec.name, {}), "config": asdict(of.config)}
        made = partial(_result, of.config, model.under(treatment), note, of.concept, advance)
        for name in missing(folder):
            measure = partial(_draws, rival) if name == DRAWS else of.measures[name]
            folder.part(part_name(role, rival.name, name), partial(made, measure))

    aligned = role == "aligned"
    return Job(f"{rival.name} ({role})", run, lambda folder: not missing(folder), "aligned with adapters" if aligned else "base",
               of.trained if aligned else (), tuple(part_name(role, rival.name, name) for name in measured))


def part_name(role: str, rival: str, measured: str) -> str:
    """The file name of a part."""
    return f"{role}_{rival}_{measured}"


def described(plan: Plan, draws: int = SEEDS) -> dict[str, Any]:
    """A plan as JSON: rivals in order with family, curve and dose, and what is left out and why."""
    rivals = [{"treatment": rival.name, "family": rival.family, "curve": rival.curve, "dose": rival.dose if rival.curve else None,
               "placebos": list(rival.placebos), "draws": draws if rival.more is not None else 1}
              for rival in (UNTREATED_RIVAL, *plan.rivals)]
    return {"rivals": rivals, "left_out": plan.left_out, "trained": [training.name for training in plan.trainings]}


def _training(training: Training, adapters: Path) -> Job:
    adapter = adapters / training.name

    def run(folder: StudyFolder, advance: Advance) -> None:
        adapters.mkdir(parents=True, exist_ok=True)
        training.train(adapter)

    return Job(_train(training.name), run, lambda folder: (adapter / "adapter_config.json").is_file(),
               after=(_train(training.source),) if training.source else (), makes=(f"{adapters.name}/{training.name}",))


def _train(adapter: str) -> str:
    return f"train {adapter}".replace("_", " ")


# ---- models ------------------------------------------------------------------------------------------------------------


def _treated(model: HookedModel, rival: Rival, adapters: Path, concept: Concept, config: StudyConfig) -> tuple[Treatment, dict[str, Any]]:
    """A rival's treatment and its cost: seconds to make it, training included; the numbers that its adapter and its different vectors add
    to the model; added latency."""
    start = time.monotonic()
    treatment = rival.make(model)
    seconds = time.monotonic() - start
    note = adapters / (treatment.adapter or "") / "training.json"
    known = treatment.adapter is not None and note.is_file()
    trained = read_object(note, "", ResultError, advice=f"delete {note.parent} to train it anew") if known else {}
    vectors = {edit.vector.data_ptr(): edit.vector.numel() for edit in treatment.edits}
    return treatment, {"seconds": round(seconds + trained.get("seconds", 0.0), 3),
                       "parameters": int(trained.get("parameters", 0)) + sum(vectors.values()),
                       "latency": latency(model, treatment, concept, config)}


def _effect(model: HookedModel, treatment: Treatment, rival: Rival, concept: Concept, config: StudyConfig) -> dict[str, Any]:
    """What `treatment_effects` says of a rival; of what has no edits, the stream is read at the identifiers, after the early window."""
    if rival is UNTREATED_RIVAL:
        return {}
    asked = noise_prompts(concept, config.cue, config.seed)
    found = treatment_effects(model, treatment, asked, sites=identifier_sites(model.n_layers))
    return {name: json_value(found[name].iloc[0]) for name in (*EFFECTS, "layer", "tokens")}    # null: no identifier was there to be read


def _draws(rival: Rival, model: HookedModel, concept: Concept, config: StudyConfig, advance: Advance) -> pd.DataFrame:
    """Implicit answers under the further draws of a noise placebo, with what each does."""
    model = model.under(UNTREATED)
    drawn, asked = rival.more(model) if rival.more is not None else [], noise_prompts(concept, config.cue, config.seed)
    prompts = implicit_prompts(concept, config.cue, design="balanced", seed=config.seed,
                               max_word_pairs=min(word_pairs(config), NOISE_PAIRS))
    return with_effects(ask_under(model, concept, prompts, drawn, config.decoding, advance), treatment_effects(model, drawn, asked))


Measure = Callable[[HookedModel, Concept, StudyConfig, Advance], pd.DataFrame]


def _measures() -> dict[str, Measure]:
    return {COMPETENCE: _competence, QUALIFIED: _qualified, "answers": _answers, "readings": _readings, "effects": _effects,
            "elsewhere": _elsewhere}


def _competence(model: HookedModel, concept: Concept, config: StudyConfig, advance: Advance) -> pd.DataFrame:
    """No row of what acts at identifiers alone: competence items have none, so that they are answered as they are untreated."""
    treatment = model.treatment
    if treatment.edits and treatment.adapter is None and not treatment.prefix and {edit.site.mark for edit in treatment.edits} <= {*ROLES}:
        return pd.DataFrame({name: pd.Series(dtype=str) for name in (*CLUSTERS, "model", "kind", "outcome", "right")})
    return competence_work(config, concept, treatment)[0](model, advance)


def _qualified(model: HookedModel, concept: Concept, config: StudyConfig, advance: Advance) -> pd.DataFrame:
    return instruments_work(config, concept)[0](model, advance)


def _of_data(measure: Callable[[HookedModel], pd.DataFrame]) -> Measure:
    return lambda model, concept, config, advance: measure(model)


def _answers(model: HookedModel, concept: Concept, config: StudyConfig, advance: Advance) -> pd.DataFrame:
    return measure_behaviour(model, concept, config.cue, design="balanced", kinds=KINDS, decoding=config.decoding, seed=config.seed,
                             max_word_pairs=word_pairs(config), progress=advance)


def _readings(model: HookedModel, concept: Concept, config: StudyConfig, advance: Advance) -> pd.DataFrame:
    """The patchscope at the first two mentions (of an untreated model beside its controls, which the audit asks for), and whatever other
    instruments the concept has the data for at the first."""
    read = reading_options(config, model.n_layers)
    parts = [measure_awareness(model, concept, config.cue, reading=next(iter(concept.interpretations)), target_layer=config.target_layer,
                               controls=NEGATIVE_CONTROLS if model.treatment.family == "untreated" else (), mentions=(0, 1),
                               max_word_pairs=READING_PAIRS, seed=config.seed, **read)]
    for name in instruments(concept, config.cue, config.selfie, texts=writes_texts(config)):
        if name == "selfie":
            parts.append(measure_selfie(model, concept, config.cue, controls=(), **text_options(config, model.n_layers)))
        elif name == "lens":
            parts.append(measure_lens(model, concept, config.cue, controls=(), seed=config.seed, **read))
        else:
            parts.append(measure_probes(model, concept, config.cue, controls=(), random_weights=False, seed=config.seed, **read).rows)
    return pd.concat(parts, ignore_index=True)


def _elsewhere(model: HookedModel, concept: Concept, config: StudyConfig, advance: Advance) -> pd.DataFrame:
    """Implicit answers under other cues of the concept, and of other concepts: what else does the treatment change?

    Edits at identifiers act where the identifiers are those that are treated. What the tokenizer does not know is not asked.
    """
    treated, parts = concept.cue(config.cue), []
    for other, cue in elsewhere(concept, treated.name):
        prompts = implicit_prompts(other, cue, design="balanced", seed=config.seed, max_word_pairs=1)
        if any(unknown_words(model.tokenizer, item) for item in model.encode(prompts)):
            continue
        same = (cue.marked, cue.unmarked) == (treated.marked, treated.unmarked)
        parts.append(ask(model, other, prompts if same else [replace(prompt, marks={}) for prompt in prompts], config.decoding, advance,
                         partial=True))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["treatment", "concept", "cue", "kind", "outcome"])


def _effects(model: HookedModel, concept: Concept, config: StudyConfig, advance: Advance) -> pd.DataFrame:
    return measure_side_effects(model, concept, config.cue, word_pairs=word_pairs(config), seed=config.seed)


def _result(config: StudyConfig, treated: HookedModel, note: dict[str, Any], concept: Concept, advance: Advance, measure: Measure
            ) -> Result:
    rows = measure(treated, concept, config, advance).assign(role=note["role"], family=note["family"])
    if "placebo_seed" not in rows:    # the further draws have names and effects of their own
        effect = {name: math.nan if value is None else value for name, value in note["effect"].items()}
        rows = rows.assign(treatment=note["rival"], **{name: effect[name] for name in EFFECTS if name in effect})
    return Result(rows, {**treated.provenance(), **note, **stamp()})


def latency(model: HookedModel, treatment: Treatment, concept: Concept, config: StudyConfig) -> float:
    """Time of answering some questions under a treatment over that without: the median ratio of interleaved rounds, equal answers' length.

    Timed on this machine while it does whatever else it does: a rough number.
    """
    prompts = implicit_prompts(concept, config.cue, design="balanced", seed=config.seed, max_word_pairs=1)[:TIMED]
    treated = model.under(treatment)
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for view in (model, treated):
            start = time.perf_counter()
            view.continuation_log_probs(view.rows(prompts), [[" one", " one"]] * len(prompts))
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return round(sorted(ratios)[ROUNDS // 2], 3)
