"""The parts of a study: which there are, which model each needs, how its rows are computed. Does NOT hold models or folders."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from alignblind_mi.instruments.attention import attention_rows
from alignblind_mi.instruments.lens import lens_contrast, logit_lens
from alignblind_mi.measures.awareness import SELFIE_TOKENS, measure_awareness, measure_lens, measure_probes, measure_selfie, with_accuracy
from alignblind_mi.measures.behaviour import ask, ask_under
from alignblind_mi.measures.mitigation import early_window, identifier_sites, late_window, steering_names
from alignblind_mi.measures.sources import NEGATIVE_CONTROLS, context_prompts, control_sources, possible_controls, reading_sources, thinned
from alignblind_mi.mitigations.lora import trainable
from alignblind_mi.mitigations.lora_settings import LAYER_GROUPS
from alignblind_mi.mitigations.placebos import NOISE_PAIRS, SAMPLE, SEEDS, noise_placebos, treatment_effects, with_effects
from alignblind_mi.mitigations.steering import can_steer, layer_windows, sense_steering
from alignblind_mi.models.configs import depth_of
from alignblind_mi.models.edits import UNTREATED, Treatment
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.progress import Advance
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.stimuli.prompts import (
    KINDS,
    Design,
    Kind,
    Prompt,
    behaviour_prompts,
    implicit_prompts,
    interpretation_prompt,
    worded_assignments,
)
from alignblind_mi.stimuli.protocol import PROTOCOLS
from alignblind_mi.studies.config import StudyConfig, asked_concept
from alignblind_mi.studies.part import Load, Part, Treat, Work
from alignblind_mi.studies.qualifying import competence_work, qualifying_parts

log = logging.getLogger(__name__)
VIEWS = ("attention", "tokens")
NOISE, MATCHED_NOISE = "noise", "matched noise"    # how the parts of noise begin; what their rows are steered towards (no control's name)
INSTRUMENTS = ("selfie", "lens", "probes")    # beside the patchscope
SHALLOW, QUICK_LAYERS, QUICK_TEXTS = 8, 4, 3    # layers up to which a quick study reads all; those of a deeper model, and of its texts
QUALIFICATION = "qualification"    # what a study can be run without, by name
MEASURING, MATCHING = 4, 8    # runs of some prompts to measure what a treatment does; to match a draw of noise and to measure it


def lora_groups(config: StudyConfig) -> list[str]:
    """The layer groups that this study trains; none where there is nothing to train awareness on."""
    if not trainable(load_concept(config.concept), config.cue):
        return []
    return ["early", "late"] if config.quick else list(LAYER_GROUPS)


def study_parts(config: StudyConfig, concept: Concept, *, skip: Sequence[str] = ()) -> Iterator[Part]:
    """All parts in the order in which they are computed: one model after the other, first what qualifies it; adapters last.

    A concept or cue without senses has behaviour (and the view of attention) alone. skip: "qualification" leaves out what qualifies.
    Errors: ModelError for anything else that is to be skipped.
    """
    concept, unqualified, n_layers = asked_concept(config, concept), skipped(skip), depth_of(config.aligned)
    for role in ("base", "aligned"):
        asked = [*([] if unqualified else qualifying_parts(config, concept, role)), *observations(config, concept, role)]
        again = role == "aligned" and config.base == config.aligned    # one model in both places
        yield from (replace(part, same_as=part.name.replace("_aligned", "_base")) for part in asked) if again else asked
    if can_steer(concept, config.cue):
        yield from _steering(config, concept, n_layers)
    for group in lora_groups(config):
        treatment = Treatment(f"lora_{group}", adapter=f"lora_{group}", family="lora")
        yield _behaviour(config, concept, KINDS, f"lora_{group}", "aligned", True, partial(_same, treatment))
        yield Part(f"lora_{group}_awareness", "aligned", True, *_awareness(config, concept, "paper", partial(_same, treatment)),
                   config.target_layer)
        if not unqualified:
            yield Part(f"lora_{group}_competence", "aligned", True, *competence_work(config, concept, treatment))


def skipped(names: Sequence[str]) -> bool:
    """Whether the qualification is to be left out. Errors: ModelError for anything else that is to be skipped."""
    unknown = [name for name in names if name != QUALIFICATION]
    if unknown:
        raise ModelError(f"{unknown[0]!r} cannot be skipped. Known: {QUALIFICATION}.")
    return bool(names)


def _same(treatment: Treatment, model: HookedModel) -> Treatment:
    """A treatment that does not depend on the model."""
    return treatment


def observations(config: StudyConfig, concept: Concept, role: str) -> Iterator[Part]:
    """The parts that look at one untreated model, whose role in the study is `role` ("base", or any other name for the aligned one)."""
    yield _behaviour(config, concept, KINDS, f"behaviour_{role}", role)
    yield _behaviour(config, concept, KINDS, f"balanced_{role}", role, design="balanced")
    for reading in questions(concept, config.cue):
        work = _awareness(config, concept, reading, partial(_same, UNTREATED), possible_controls(concept))
        yield Part(f"awareness_{role}_{reading}", role, False, *work, config.target_layer)
    for name in instruments(concept, config.cue, config.selfie):
        yield Part(f"reading_{name}_{role}", role, False, *_instrument(config, concept, name),
                   config.target_layer if name == "selfie" else None)
    for name in view_names(concept, config.cue):
        yield Part(f"view_{name}_{role}", role, False, *_view(config, concept, name))


def _steering(config: StudyConfig, concept: Concept, n_layers: int) -> Iterator[Part]:
    """The sweep over all windows (implicit only) and, for the two windows that are compared, explicit answers and readings as well.

    Last, for each window, noise that does as much as the group sense there.
    """
    compared = [early_window(n_layers), late_window(n_layers)]
    windows = compared if config.quick else layer_windows(n_layers)
    for name in steering_names(concept):
        for window in windows:
            def treat(model: HookedModel, name: str = name, window: range = window) -> Treatment:
                return sense_steering(model, concept, config.cue, name, window, protocol=config.protocol)

            label = f"steering_{name}_{window[0]:02d}-{window[-1]:02d}"
            kinds: tuple[Kind, ...] = KINDS if window in compared else ("implicit",)
            yield _behaviour(config, concept, kinds, label, "aligned", False, treat)
            if window in compared:
                yield Part(f"{label}_awareness", "aligned", False, *_awareness(config, concept, "paper", treat), config.target_layer)
    for window in windows:
        yield Part(f"{NOISE}_{window[0]:02d}-{window[-1]:02d}", "aligned", False, *_noise(config, concept, window))


def _noise(config: StudyConfig, concept: Concept, window: range) -> Work:
    """Implicit answers under several draws of noise that displaces the stream as far as steering a window towards the group sense does.

    Each draw is asked of at most `NOISE_PAIRS` word pairs a category, so that all of them cost about as much as a control phrase.
    """
    pairs = min(NOISE_PAIRS, config.published_pairs or NOISE_PAIRS)
    few = implicit_prompts(concept, config.cue, design="published", seed=config.seed, max_word_pairs=pairs)

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        steered = sense_steering(model, concept, config.cue, concept.group_sense, window, protocol=config.protocol)
        asked = _asked(config, concept)
        drawn = noise_placebos(model, steered, asked, seed=config.seed)
        rows = with_effects(ask_under(model, concept, few, drawn, config.decoding, advance), treatment_effects(model, drawn, asked))
        return _with_treatment(rows, drawn[0]).assign(sense=MATCHED_NOISE)

    def loads() -> list[Load]:
        matching = Load(_asked(config, concept)[:SAMPLE], times=MATCHING * SEEDS, chat=config.chat)
        return [Load(few, config.decoding.max_new_tokens, SEEDS, config.chat), matching]
    return compute, loads


def _asked(config: StudyConfig, concept: Concept) -> list[Prompt]:
    """The prompts on which it is measured what treatments do."""
    return implicit_prompts(concept, config.cue, design="published", seed=config.seed, max_word_pairs=config.published_pairs)


def _behaviour(config: StudyConfig, concept: Concept, kinds: Sequence[Kind], name: str, role: str, adapters: bool = False,
               treat: Treat | None = None, design: Design = "published") -> Part:
    """Answers, and under a treatment what it does to the stream and to the next token as well."""
    pairs = config.published_pairs if design == "published" else config.balanced_pairs

    def piece(i: int, n: int, model: HookedModel, advance: Advance) -> pd.DataFrame:
        treatment = UNTREATED if treat is None else treat(model)
        prompts = [prompt for kind in kinds for prompt in behaviour_prompts(concept, config.cue, kind, design=design, seed=config.seed,
                                                                            max_word_pairs=pairs)]
        some = prompts[len(prompts) * i // n:len(prompts) * (i + 1) // n]
        rows = ask(model.under(treatment), concept, some, config.decoding, advance)
        if treat is not None:
            rows = with_effects(rows, treatment_effects(model, treatment, _asked(config, concept), sites=identifier_sites(model.n_layers)))
        return _with_treatment(rows, treatment)

    def loads() -> list[Load]:
        found = []
        for kind in kinds:
            prompts = behaviour_prompts(concept, config.cue, kind, design=design, seed=config.seed, max_word_pairs=pairs)
            scored = [worded_assignments(concept, prompt) for prompt in prompts] if kind == "implicit" else []
            found.append(Load(prompts, config.decoding.max_new_tokens, chat=config.chat,
                              scored=[[text for both in each for text in both] for each in scored]))
        if treat is not None:
            found.append(Load(_asked(config, concept)[:SAMPLE], times=MEASURING, chat=config.chat))
        return found
    return Part(name, role, adapters, partial(piece, 0, 1), loads, piece=piece)


def _awareness(config: StudyConfig, concept: Concept, reading: str, treat: Treat, controls: Sequence[str] = ()) -> Work:
    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        treatment = treat(model)
        rows = measure_awareness(model.under(treatment), concept, config.cue, reading=reading, target_layer=config.target_layer,
                                 layers=quick_layers(config, model.n_layers), controls=controls, seed=config.seed)
        return _with_treatment(rows, treatment)

    def loads() -> list[Load]:
        sources = reading_sources(concept, config.cue, seed=config.seed)
        sources += control_sources(concept, sources, controls, seed=config.seed)
        layers = len(quick_layers(config, depth_of(config.aligned)))
        question = interpretation_prompt(concept.interpretation(reading))
        return [Load([source.prompt for source in sources], chat=config.chat), Load([question], times=len(sources) * layers)]
    return compute, loads


def quick_layers(config: StudyConfig, n_layers: int, most: int = QUICK_LAYERS) -> list[int]:
    """The layers that are read: all of them; of a deep model in a quick study a few, evenly spaced, the first and the last among them."""
    return thinned(range(n_layers), most) if thins(config, n_layers) else list(range(n_layers))


def thins(config: StudyConfig, n_layers: int) -> bool:
    """Whether readings are thinned: a quick study of a deep model reads few layers, texts with few controls, probes without random
    weights."""
    return config.quick and n_layers > SHALLOW


def questions(concept: Concept, cue: str) -> list[str]:
    """The interpretation questions that a study asks of a cue's identifiers; none where they have no senses."""
    return list(concept.interpretations) if concept.has_senses(cue) else []


