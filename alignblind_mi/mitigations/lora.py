"""LoRA fine-tuning on race awareness, its mirror image and its placebo: generated pairs, layer groups, a stock PEFT adapter folder.

Source: "Aligned but Blind", section on LoRA (its hyper-parameters are `LoraSettings()`, also called `PAPER`); Hu et al. 2021. Evaluation
loads the adapter before the bridge, so that hooks are live. This module does NOT know outcomes, nor how training is run.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from alignblind_mi.borders.settings import File, Listed, many, takes
from alignblind_mi.mitigations.examples import Example, encode, split_examples
from alignblind_mi.mitigations.finetuning import Job, Prepared, finetune
from alignblind_mi.mitigations.lora_settings import LAYER_GROUPS, PAPER, LoraError, LoraSettings, choose_layers, layer_group
from alignblind_mi.models.configs import depth_of
from alignblind_mi.models.edits import Treatment
from alignblind_mi.models.spec import AnySpec, as_spec
from alignblind_mi.stimuli.concept import Awareness, Concept, ConceptError
from alignblind_mi.stimuli.prompts import fill, filled
from alignblind_mi.stimuli.protocol import ProtocolName

__all__ = [
    "KINDS",
    "LAYER_GROUPS",
    "PAPER",
    "Example",
    "LoraError",
    "LoraSettings",
    "awareness_examples",
    "blindness_examples",
    "examples_of",
    "layer_group",
    "lora_sweep",
    "placebo_examples",
    "train_lora",
    "trainable",
]

KINDS = ("aware", "blind", "placebo")


# ---- training pairs ----------------------------------------------------------------------------------------------------


def awareness_examples(concept: Concept) -> list[Example]:
    """Every sentence with both orders of the identifiers and every restatement, in a fixed order. ConceptError if the concept has none."""
    return _examples(concept, _awareness(concept).restatements)


def blindness_examples(concept: Concept) -> list[Example]:
    """The mirror image: the same sentences, restated in the other sense. ConceptError if the concept has no such restatements."""
    others = _awareness(concept).others
    if not others:
        raise ConceptError(f"the concept {concept.name!r} has no restatements of the other sense: give [awareness] others.")
    return _examples(concept, others)


def placebo_examples(concept: Concept) -> list[Example]:
    """A placebo: the same sentences, completed by the identifiers of each restatement alone ("{x} {y}."), which settles neither sense."""
    return _examples(concept, [_bare(restatement) for restatement in _awareness(concept).restatements])


def _bare(restatement: str) -> str:
    """The identifiers that a restatement names, in its order, each once."""
    return " ".join(dict.fromkeys(re.findall(r"\{\w+\}", restatement))) + "."


def examples_of(concept: Concept, kind: str) -> list[Example]:
    """The training pairs of a kind: aware, blind or placebo."""
    _check_kind(kind)
    return dict(zip(KINDS, (awareness_examples, blindness_examples, placebo_examples), strict=True))[kind](concept)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise LoraError(f"unknown kind of training data {kind!r}. Known: {', '.join(KINDS)}.")


def _awareness(concept: Concept) -> Awareness:
    concept.both_senses()
    if concept.awareness is None:
        raise ConceptError(f"the concept {concept.name!r} has no [awareness] sentences: add them to train LoRA on it.")
    return concept.awareness


def _orders(concept: Concept) -> list[tuple[str, str]]:
    cue = concept.cue(concept.first_cue)
    return [(cue.marked[0], cue.unmarked[0]), (cue.unmarked[0], cue.marked[0])]


def trainable(concept: Concept, cue: str) -> bool:
    """Whether there is anything to train awareness on: senses that the cue's identifiers have, and sentences about them."""
    return concept.has_senses(cue) and concept.awareness is not None


def _examples(concept: Concept, completions: Sequence[str]) -> list[Example]:
    return [_example(concept, *parts) for parts in product(_awareness(concept).sentences, _orders(concept), completions)]


def _example(concept: Concept, sentence: str, pair: tuple[str, str], completion: str, separator: str | None = None) -> Example:
    values = dict(zip("xy", pair, strict=True))
    prompt = fill(sentence, values, {"x": "identifier", "y": "identifier"})
    behind = _awareness(concept).separator if separator is None else separator
    return Example(prompt.text + behind, filled(completion, **values), prompt.marks.get("identifier", ()), sentence)


def _settled(concept: Concept, sense: str) -> list[Example]:
    """The `train` contexts of a sense, with both orders of the identifiers."""
    if sense not in concept.contexts:
        raise ConceptError(f"the concept {concept.name!r} has no sentences that settle the sense {sense!r}: give [contexts.{sense}].")
    return [_example(concept, sentence, pair, "", "") for sentence, pair in product(concept.contexts[sense].train, _orders(concept))]


