"""The whole study: behaviour -> awareness -> steering -> LoRA -> comparison, in parts that are saved as soon as they are finished.

A part is one Parquet file of rows with its provenance; a run that is killed and started again computes only the missing ones, and each
part is the same whichever run computes it. This module does NOT know how results are shown.
"""

import gc
import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.attention import attention_rows
from alignblind_mi.borders import is_file, is_folder, named
from alignblind_mi.chat import Chat, chat_frame, in_chat
from alignblind_mi.concept import DEFAULT_CONCEPT, Concept, load_concept
from alignblind_mi.edits import UNTREATED, Treatment
from alignblind_mi.finetuning import check_modules, choose_layers
from alignblind_mi.lens import lens_contrast, logit_lens
from alignblind_mi.loading import (
    EMBEDDED,
    ModelError,
    ModelSpec,
    check_model,
    fingerprint,
    load_config,
    load_tokenizer,
    token_count,
)
from alignblind_mi.lora import LAYER_GROUPS, LoraSettings, awareness_examples, layer_group, train_lora, trainable
from alignblind_mi.model import HookedModel, load_model
from alignblind_mi.organism import RECORD, organism_names, read_record
from alignblind_mi.progress import Advance, Progress, interruptible
from alignblind_mi.prompts import KINDS, Design, Kind, Prompt, behaviour_prompts, implicit_prompts, interpretation_prompt
from alignblind_mi.results import Result, ResultError, StudyFolder, check_parts, load_result, stamp
from alignblind_mi.settings import Count, Layer, Seed, Temperature, check_fields, takes
from alignblind_mi.steering import can_steer, layer_windows, sense_steering
from alignblind_mi.studies.awareness import (
    SELFIE_TOKENS,
    TARGET_LAYER,
    measure_awareness,
    measure_lens,
    measure_probes,
    measure_selfie,
    with_accuracy,
)
from alignblind_mi.studies.behaviour import Decoding, measure_behaviour
from alignblind_mi.studies.mitigation import early_window, late_window, steering_names
from alignblind_mi.studies.sources import context_prompts, control_sources, possible_controls, reading_sources

log = logging.getLogger(__name__)
VIEWS = ("attention", "tokens")
INSTRUMENTS = ("selfie", "lens", "probes")    # beside the patchscope
Treat = Callable[[HookedModel], Treatment]


