"""The parts that qualify a model: can it do the task, and which instruments read it? Does NOT know verdicts, nor what follows from them."""

from collections.abc import Sequence

import pandas as pd

from alignblind_mi.measures.awareness import SELFIE_TOKENS
from alignblind_mi.measures.competence import measure_competence
from alignblind_mi.measures.qualification import (
    INSTRUMENTS,
    MOST_LAYERS,
    MOST_TUNED,
    QUICK,
    check_instruments,
    measure_instruments,
    untried,
)
from alignblind_mi.measures.sources import UntriedError, reading_sources, sentence_prompts
from alignblind_mi.measures.tuning import KEPT, injection_layers
from alignblind_mi.models.configs import depth_of
from alignblind_mi.models.edits import UNTREATED, Site, Treatment
from alignblind_mi.models.model import HookedModel
from alignblind_mi.progress import Advance
from alignblind_mi.stimuli.competence import competence_prompts
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import KINDS, interpretation_prompt
from alignblind_mi.stimuli.questions import questions
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.part import Load, Part, Work

COMPETENCE, QUALIFIED = "competence", "qualified"    # how the names of the parts begin


def asked_pairs(config: StudyConfig) -> int:
    """How many word pairs of competence are asked."""
    return config.taken().competence


def has_instruments(config: StudyConfig, concept: Concept) -> bool:
    """Whether there is anything to try instruments on: senses, and contexts that settle them."""
    return concept.has_senses(config.cue) and bool(concept.contexts)


def qualifying_parts(config: StudyConfig, concept: Concept, role: str) -> list[Part]:
    """The qualification of one untreated model of a study, of all instruments."""
    parts = [Part(f"{COMPETENCE}_{role}", role, False, *competence_work(config, concept))]
    if has_instruments(config, concept):
        parts.append(Part(f"{QUALIFIED}_{role}", role, False, *instruments_work(config, concept)))
    return parts


def competence_work(config: StudyConfig, concept: Concept, treatment: Treatment = UNTREATED) -> Work:
    """Competence items, under a treatment. Its edits at identifiers act nowhere: there are none in these items."""
    pairs = asked_pairs(config)

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        rows = measure_competence(model.under(treatment), concept, pairs=pairs, decoding=config.decoding, seed=config.seed,
                                  progress=advance)
        return rows.assign(family=treatment.family, sense="", layers=treatment.details.get("layers", ""))

    def loads() -> list[Load]:
        asked = [competence_prompts(concept, kind, pairs=pairs, seed=config.seed) for kind in KINDS]
        return [Load.of_answers(concept, prompts, config.decoding.max_new_tokens, config.chat) for prompts in asked if prompts]
    return compute, loads


def all_instruments(config: StudyConfig) -> tuple[str, ...]:
    """What is tried where no instruments are named: all, but those that write texts only where texts are written."""
    return tuple(name for name in INSTRUMENTS if name != "selfie" or config.taken().texts)


def injected(config: StudyConfig) -> list[Site]:
    """Where vectors are put that are asked about: at the placeholder of a question."""
    return [Site(min(config.target_layer, depth_of(config.aligned) - 1), "placeholder")]


def instruments_work(config: StudyConfig, concept: Concept, instruments: Sequence[str] | None = None) -> Work:
    """Instruments on sentences that settle the sense, and on the ambiguous prompts; all `instruments`, unless they are named, but none that
    is left out to fit into minutes. Errors: ModelError for an unknown one."""
    instruments = all_instruments(config) if instruments is None else instruments
    check_instruments(instruments)
    full = config.taken().tried

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        try:
            return measure_instruments(model, concept, config.cue, instruments=instruments, target_layer=config.target_layer,
                                       selfie=config.selfie, quick=not full, seed=config.seed, progress=advance)
        except UntriedError as error:    # the page says so of every instrument; the rest of a study goes on
            return untried(model, instruments, str(error))

    def loads() -> list[Load]:
        train, test = (sentence_prompts(concept, config.cue, split, seed=config.seed) for split in ("train", "settled"))
        read = [source.prompt for source in reading_sources(concept, config.cue, mentions=(0,), seed=config.seed)]
        found, depth = [Load([*train, *test, *read], chat=config.chat)], depth_of(config.aligned)
        units, (most_layers, most_tuned, kept) = len(test) + len(read), (MOST_LAYERS, MOST_TUNED, KEPT) if full else QUICK
        if "patchscope" in instruments:
            asked = questions(concept)
            tried = len(asked) + kept * len(injection_layers(depth)) + 3
            places = tried * len(train if full else train[::2]) * min(most_tuned, depth) + 2 * units * min(most_layers, depth)
            found.append(Load([one.prompt for one in asked], times=-(-places // len(asked)), written=injected(config)))
        if "selfie" in instruments and config.selfie in concept.selfie:
            target = interpretation_prompt(concept.selfie_prompt(config.selfie))
            found.append(Load([target], SELFIE_TOKENS, units * min(most_tuned, depth), written=injected(config)))
        return found
    return compute, loads