def view_names(concept: Concept, cue: str) -> list[str]:
    """The views of one prompt: attention, and (of a cue with senses) the lens by token."""
    return [name for name in VIEWS if name == "attention" or concept.has_senses(cue)]


def instruments(concept: Concept, cue: str, selfie: str) -> list[str]:
    """The instruments beside the patchscope that a concept has what is needed for: open readings, the lens, probes."""
    if not concept.has_senses(cue):
        return []
    lexicons = all(sense.lexicon for sense in concept.senses.values())
    contexts = {concept.group_sense, concept.other_sense} <= set(concept.contexts)
    there = {"selfie": selfie in concept.selfie and lexicons, "lens": True, "probes": contexts}
    return [name for name in INSTRUMENTS if there[name]]


def _instrument(config: StudyConfig, concept: Concept, name: str) -> Work:
    """An instrument on the untreated model, with its controls; of probes, their accuracy stands beside their readings."""
    def controls(n_layers: int) -> list[str]:
        return [one for one in possible_controls(concept) if name != "selfie" or one in NEGATIVE_CONTROLS or not thins(config, n_layers)]

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        held = controls(model.n_layers)
        if name == "selfie":
            return measure_selfie(model, concept, config.cue, layers=quick_layers(config, model.n_layers, QUICK_TEXTS), controls=held,
                                  **selfie_options(config))
        layers = quick_layers(config, model.n_layers)
        if name == "lens":
            return measure_lens(model, concept, config.cue, layers=layers, controls=held, seed=config.seed)
        return with_accuracy(measure_probes(model, concept, config.cue, layers=layers, controls=held, seed=config.seed,
                                            random_weights=False if thins(config, model.n_layers) else None))

    def loads() -> list[Load]:
        how = {key: selfie_options(config)[key] for key in ("protocol", "max_word_pairs") if name == "selfie"}
        sources = reading_sources(concept, config.cue, seed=config.seed, **how)
        sources += control_sources(concept, sources, controls(depth_of(config.aligned)), seed=config.seed)
        found = [Load([source.prompt for source in sources], chat=config.chat)]
        if name == "selfie":
            target = interpretation_prompt(concept.selfie_prompt(config.selfie))
            found.append(Load([target], SELFIE_TOKENS, len(sources) * len(quick_layers(config, depth_of(config.aligned), QUICK_TEXTS))))
        if name == "probes":
            found.append(Load(context_prompts(concept, config.cue, "train") + context_prompts(concept, config.cue, "test"),
                              chat=config.chat))
        return found
    return compute, loads


