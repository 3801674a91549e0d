"""The parts of a study: which there are, which model each needs, how its rows are computed. Does NOT hold models or folders."""

import logging
from collections.abc import Callable, Iterator, Sequence
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
from alignblind_mi.mitigations.lora import awareness_examples, trainable
from alignblind_mi.mitigations.placebos import NOISE_PAIRS, SAMPLE, noise_placebos, treatment_effects, with_effects
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
)
from alignblind_mi.stimuli.protocol import PROTOCOLS
from alignblind_mi.studies.config import StudyConfig, asked_concept
from alignblind_mi.studies.part import TRAINING_COST, Load, Once, Part, Treat, Work
from alignblind_mi.studies.qualifying import competence_work, injected, qualifying_parts

log = logging.getLogger(__name__)
VIEWS = ("attention", "tokens")
NOISE, MATCHED_NOISE = "noise", "matched noise"    # how the parts of noise begin; what their rows are steered towards (no control's name)
INSTRUMENTS = ("selfie", "lens", "probes")    # beside the patchscope
QUALIFICATION = "qualification"    # what a study can be run without, by name
MEASURING, MATCHING = 4, 8    # runs of some prompts to measure what a treatment does; to match a draw of noise and to measure it


def lora_groups(config: StudyConfig) -> list[str]:
    """The layer groups that this study trains; none where there is nothing to train awareness on."""
    if not trainable(load_concept(config.concept), config.cue):
        return []
    return config.taken().groups


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


def training_loads(config: StudyConfig, concept: Concept) -> list[Load]:
    """What the adapters of a study are trained on: none where none are."""
    return [training_load(concept, config.lora.epochs * len(lora_groups(config)))] if lora_groups(config) else []


def training_load(concept: Concept, epochs: int) -> Load:
    """Passes over the awareness sentences."""
    return Load([Prompt(one.text + one.completion) for one in awareness_examples(concept)], times=TRAINING_COST * epochs)


def skipped(names: Sequence[str]) -> bool:
    """Whether the qualification is to be left out. Errors: ModelError for anything else that is to be skipped."""
    unknown = [name for name in names if name != QUALIFICATION]
    if unknown:
        raise ModelError(f"{unknown[0]!r} cannot be skipped. Known: {QUALIFICATION}.")
    return bool(names)


def _same(treatment: Treatment, model: HookedModel) -> Treatment:
    """A treatment that does not depend on the model."""
    return treatment


def observations(config: StudyConfig, concept: Concept, role: str, *, texts: bool = False) -> Iterator[Part]:
    """The parts that look at one untreated model, whose role in the study is `role` ("base", or any other name for the aligned one).

    texts: with texts at one layer at least, where what was chosen to fit has none.
    """
    yield _behaviour(config, concept, KINDS, f"behaviour_{role}", role)
    yield _behaviour(config, concept, KINDS, f"balanced_{role}", role, design="balanced")
    for reading in questions(concept, config.cue):
        work = _awareness(config, concept, reading, partial(_same, UNTREATED), controls_of(config, concept))
        yield Part(f"awareness_{role}_{reading}", role, False, *work, config.target_layer)
    for name in instruments(concept, config.cue, config.selfie, texts=texts or writes_texts(config)):
        yield Part(f"reading_{name}_{role}", role, False, *_instrument(config, concept, name),
                   config.target_layer if name == "selfie" else None)
    for name in view_names(concept, config.cue):
        yield Part(f"view_{name}_{role}", role, False, *_view(config, concept, name))


def _steering(config: StudyConfig, concept: Concept, n_layers: int) -> Iterator[Part]:
    """The sweep over all windows (implicit only) and, for the two windows that are compared, explicit answers and readings as well.

    Last, for each window, noise that does as much as the group sense there.
    """
    compared = [early_window(n_layers), late_window(n_layers)]
    windows = layer_windows(n_layers) if config.taken(n_layers).every else compared
    noise = Once(partial(_noise_loads, config, concept))
    loads = {kinds: Once(partial(_answer_loads, config, concept, kinds, "published", True)) for kinds in (KINDS, ("implicit",))}
    for name in steering_names(concept):
        for window in windows:
            def treat(model: HookedModel, name: str = name, window: range = window) -> Treatment:
                return sense_steering(model, concept, config.cue, name, window, protocol=config.protocol)

            label = f"steering_{name}_{window[0]:02d}-{window[-1]:02d}"
            kinds: tuple[Kind, ...] = KINDS if window in compared else ("implicit",)
            yield _behaviour(config, concept, kinds, label, "aligned", False, treat, loads=loads[kinds])
            if window in compared:
                yield Part(f"{label}_awareness", "aligned", False, *_awareness(config, concept, "paper", treat), config.target_layer)
    for window in windows:
        yield Part(f"{NOISE}_{window[0]:02d}-{window[-1]:02d}", "aligned", False, _noise(config, concept, window), noise)