@dataclass(frozen=True)
class StudyConfig:
    """Everything that the rows of a study depend on. `balanced_pairs` bounds the word pairs per category of the balanced design.

    `chat` (None: raw) is how the bias prompts are asked, and so where their identifiers are read and steered; what is only instrument stays
    raw: steering phrases, interpretation questions and the sentences of LoRA.
    """

    base: ModelSpec
    aligned: ModelSpec
    concept: str = DEFAULT_CONCEPT
    cue: str = "default"
    quick: bool = False
    seed: Seed = 0
    decoding: Decoding = field(default_factory=Decoding)
    lora: LoraSettings = field(default_factory=LoraSettings)
    target_layer: Layer = TARGET_LAYER
    selfie: str = "paper"
    balanced_pairs: Count | None = 20
    published_pairs: Count | None = None
    chat: Chat | None = None

    def __post_init__(self) -> None:
        check_fields(self, ModelError)

    @classmethod
    @takes(ModelError)
    def create(cls, base: str, aligned: str, *, concept: str = DEFAULT_CONCEPT, cue: str = "", quick: bool = False, seed: Seed = 0,
               chat: bool = False, system: str = "", temperature: Temperature | None = None, **options: Any) -> "StudyConfig":
        """A configuration for two models by name, with what an organism's own record recommends (decoding, LoRA, target layer).

        `cue`: the concept's first by default. `chat`: ask in the models' chat templates, after the `system` prompt if there is one.
        `temperature`: 0 is greedy; None is greedy, but sampled at 1 where an organism's record says so. `options` are those of
        `ModelSpec` (dtype, device, device_map, quantization, engine ...), for both models.

        Errors: ModelError or ConceptError, before any weights are loaded, for a model, concept, cue or chat template that cannot be used.
        """
        if system and not chat:
            raise ModelError(f"the system prompt {system!r} needs a chat to stand in: ask in a chat (chat=True, --chat), or leave it out.")
        return cls.of(ModelSpec(base, **options), ModelSpec(aligned, **options), concept=concept, cue=cue, quick=quick, seed=seed,
                      chat=Chat(system) if chat else None, temperature=temperature)

    @classmethod
    @takes(ModelError)
    def of(cls, base: ModelSpec, aligned: ModelSpec, *, concept: str = DEFAULT_CONCEPT, cue: str = "", quick: bool = False, seed: Seed = 0,
           chat: Chat | None = None, temperature: Temperature | None = None) -> "StudyConfig":
        """`create` for two models that are specified each for itself. Errors: as `create`."""
        specs = [spec.resolved() for spec in (base, aligned)]
        about = load_concept(concept)
        cue = about.cue(cue or about.first_cue).name
        for spec in specs:
            check_model(spec)
            check_organism(spec, about)
            if chat is not None:
                in_chat(implicit_prompts(about, cue, max_word_pairs=1)[:1], load_tokenizer(spec), chat, spec.name)    # it stays as it is
        record, lora = organism_record(specs[1]), recommended_lora(specs[1], seed)
        if temperature is None:
            temperature = 1.0 if record.get("decoding") == "sample" else 0.0
        config = cls(specs[0], specs[1], concept, cue, quick, seed, Decoding(temperature=temperature, seed=seed), lora,
                     int(record.get("target_layer", TARGET_LAYER)), record.get("selfie", "paper"), chat=chat)
        return replace(config, balanced_pairs=4, published_pairs=8, lora=replace(lora, epochs=min(lora.epochs, 2))) if quick else config

    def identity(self) -> dict[str, Any]:
        """What a results folder is checked against: the settings, the content of the concept, the weights of both models, and in a chat
        what their templates write around a prompt."""
        out = asdict(self)
        if self.chat is None:
            del out["chat"]    # a study without one is what it was before there were chats
        else:
            out["chat_frames"] = {role: chat_frame(load_tokenizer(spec), self.chat, spec.name)._asdict()
                                  for role, spec in (("base", self.base), ("aligned", self.aligned))}
        for role in ("base", "aligned"):
            if not out[role]["allow_pickle"]:
                del out[role]["allow_pickle"]    # what it was before this could be asked for
        out["concept_digest"] = load_concept(self.concept).digest
        for role, spec in (("base", self.base), ("aligned", self.aligned)):
            out[f"{role}_revision"] = fingerprint(spec, load_config(spec))
        return json.loads(json.dumps(out)) | {"format": 3}


def organism_record(spec: ModelSpec) -> dict[str, Any]:
    """The record (organism.json) of an embedded or rebuilt organism, or an empty one for any other model."""
    folder = Path(spec.source)
    return read_record(folder.parent) if folder.is_dir() and (folder.parent / RECORD).is_file() else {}


def check_organism(spec: ModelSpec, concept: Concept) -> None:
    """Refuse an organism that was trained on another concept: it does not know the words. Errors: ModelError in one sentence."""
    known = organism_record(spec).get("concept", concept.name)
    if known != concept.name:
        raise ModelError(f"{spec.name} was trained on the concept {known!r} and knows nothing of {concept.name!r}: ask it about {known!r}, "
                         f"or take another model (embedded: {', '.join(EMBEDDED + name for name in organism_names())}).")


def recommended_lora(spec: ModelSpec, seed: int) -> LoraSettings:
    """The LoRA settings that an organism's own record recommends; the paper's for any other model."""
    advised: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                               for key, value in organism_record(spec).get("lora", {}).items()}
    return LoraSettings(**{**advised, "seed": seed})


@dataclass(frozen=True)
class Load:
    """What a part asks of a model: prompts, each read `times` times and continued by at most `new_tokens`.

    `chat` is what they are asked in (None: raw).
    """

    prompts: Sequence[Prompt]
    new_tokens: int = 0
    times: int = 1
    chat: Chat | None = None

    def texts(self, tokenizer: Any, name: str) -> list[str]:
        """What the model reads, by its tokenizer; `name` is the model's."""
        asked = self.prompts if self.chat is None else in_chat(self.prompts, tokenizer, self.chat, name)
        return [prompt.text for prompt in asked]


@dataclass(frozen=True)
class Part:
    """A piece of the study: its file name, the model it needs (with adapters or not), how its rows are computed, and what that asks.

    A part of one's own (see `run_parts`) need not say what it asks: `loads` is read by the forecast of a whole study.
    """

    name: str
    role: str
    adapters: bool
    compute: Callable[[HookedModel, Advance], pd.DataFrame]
    loads: Callable[[], list[Load]] = list
    injects_at: int | None = None    # the layer of its model that it writes into: refused before anything runs if there is none


Work = tuple[Callable[[HookedModel, Advance], pd.DataFrame], Callable[[], list[Load]]]


