"""What a comparison asks of a model under each rival: how many word pairs, and all the loads. Does NOT measure, nor make a treatment."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pandas as pd

from alignblind_mi.measures.awareness import SELFIE_TOKENS
from alignblind_mi.measures.side_effects import asked_prompts
from alignblind_mi.measures.sources import NEGATIVE_CONTROLS, context_prompts, control_sources, reading_sources
from alignblind_mi.mitigations.placebos import NOISE_PAIRS, SAMPLE
from alignblind_mi.models.configs import depth_of
from alignblind_mi.models.edits import Treatment
from alignblind_mi.stimuli.concept import Concept, Cue, concept_names, load_concept
from alignblind_mi.stimuli.prompts import KINDS, behaviour_prompts, implicit_prompts, interpretation_prompt
from alignblind_mi.studies.config import StudyConfig, asked_concept
from alignblind_mi.studies.part import Load, Part
from alignblind_mi.studies.parts import (
    MATCHING,
    MEASURING,
    instruments,
    read_layers,
    selfie_options,
    text_layers,
    training_load,
    writes_texts,
)
from alignblind_mi.studies.qualifying import competence_work, has_instruments, injected, instruments_work
from alignblind_mi.studies.rivals import UNTREATED_RIVAL, Plan, Rival, plan_rivals

PAIRS, QUICK_PAIRS = 10, 2    # word pairs a category
READING_PAIRS = 4
ROUNDS, TIMED = 3, 16    # of what measures latency
BY_ADAPTER_OR_PREFIX = ("lora", "unlearning", "prompt", "combined")    # families that can act where no identifier stands


def word_pairs(config: StudyConfig) -> int:
    """Word pairs a category that every rival is asked."""
    return min(QUICK_PAIRS if config.quick else PAIRS, config.taken().pairs)


def reading_options(config: StudyConfig, n_layers: int) -> dict[str, Any]:
    """At which layers instruments read rivals: at all, unless fewer were chosen to fit into minutes."""
    return {} if config.amounts is None else {"layers": read_layers(config, n_layers)}


def text_options(config: StudyConfig, n_layers: int) -> dict[str, Any]:
    """At which layers texts are written, and how."""
    return selfie_options(config) | ({} if config.amounts is None else {"layers": text_layers(config, n_layers)})


def plan_of(config: StudyConfig, concept: Concept) -> Plan:
    """The rivals of a configuration."""
    depth = depth_of(config.aligned)
    taken = config.taken(depth)
    return plan_rivals(config.aligned, concept, config.cue, depth, config.lora, quick=not taken.every, seed=config.seed,
                       protocol=config.protocol, draws=taken.draws, trained=taken.adapters > 0)


def elsewhere(concept: Concept, cue: str) -> list[tuple[Concept, Cue]]:
    """What else every rival is asked: other cues of the concept, and other concepts."""
    others = [(concept, one) for one in concept.cues.values() if one.name != cue]
    return others + [(other, other.cue(other.first_cue)) for other in map(load_concept, concept_names()) if other.name != concept.name]


def comparison_parts(config: StudyConfig, *, unqualified: bool = False) -> list[Part]:
    """A comparison by its rivals: what each asks, all measures together. They say what there is to do, and are not run."""
    concept = asked_concept(config)
    plan = plan_of(config, concept)
    same = cache(partial(_same_loads, config, concept, unqualified))    # of the rivals of one kind
    wanted = [("base", UNTREATED_RIVAL), *(("aligned", rival) for rival in (UNTREATED_RIVAL, *plan.rivals))]
    parts = [Part(f"rival_{role}_{rival.name}", role, False, _never,
                  partial(_loads, config, concept, rival, same)) for role, rival in wanted]
    if not unqualified:
        parts += [Part(f"competence_{len(plan.rivals)}", "aligned", False, _never), Part("qualified", "aligned", False, _never)]
    trained = [training for training in plan.trainings if "x0" not in training.name]    # the others are scaled
    epochs = config.lora.epochs * len(trained)
    return [*parts, Part("trainings", "aligned", False, _never, lambda: [training_load(concept, epochs)] if epochs else [])]


def _never(*_: Any) -> pd.DataFrame:
    return pd.DataFrame()


def _loads(config: StudyConfig, concept: Concept, rival: Rival, same: Callable[[bool, bool], list[Load]]) -> list[Load]:
    few = implicit_prompts(concept, config.cue, design="balanced", seed=config.seed, max_word_pairs=min(word_pairs(config), NOISE_PAIRS))
    draws = config.taken().draws if rival.more is not None else 0
    more = [Load.of_answers(concept, few, config.decoding.max_new_tokens, config.chat, draws - 1)] if draws > 1 else []
    times = 2 * ROUNDS + MEASURING + MATCHING * draws
    return [*same(rival is UNTREATED_RIVAL, rival.family in BY_ADAPTER_OR_PREFIX or rival.name.startswith("prompt")), *more,
            Load(few[:SAMPLE], times=times, chat=config.chat)]


def _same_loads(config: StudyConfig, concept: Concept, unqualified: bool, untreated: bool, everywhere: bool) -> list[Load]:
    """What every rival is asked; `everywhere`: it can act where no identifier stands."""
    new, chat, pairs = config.decoding.max_new_tokens, config.chat, word_pairs(config)
    answers: Callable[..., Load] = partial(Load.of_answers, new_tokens=new, chat=chat)
    found = [answers(concept, behaviour_prompts(concept, config.cue, kind, design="balanced", seed=config.seed, max_word_pairs=pairs))
             for kind in KINDS]
    if not unqualified and (untreated or everywhere):
        found += competence_work(config, concept, Treatment("rival"))[1]()
    if not unqualified and untreated and has_instruments(config, concept):
        found += instruments_work(config, concept)[1]()
    found += _readings(config, concept, untreated)
    judged, read = asked_prompts(concept, config.cue, word_pairs=pairs, seed=config.seed)
    found += [answers(concept, judged), Load(read, chat=chat)]
    return found + [answers(other, implicit_prompts(other, cue, design="balanced", seed=config.seed, max_word_pairs=1))
              for other, cue in elsewhere(concept, config.cue)]


def _readings(config: StudyConfig, concept: Concept, untreated: bool) -> list[Load]:
    depth = depth_of(config.aligned)
    layers = len(reading_options(config, depth).get("layers", range(depth)))
    asked = reading_sources(concept, config.cue, mentions=(0, 1), max_word_pairs=READING_PAIRS, seed=config.seed)
    asked += control_sources(concept, asked, NEGATIVE_CONTROLS, seed=config.seed) if untreated else []
    question = interpretation_prompt(next(iter(concept.interpretations.values())))
    found = [Load([source.prompt for source in asked], chat=config.chat),
             Load([question], times=len(asked) * layers, written=injected(config))]
    for name in instruments(concept, config.cue, config.selfie, texts=writes_texts(config)):
        if name == "selfie":
            how = text_options(config, depth)
            texts = reading_sources(concept, config.cue, seed=config.seed, protocol=config.protocol, max_word_pairs=how["max_word_pairs"])
            target = interpretation_prompt(concept.selfie_prompt(config.selfie))
            found.append(Load([target], SELFIE_TOKENS, len(texts) * len(how.get("layers", range(depth))), written=injected(config)))
        elif name == "probes":
            found.append(Load(context_prompts(concept, config.cue, "train"), chat=config.chat))
    return found