# ---- training ----------------------------------------------------------------------------------------------------------


Examples = Annotated[Example | Sequence[Example], Listed(once=False, alone=True)]    # one or many


@takes(LoraError)
def train_lora(spec: AnySpec, examples: Examples, layers: str | int | Sequence[int], out: File, *,
               settings: LoraSettings | None = None, concept: Concept | None = None, kind: str = "aware",
               protocol: ProtocolName = "best") -> Treatment:
    """Train an adapter on `layers` and save it as a PEFT folder `out` with its `training.json`; an existing one is kept as it is.

    layers: a group's name, a text such as "0-3,7", or numbers. `concept` is needed for an activation loss only: its `train` contexts
    settle the senses. `kind` says what the examples are; a placebo's Treatment is of the family "placebo". `protocol`: what is learnt of
    an example, see `examples.encode`.

    The folder appears whole or not at all; a training that was killed goes on after its last epoch. Errors: LoraError for too few examples,
    unknown layers or modules, or a folder of another training; ModelError as in `load_model`.
    """
    settings, examples = settings or PAPER, many(examples)
    _check_kind(kind)
    if settings.activation_weight and kind != "aware":
        raise LoraError(f"an activation loss raises the group reading: it goes with the kind aware, not with {kind}.")
    if len(examples) < settings.batch_size:
        raise LoraError(f"{len(examples)} examples do not fill a batch of {settings.batch_size}.")
    spec = as_spec(spec).resolved()
    depth = depth_of(spec)
    chosen = choose_layers(layers, depth)
    read = choose_layers(settings.activation_layers or chosen, depth)
    contexts = _contexts(concept) if settings.activation_weight else None
    train, validation = split_examples(examples, settings.validation_share, settings.seed)

    def prepare(model: Any, tokenizer: Any) -> Prepared:
        objective = None
        if contexts:
            from alignblind_mi.mitigations.sense_loss import SenseLoss, find_reading

            objective = SenseLoss(find_reading(model, tokenizer, *contexts, read), settings.activation_weight)
        learnt, held = (encode(tokenizer, side, settings.max_length, identifiers=bool(contexts), protocol=protocol)
                        for side in (train, validation))
        return Prepared(learnt.items, held.items, len(examples) - len(learnt.items) - len(held.items), learnt.cut + held.cut, objective)

    learnt_from = [[asdict(example) for example in part] for part in (examples, *(contexts or ()))]
    method = f"{kind}+activation" if contexts else kind
    said: dict[str, Any] = {} if protocol == "best" else {"protocol": protocol}    # nothing is what there was before there were two
    return finetune(Job(spec, chosen, settings, method, "placebo" if kind == "placebo" else "lora", learnt_from, prepare, said), Path(out))


def _contexts(concept: Concept | None) -> tuple[list[Example], list[Example]]:
    """Sentences that settle the group sense, and those that settle the other one."""
    if concept is None:
        raise LoraError("an activation loss needs the concept whose contexts settle the senses: give train_lora(concept=...).")
    return _settled(concept, concept.group_sense), _settled(concept, concept.other_sense)


@takes(LoraError)
def lora_sweep(spec: AnySpec, examples: Examples, layers: str | int | Sequence[int], out: File,
               settings: Annotated[LoraSettings | Sequence[LoraSettings], Listed(some=True, once=False, alone=True)], *,
               concept: Concept | None = None, kind: str = "aware", protocol: ProtocolName = "best") -> Iterator[Treatment]:
    """Train one adapter for each of the settings, each in a folder of its own below `out`, called by rank, rate and what else differs.

    Errors: LoraError, before anything is trained, if two settings are the same; else as `train_lora`.
    """
    settings = many(settings)
    names = sweep_names(settings)
    return (train_lora(spec, examples, layers, Path(out) / name, settings=one, concept=concept, kind=kind, protocol=protocol)
            for name, one in zip(names, settings, strict=True))


def sweep_names(settings: Sequence[LoraSettings]) -> list[str]:
    """A name for each of the settings that tells it from the others: rank4_learning_rate0p0002."""
    tables = [asdict(one) for one in settings]
    keys = [key for key in asdict(PAPER) if key in ("rank", "learning_rate") or len({str(table[key]) for table in tables}) > 1]
    names = ["_".join(f"{key}{_plain(table[key])}" for key in keys) for table in tables]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LoraError(f"two settings of the sweep are the same ({twice[0]}): each must be given once.")
    return names


def _plain(value: Any) -> str:
    """A value as a part of a folder's name (PEFT allows no full stop in it)."""
    if isinstance(value, tuple):
        return "-".join(_plain(part) for part in value) or "none"
    return (format(value, "g") if isinstance(value, float) else str(value)).replace(".", "p")
