"""What a study is asked to do: everything that its rows depend on, checked before anything is loaded. Does NOT run anything."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from alignblind_mi.borders.reading import is_file, read_object
from alignblind_mi.borders.settings import (
    MOST,
    Count,
    Layer,
    Made,
    PathText,
    Positive,
    Seed,
    Shots,
    Temperature,
    check_fields,
    takes,
    widened,
)
from alignblind_mi.borders.texts import one_line
from alignblind_mi.errors import ResultError
from alignblind_mi.measures.awareness import TARGET_LAYER
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.models.chat import Chat, chat_frame, in_chat
from alignblind_mi.models.configs import load_config, load_tokenizer
from alignblind_mi.models.embedded import RECORD, organism_names, read_record
from alignblind_mi.models.fingerprints import fingerprint
from alignblind_mi.models.loading import check_model
from alignblind_mi.models.spec import EMBEDDED, ModelError, ModelSpec, as_spec
from alignblind_mi.models.tokens import known_texts
from alignblind_mi.results import STUDY
from alignblind_mi.stimuli.competence import competence_words
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, Concept, Cue, former_digests, load_concept
from alignblind_mi.stimuli.prompts import Design, implicit_prompts
from alignblind_mi.stimuli.protocol import ProtocolName
from alignblind_mi.stimuli.shots import with_shots
from alignblind_mi.studies.amounts import FULL, QUICK, QUICK_SHALLOW, SHALLOW, Amounts

Spec = Annotated[ModelSpec, Made(as_spec, "a ModelSpec, a model's name or its folder", ModelSpec | str | Path)]


def _cue_name(value: Any) -> str:
    if isinstance(value, (str, Cue)):
        return value if isinstance(value, str) else value.name
    raise TypeError("no cue")


CueName = Annotated[str, Made(_cue_name, "a cue's name, or a Cue", str | Cue)]


@widened
@dataclass(frozen=True)
class StudyConfig:
    """Everything that the rows of a study depend on. `balanced_pairs` bounds the word pairs per category of the balanced design.

    `chat` (None: raw) is how the bias prompts are asked, and so where their identifiers are read and steered; what is only instrument stays
    raw: steering phrases, interpretation questions and the sentences of LoRA. `protocol`: see `stimuli/protocol.py`. `shots`: worked
    examples before every bias prompt (see `stimuli/shots.py`). `minutes`: what is measured is thinned until it fits into them;
    `amounts`: how much is left then (see `studies/thinning.py`; a folder that was begun so keeps its own).
    """

    __repr__ = one_line

    base: Spec
    aligned: Spec
    concept: PathText = DEFAULT_CONCEPT
    cue: CueName = "default"
    quick: bool = False
    seed: Seed = 0
    decoding: Decoding = field(default_factory=Decoding)
    lora: LoraSettings = field(default_factory=LoraSettings)
    target_layer: Layer = TARGET_LAYER
    selfie: str = "paper"
    balanced_pairs: Count | None = 20
    published_pairs: Count | None = None
    chat: Chat | None = None
    protocol: ProtocolName = "best"
    shots: Shots = 0
    minutes: Positive | None = None
    amounts: Amounts | None = None

    def __post_init__(self) -> None:
        check_fields(self, ModelError)
        if self.quick and (self.minutes is not None or self.amounts is not None):
            raise ModelError("a quick look (quick, --quick) and minutes (minutes, --minutes) are two ways to ask less: give one of them.")

    def taken(self, n_layers: int = 0) -> Amounts:
        """How much of everything is measured on a model of so many layers, on which layers and dear controls alone depend."""
        if self.amounts is not None:
            return self.amounts
        return (QUICK if n_layers > SHALLOW else QUICK_SHALLOW) if self.quick else FULL

    def word_pairs(self, design: Design) -> int | None:
        """The most word pairs a category that a design is asked; None: all there are."""
        most = self.published_pairs if design == "published" else self.balanced_pairs
        return most if self.amounts is None else min(most or MOST, self.amounts.pairs)

    @classmethod
    @takes(ModelError)
    def create(cls, base: PathText, aligned: PathText, *, concept: PathText = DEFAULT_CONCEPT, cue: CueName = "",
               quick: bool = False, seed: Seed = 0, chat: bool = False, system: str = "", temperature: Temperature | None = None,
               chat_options: Mapping[str, Any] = MappingProxyType({}), protocol: ProtocolName | None = None, shots: Shots = 0,
               minutes: Positive | None = None, **options: Any) -> "StudyConfig":
        """A configuration for two models by name, with what an organism's own record recommends (decoding, LoRA, target layer).

        `cue`: the concept's first by default. `chat`: ask in the models' chat templates, after the `system` prompt if there is one,
        with the template's `chat_options` (such as {"enable_thinking": False}).
        `temperature`: 0 is greedy; None is greedy, but sampled at 1 where an organism's record says so. `protocol`: None is "paper",
        but "best" for an organism, whose truth is known under it. `options` are those of `ModelSpec` (dtype, device, device_map,
        quantization, engine ...), for both models.

        Errors: ModelError or ConceptError, before any weights are loaded, for a model, concept, cue or chat template that cannot be used.
        """
        if system and not chat:
            raise ModelError(f"the system prompt {system!r} needs a chat to stand in: ask in a chat (chat=True, --chat), or leave it out.")
        if chat_options and not chat:
            raise ModelError(f"the option {next(iter(chat_options))} of a chat template needs a chat: ask in a chat (chat=True, --chat), "
                             "or leave it out.")
        return cls.of(ModelSpec(base, **options), ModelSpec(aligned, **options), concept=concept, cue=cue, quick=quick, seed=seed,
                      chat=Chat(system, options=dict(chat_options)) if chat else None, temperature=temperature, protocol=protocol,
                      shots=shots, minutes=minutes)

    @classmethod
    @takes(ModelError)
    def of(cls, base: Spec, aligned: Spec, *, concept: PathText = DEFAULT_CONCEPT, cue: CueName = "", quick: bool = False,
           seed: Seed = 0, chat: Chat | None = None, temperature: Temperature | None = None, protocol: ProtocolName | None = None,
           shots: Shots = 0, minutes: Positive | None = None) -> "StudyConfig":
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
                     int(record.get("target_layer", TARGET_LAYER)), record.get("selfie", "paper"), chat=chat,
                     protocol=protocol or usual_protocol(record), shots=shots, minutes=minutes)
        asked_concept(config)    # are there worked examples that both tokenizers can spell?
        return replace(config, balanced_pairs=4, published_pairs=8, lora=replace(lora, epochs=min(lora.epochs, 2))) if quick else config

    def identity(self) -> dict[str, Any]:
        """What a results folder is checked against: the settings, the content of the concept, the weights of both models, and in a chat
        what their templates write around a prompt."""
        out = asdict(self)
        if self.protocol == "best":
            del out["protocol"]    # what it was before there were two
        if not self.shots:
            del out["shots"]    # what it was before there were any
        for name in ("minutes", "amounts"):
            if out[name] is None:
                del out[name]    # what it was before anything could be thinned so
        if self.chat is None:
            del out["chat"]    # a study without one is what it was before there were chats
        else:
            out["chat"] = self.chat.record()
            out["chat_frames"] = {role: chat_frame(load_tokenizer(spec), self.chat, spec.name)._asdict()
                                  for role, spec in (("base", self.base), ("aligned", self.aligned))}
        for role in ("base", "aligned"):
            if not out[role]["allow_pickle"]:
                del out[role]["allow_pickle"]    # what it was before this could be asked for
            del out[role]["tensor_parallel"]    # how it is run: a folder goes on with or without
        concept = load_concept(self.concept)
        out["concept"] = self.concept.removesuffix(f"@{concept.digest}")
        out["concept_digest"] = concept.digest
        for role, spec in (("base", self.base), ("aligned", self.aligned)):
            out[f"{role}_revision"] = fingerprint(spec, load_config(spec))
        return json.loads(json.dumps(out)) | {"format": 3}


def asked_concept(config: StudyConfig, concept: Concept | None = None) -> Concept:
    """The concept as its prompts are asked: behind worked examples, of words that both tokenizers can spell, where the study has any.

    Errors: ConceptError for an unknown concept; PromptError where no example can be made.
    """
    concept = load_concept(config.concept) if concept is None else concept
    if not config.shots:
        return concept
    words = [f" {word}" for word in competence_words(concept)]
    spelt = set.intersection(*({text.lstrip() for text in known_texts(load_tokenizer(spec), words)}
                               for spec in {config.base.name: config.base, config.aligned.name: config.aligned}.values()))
    return with_shots(concept, config.shots, known=spelt, seed=config.seed)


def as_begun(config: StudyConfig, out: Path) -> StudyConfig:
    """The configuration that resumes what is in `out`: a folder that was begun with the former contexts of a built-in concept goes on with
    them, so that its parts can be set side by side; one that was begun with the same `minutes` with what was chosen then.

    Errors: ModelError where what was chosen cannot be read.
    """
    try:
        begun = read_object(out / STUDY, "", ResultError) if is_file(out / STUDY) else {}
    except ResultError:
        return config    # no folder of ours: claiming it says what is wrong
    digest, chosen = begun.get("concept_digest"), begun.get("amounts")
    if digest in former_digests(config.concept):
        config = replace(config, concept=f"{config.concept}@{digest}")
    if config.minutes is None or config.amounts is not None or chosen is None or begun.get("minutes") != config.minutes:
        return config
    return replace(config, amounts=Amounts.read(chosen, out / STUDY))


def usual_protocol(record: Mapping[str, Any]) -> str:
    """The protocol of a pair where none is asked for, by the record of an organism (empty for other models)."""
    return "best" if record else "paper"


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