def selfie_options(config: StudyConfig) -> dict[str, Any]:
    """How a study takes open readings: arguments of `measure_selfie`."""
    how = PROTOCOLS[config.protocol]
    fewer = 1 if config.quick else config.published_pairs or how.word_pairs
    pairs = min(fewer, how.word_pairs) if how.every_mention else how.word_pairs    # first mentions stand before the words
    return {"prompt": config.selfie, "target_layer": config.target_layer, "temperature": config.decoding.temperature, "seed": config.seed,
            "protocol": config.protocol, "max_word_pairs": pairs}


def _view(config: StudyConfig, concept: Concept, name: str) -> Work:
    """What the report shows of one prompt: attention in the first layer of the early window, or the lens at every token and layer."""
    prompt = implicit_prompts(concept, config.cue, design="published", seed=config.seed)[0]

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        if name == "tokens":
            group, other = concept.both_senses(config.cue)
            words = [other.word, group.word]
            return lens_contrast(logit_lens(model, [prompt], words), *words)
        try:
            return attention_rows(model, prompt, early_window(model.n_layers)[0])
        except ModelError as error:    # the study does not need transformer-lens for anything else
            log.warning("no view of attention: %s", error)
            return pd.DataFrame({"layer": pd.Series(dtype=int)})

    return compute, lambda: [Load([prompt], chat=config.chat)]


def _with_treatment(rows: pd.DataFrame, treatment: Treatment) -> pd.DataFrame:
    """The rows with what the treatment was: its family, the sense steered towards and the layers (empty without any)."""
    return rows.assign(family=treatment.family, sense=treatment.details.get("sense", ""), layers=treatment.details.get("layers", ""))