def _noise(config: StudyConfig, concept: Concept, window: range) -> Callable[[HookedModel, Advance], pd.DataFrame]:
    """Implicit answers under several draws of noise that displaces the stream as far as steering a window towards the group sense does.

    Each draw is asked of at most `NOISE_PAIRS` word pairs a category, so that all of them cost about as much as a control phrase.
    """

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        steered = sense_steering(model, concept, config.cue, concept.group_sense, window, protocol=config.protocol)
        asked = _asked(config, concept)
        drawn = noise_placebos(model, steered, asked, n=config.taken(model.n_layers).draws, seed=config.seed)
        rows = with_effects(ask_under(model, concept, _few(config, concept), drawn, config.decoding, advance),
                            treatment_effects(model, drawn, asked))
        return _with_treatment(rows, drawn[0]).assign(sense=MATCHED_NOISE)

    return compute


def _noise_loads(config: StudyConfig, concept: Concept) -> list[Load]:
    draws = config.taken().draws
    return [Load(_few(config, concept), config.decoding.max_new_tokens, draws, config.chat),
            Load(_asked(config, concept)[:SAMPLE], times=MATCHING * draws, chat=config.chat)]


def _few(config: StudyConfig, concept: Concept) -> list[Prompt]:
    """What is asked under noise."""
    pairs = min(NOISE_PAIRS, config.word_pairs("published") or NOISE_PAIRS)
    return implicit_prompts(concept, config.cue, design="published", seed=config.seed, max_word_pairs=pairs)


def _asked(config: StudyConfig, concept: Concept) -> list[Prompt]:
    """The prompts on which it is measured what treatments do."""
    return implicit_prompts(concept, config.cue, design="published", seed=config.seed,
                            max_word_pairs=config.word_pairs("published"))