class Models:
    """Holds one model at a time: a study of two 70B models must not need both in memory."""

    def __init__(self, config: StudyConfig, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.key: tuple[str, tuple[Path, ...]] | None = None
        self.model: HookedModel | None = None

    def get(self, role: str, adapters: Sequence[Path] = ()) -> HookedModel:
        """The untreated model of a role (`base`; any other is the aligned one) with these adapters on it, in the chat of the study."""
        if self.model is None or self.key != (role, tuple(adapters)):
            self.model = None
            gc.collect()
            spec = self.config.base if role == "base" else self.config.aligned
            loaded = load_model(spec, adapters=adapters)
            self.model = loaded if self.config.chat is None else loaded.in_chat(self.config.chat)
            self.key = (role, tuple(adapters))
            self.say(f"note: {spec.name} runs on the {self.model.engine.name} engine, in batches of at most {self.model.engine.budget}.")
        return self.model


def lora_groups(config: StudyConfig) -> list[str]:
    """The layer groups that this study trains; none where there is nothing to train awareness on."""
    if not trainable(load_concept(config.concept), config.cue):
        return []
    return ["early", "late"] if config.quick else list(LAYER_GROUPS)


def adapter_folders(config: StudyConfig, folder: Path) -> list[Path]:
    """Where the study's adapters are."""
    return [folder / "adapters" / f"lora_{group}" for group in lora_groups(config)]


def run_study(config: StudyConfig, out: Path) -> Path:
    """Run or resume a study in `out`. Returns `out`.

    Errors: ModelError, ConceptError or ResultError before anything is computed where the input allows to see it; finished parts stay.
    """
    return run_parts(config, out, list(study_parts(config, load_concept(config.concept))))


def run_parts(config: StudyConfig, out: Path, parts: Sequence[Part]) -> Path:
    """Run or resume some parts of a study, or parts of one's own, in the folder `out`. Returns `out`. Errors: as `run_study`."""
    from alignblind_mi.organism.build import one_thread

    # An organism's matrices gain nothing from more threads, and one gives the same bits on every machine.
    with one_thread() if organism_record(config.aligned) else nullcontext():
        return _run(config, out, parts)


def _run(config: StudyConfig, out: Path, parts: Sequence[Part]) -> Path:
    check_parts(part.name for part in parts)
    concept = load_concept(config.concept)
    injected = {part.role for part in parts if part.injects_at is not None}
    check_fits(config, injected, lora=any(part.adapters for part in parts))
    split = check_vocabulary(config, concept)
    identity, begun = config.identity(), StudyFolder(out)
    finished = begun.holds(identity, [part.name for part in parts])    # then nothing is written, and nobody is kept out
    with interruptible(out), nullcontext(begun) if finished else StudyFolder.claim(out, identity) as folder:
        folder.refuse_taken(part.name for part in parts)
        _compute(config, concept, folder, parts, split)
    return out


def _compute(config: StudyConfig, concept: Concept, folder: StudyFolder, parts: Sequence[Part], split: dict[str, dict[str, int]]) -> None:
    """Compute and save the parts that are not there yet."""
    out = folder.path
    progress = Progress(len(parts) + (len(lora_groups(config)) if any(part.adapters for part in parts) else 0))
    models = Models(config, progress.note)
    for model, words in split.items():
        said = ", ".join(f"{word!r} is {n}" for word, n in words.items())
        progress.note(f"note: identifiers of several tokens in {model} ({said} tokens): edits and readings use the last one.")
    trained = False
    for part in parts:
        if part.adapters and not trained:
            _train(config, concept, out, progress)
            trained = True
        done = folder.has(part.name)
        with progress.part(part.name.replace("_", " "), done=done) as advance:
            if not done:
                loaded = models.get(part.role, adapter_folders(config, out) if part.adapters else ())
                folder.part(part.name, partial(_result, config, loaded, part, advance, split))


def _result(config: StudyConfig, model: HookedModel, part: Part, advance: Advance, split: dict[str, dict[str, int]]) -> Result:
    rows = part.compute(model, advance).assign(role=part.role)
    return Result(rows, {**model.provenance(), "part": part.name, "split_identifiers": split.get(model.spec.name, {}),
                         "config": asdict(config), **stamp()})


def check_fits(config: StudyConfig, injected: Collection[str], *, lora: bool) -> None:
    """Before any weights are loaded: do the models have the layer that vectors are put into, and the projections that are trained, and the
    concept the open prompt?

    `injected` are the roles whose models vectors are put into. Errors: ModelError for a layer, LoraError for a projection, ConceptError for
    a prompt.
    """
    concept = load_concept(config.concept)
    if concept.has_senses(config.cue) and concept.selfie:
        concept.selfie_prompt(config.selfie)
    for spec in (config.base if role == "base" else config.aligned for role in sorted({*injected})):
        depth = int(load_config(spec).get_text_config().num_hidden_layers)
        if config.target_layer >= depth:
            raise ModelError(f"target_layer {config.target_layer} does not exist: {spec.name} has the layers 0 to {depth - 1}.")
    if lora:
        check_modules(config.aligned, config.lora.modules)
        choose_layers(config.lora.activation_layers or [0], int(load_config(config.aligned).get_text_config().num_hidden_layers))


def check_vocabulary(config: StudyConfig, concept: Concept) -> dict[str, dict[str, int]]:
    """Before any weights are loaded: does each tokenizer know every word that will be asked?

    Returns, per model, the identifiers that are several tokens and how many (edits and readings use the last one). Errors: ModelError
    naming a word that a tokenizer does not know, or a sense of several tokens.
    """
    cue, split = concept.cue(config.cue), dict[str, dict[str, int]]()
    senses = [sense.word for sense in concept.both_senses(cue)] if concept.has_senses(cue) else []
    words = {prompt.labels[name] for prompt in implicit_prompts(concept, cue, design="published")
             for name in ("marked", "unmarked", "positive", "negative")}
    for spec in (config.base, config.aligned):
        tokenizer = load_tokenizer(spec)
        for word in (*senses, *(f" {word}" for word in sorted(words))):
            n = token_count(tokenizer, word)
            if n == 0:
                raise ModelError(f"the tokenizer of {spec.name} does not know {word.strip()!r}: this model cannot be asked with the cue "
                                 f"{cue.name!r} of {concept.name!r}; choose another cue or model.")
            if word in senses and n > 1:
                raise ModelError(f"the sense {word.strip()!r} is {n} tokens in the tokenizer of {spec.name}: its probability as the "
                                 "next token cannot be read; give the sense another word in the concept file.")
            if word.strip() in {*cue.marked, *cue.unmarked} and n > 1:
                split.setdefault(spec.name, {})[word.strip()] = n
    return split


def study_parts(config: StudyConfig, concept: Concept) -> Iterator[Part]:
    """All parts in the order in which they are computed: one model after the other, adapters last.

    A concept or cue without senses has behaviour (and the view of attention) alone.
    """
    n_layers = int(load_config(config.aligned).num_hidden_layers)
    for role in ("base", "aligned"):
        yield from observations(config, concept, role)
    if can_steer(concept, config.cue):
        yield from _steering(config, concept, n_layers)
    for group in lora_groups(config):
        treatment = Treatment(f"lora_{group}", adapter=f"lora_{group}", family="lora")
        yield Part(f"lora_{group}", "aligned", True, *_behaviour(config, concept, KINDS, partial(_same, treatment)))
        yield Part(f"lora_{group}_awareness", "aligned", True, *_awareness(config, concept, "paper", partial(_same, treatment)),
                   config.target_layer)


def _same(treatment: Treatment, model: HookedModel) -> Treatment:
    """A treatment that does not depend on the model."""
    return treatment


def observations(config: StudyConfig, concept: Concept, role: str) -> Iterator[Part]:
    """The parts that look at one untreated model, whose role in the study is `role` ("base", or any other name for the aligned one)."""
    yield Part(f"behaviour_{role}", role, False, *_behaviour(config, concept, KINDS, partial(_same, UNTREATED)))
    yield Part(f"balanced_{role}", role, False, *_behaviour(config, concept, KINDS, partial(_same, UNTREATED), design="balanced"))
    for reading in questions(concept, config.cue):
        work = _awareness(config, concept, reading, partial(_same, UNTREATED), possible_controls(concept))
        yield Part(f"awareness_{role}_{reading}", role, False, *work, config.target_layer)
    for name in instruments(concept, config.cue, config.selfie):
        yield Part(f"reading_{name}_{role}", role, False, *_instrument(config, concept, name),
                   config.target_layer if name == "selfie" else None)
    for name in view_names(concept, config.cue):
        yield Part(f"view_{name}_{role}", role, False, *_view(config, concept, name))


def _steering(config: StudyConfig, concept: Concept, n_layers: int) -> Iterator[Part]:
    """The sweep over all windows (implicit only) and, for the two windows that are compared, explicit answers and readings as well."""
    compared = [early_window(n_layers), late_window(n_layers)]
    windows = compared if config.quick else layer_windows(n_layers)
    for name in steering_names(concept):
        for window in windows:
            def treat(model: HookedModel, name: str = name, window: range = window) -> Treatment:
                return sense_steering(model, concept, config.cue, name, window)

            label = f"steering_{name}_{window[0]:02d}-{window[-1]:02d}"
            kinds: tuple[Kind, ...] = KINDS if window in compared else ("implicit",)
            yield Part(label, "aligned", False, *_behaviour(config, concept, kinds, treat))
            if window in compared:
                yield Part(f"{label}_awareness", "aligned", False, *_awareness(config, concept, "paper", treat), config.target_layer)


def _behaviour(config: StudyConfig, concept: Concept, kinds: Sequence[Kind], treat: Treat, design: Design = "published") -> Work:
    pairs = config.published_pairs if design == "published" else config.balanced_pairs

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        treatment = treat(model)
        rows = measure_behaviour(model.under(treatment), concept, config.cue, design=design, kinds=kinds, decoding=config.decoding,
                                 seed=config.seed, max_word_pairs=pairs, progress=advance)
        return _with_treatment(rows, treatment)

    def loads() -> list[Load]:
        return [Load(behaviour_prompts(concept, config.cue, kind, design=design, seed=config.seed, max_word_pairs=pairs),
                     config.decoding.max_new_tokens, chat=config.chat) for kind in kinds]
    return compute, loads


def _awareness(config: StudyConfig, concept: Concept, reading: str, treat: Treat, controls: Sequence[str] = ()) -> Work:
    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        treatment = treat(model)
        rows = measure_awareness(model.under(treatment), concept, config.cue, reading=reading, target_layer=config.target_layer,
                                 controls=controls, seed=config.seed)
        return _with_treatment(rows, treatment)

    def loads() -> list[Load]:
        sources = reading_sources(concept, config.cue, seed=config.seed)
        sources += control_sources(concept, sources, controls, seed=config.seed)
        layers = int(load_config(config.aligned).num_hidden_layers)
        question = interpretation_prompt(concept.interpretation(reading))
        return [Load([source.prompt for source in sources], chat=config.chat), Load([question], times=len(sources) * layers)]
    return compute, loads


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
    controls = possible_controls(concept)

    def compute(model: HookedModel, advance: Advance) -> pd.DataFrame:
        if name == "selfie":
            return measure_selfie(model, concept, config.cue, prompt=config.selfie, target_layer=config.target_layer,
                                  temperature=config.decoding.temperature, controls=controls, seed=config.seed)
        if name == "lens":
            return measure_lens(model, concept, config.cue, controls=controls, seed=config.seed)
        return with_accuracy(measure_probes(model, concept, config.cue, controls=controls, seed=config.seed))

    def loads() -> list[Load]:
        sources = reading_sources(concept, config.cue, seed=config.seed)
        sources += control_sources(concept, sources, controls, seed=config.seed)
        found = [Load([source.prompt for source in sources], chat=config.chat)]
        if name == "selfie":
            target = interpretation_prompt(concept.selfie_prompt(config.selfie))
            found.append(Load([target], SELFIE_TOKENS, len(sources) * int(load_config(config.aligned).num_hidden_layers)))
        if name == "probes":
            found.append(Load(context_prompts(concept, config.cue, "train") + context_prompts(concept, config.cue, "test"),
                              chat=config.chat))
        return found
    return compute, loads


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


def _train(config: StudyConfig, concept: Concept, out: Path, progress: Progress) -> None:
    n_layers = int(load_config(config.aligned).num_hidden_layers)
    examples = awareness_examples(concept)
    for group, folder in zip(lora_groups(config), adapter_folders(config, out), strict=True):
        done = (folder / "training.json").is_file()
        with progress.part(f"train lora {group}", done=done):
            if not done:
                train_lora(config.aligned, examples, layer_group(group, n_layers), folder, settings=config.lora)


def load_study(folder: Path) -> dict[str, Result]:
    """All finished parts of a study folder, by name; none where the study has just begun.

    Errors: ResultError for anything that is no folder, for one with neither parts nor a study's note, and for a damaged part.
    """
    if not is_folder(folder):
        raise ResultError(f"{named('', folder)} is no folder: give the folder of a study.")
    files = sorted(folder.glob("*.parquet"))
    if not files and not is_file(folder / "study.json"):
        raise ResultError(f"{named('', folder)} holds no study (neither finished parts nor a study.json): give the folder of a study.")
    return {file.stem: load_result(file) for file in files}