def _behaviour(config: StudyConfig, concept: Concept, kinds: Sequence[Kind], name: str, role: str, adapters: bool = False,
               treat: Treat | None = None, design: Design = "published", loads: Callable[[], list[Load]] | None = None) -> Part:
    """Answers, and under a treatment what it does to the stream and to the next token as well; `loads`: those of another treatment."""
    pairs = config.word_pairs(design)

    def piece(i: int, n: int, model: HookedModel, advance: Advance) -> pd.DataFrame:
        treatment = UNTREATED if treat is None else treat(model)
        prompts = [prompt for kind in kinds for prompt in behaviour_prompts(concept, config.cue, kind, design=design, seed=config.seed,
                                                                            max_word_pairs=pairs)]
        some = prompts[len(prompts) * i // n:len(prompts) * (i + 1) // n]
        rows = ask(model.under(treatment), concept, some, config.decoding, advance)
        if treat is not None:
            rows = with_effects(rows, treatment_effects(model, treatment, _asked(config, concept), sites=identifier_sites(model.n_layers)))
        return _with_treatment(rows, treatment)

    asks = loads or partial(_answer_loads, config, concept, kinds, design, treat is not None)
    return Part(name, role, adapters, partial(piece, 0, 1), asks, piece=piece)


def _answer_loads(config: StudyConfig, concept: Concept, kinds: Sequence[Kind], design: Design, treated: bool) -> list[Load]:
    asked = [behaviour_prompts(concept, config.cue, kind, design=design, seed=config.seed, max_word_pairs=config.word_pairs(design))
             for kind in kinds]
    found = [Load.of_answers(concept, prompts, config.decoding.max_new_tokens, config.chat) for prompts in asked]
    if treated:
        found.append(Load(_asked(config, concept)[:SAMPLE], times=MEASURING, chat=config.chat))
    return found


def _awareness(config: StudyConfig, concept: Concept, reading: str, treat: Treat, controls: Sequence[str] = ()) -> Work:
    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        treatment = treat(model)
        rows = measure_awareness(model.under(treatment), concept, config.cue, reading=reading, target_layer=config.target_layer,
                                 layers=read_layers(config, model.n_layers), controls=controls, seed=config.seed)
        return _with_treatment(rows, treatment)

    def loads() -> list[Load]:
        sources = reading_sources(concept, config.cue, seed=config.seed)
        sources += control_sources(concept, sources, controls, seed=config.seed)
        layers = len(read_layers(config, depth_of(config.aligned)))
        question = interpretation_prompt(concept.interpretation(reading))
        return [Load([source.prompt for source in sources], chat=config.chat),
                Load([question], times=len(sources) * layers, written=injected(config))]
    return compute, loads


def read_layers(config: StudyConfig, n_layers: int) -> list[int]:
    """The layers that instruments read, evenly spaced where they are not all, the first and the last among them."""
    return thinned(range(n_layers), config.taken(n_layers).layers)


def text_layers(config: StudyConfig, n_layers: int) -> list[int]:
    """The layers of which texts are written: one at least, where they are asked for."""
    return thinned(range(n_layers), max(config.taken(n_layers).texts, 1))


def writes_texts(config: StudyConfig) -> bool:
    """Whether a study that names no instruments has texts written."""
    return config.taken().texts > 0


def controls_of(config: StudyConfig, concept: Concept) -> list[str]:
    """The controls of readings: those that the concept has what is needed for, or the negative ones alone."""
    every = config.taken().controls
    return [name for name in possible_controls(concept) if every or name in NEGATIVE_CONTROLS]


def questions(concept: Concept, cue: str) -> list[str]:
    """The interpretation questions that a study asks of a cue's identifiers; none where they have no senses."""
    return list(concept.interpretations) if concept.has_senses(cue) else []


def view_names(concept: Concept, cue: str) -> list[str]:
    """The views of one prompt: attention, and (of a cue with senses) the lens by token."""
    return [name for name in VIEWS if name == "attention" or concept.has_senses(cue)]


def instruments(concept: Concept, cue: str, selfie: str, *, texts: bool = True) -> list[str]:
    """The instruments beside the patchscope that a concept has what is needed for: open readings (unless no `texts` are written), the
    lens, probes."""
    if not concept.has_senses(cue):
        return []
    lexicons = all(sense.lexicon for sense in concept.senses.values())
    contexts = {concept.group_sense, concept.other_sense} <= set(concept.contexts)
    there = {"selfie": texts and selfie in concept.selfie and lexicons, "lens": True, "probes": contexts}
    return [name for name in INSTRUMENTS if there[name]]


def _instrument(config: StudyConfig, concept: Concept, name: str) -> Work:
    """An instrument on the untreated model, with its controls; of probes, their accuracy stands beside their readings."""
    def held(n_layers: int) -> list[str]:
        every = controls_of(config, concept)
        return [one for one in every if name != "selfie" or one in NEGATIVE_CONTROLS or config.taken(n_layers).dear]

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        controls = held(model.n_layers)
        if name == "selfie":
            return measure_selfie(model, concept, config.cue, layers=text_layers(config, model.n_layers), controls=controls,
                                  **selfie_options(config))
        layers = read_layers(config, model.n_layers)
        if name == "lens":
            return measure_lens(model, concept, config.cue, layers=layers, controls=controls, seed=config.seed)
        return with_accuracy(measure_probes(model, concept, config.cue, layers=layers, controls=controls, seed=config.seed,
                                            random_weights=None if config.taken(model.n_layers).dear else False))

    def loads() -> list[Load]:
        how = {key: selfie_options(config)[key] for key in ("protocol", "max_word_pairs") if name == "selfie"}
        sources = reading_sources(concept, config.cue, seed=config.seed, **how)
        sources += control_sources(concept, sources, held(depth_of(config.aligned)), seed=config.seed)
        found = [Load([source.prompt for source in sources], chat=config.chat)]
        if name == "selfie":
            target = interpretation_prompt(concept.selfie_prompt(config.selfie))
            found.append(Load([target], SELFIE_TOKENS, len(sources) * len(text_layers(config, depth_of(config.aligned))),
                              written=injected(config)))
        if name == "probes":
            found.append(Load(context_prompts(concept, config.cue, "train") + context_prompts(concept, config.cue, "test"),
                              chat=config.chat))
        return found
    return compute, loads


def selfie_options(config: StudyConfig) -> dict[str, Any]:
    """How a study takes open readings: arguments of `measure_selfie`."""
    how = PROTOCOLS[config.protocol]
    fewer = 1 if config.quick else config.word_pairs("published") or how.word_pairs
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
