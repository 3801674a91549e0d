"""The treatments that a comparison sets side by side: steering, LoRA, unlearning, prompts, their placebos and combinations.

A rival is a recipe for one Treatment; adapters are trained before (`Training`), all else is made from the model that it acts on. What a
concept or a tokenizer cannot do is left out with its reason. This module does NOT know what is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from alignblind_mi.borders.texts import one_line
from alignblind_mi.measures.mitigation import early_window, late_window
from alignblind_mi.mitigations.lora import examples_of, train_lora, trainable
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.mitigations.placebos import NOISE_PAIRS, SEEDS, noise_like, noise_placebos
from alignblind_mi.mitigations.steering import can_steer, layer_windows, sense_steering, steering_vectors
from alignblind_mi.mitigations.unlearning import UnlearningSettings, train_unlearning
from alignblind_mi.models.adapters import scaled_adapter
from alignblind_mi.models.configs import load_tokenizer
from alignblind_mi.models.edits import UNTREATED, Treatment, combine
from alignblind_mi.models.loading import token_count
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.stimuli.concept import Concept, Control, Cue, wrong_phrases
from alignblind_mi.stimuli.prompts import Prompt, filled, implicit_prompts
from alignblind_mi.stimuli.protocol import ProtocolName

FAMILIES = ("untreated", "steering", "lora", "unlearning", "prompt", "placebo", "combined")
NOISE = "placebo_matched_noise_"    # not what it was before, when noise was made to the norms of vectors
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
SCALES = (0.25, 0.5)
ACTIVATION_WEIGHT = 0.03    # more of it costs valid answers on the embedded pair (tried on training words)
Make = Callable[[HookedModel], Treatment]


@dataclass(frozen=True)
class Rival:
    """One treatment of a comparison: its name and family, how it is made, and where it lies on which dose curve (if on any).

    `placebos`: the names of those that act in the same way at the same places, which it must beat. `more`: of noise, how its further
    draws are made; the first is the rival itself.
    """

    __repr__ = one_line

    name: str
    family: str
    make: Make
    curve: str = ""
    dose: float = float("nan")
    placebos: tuple[str, ...] = ()
    more: Callable[[HookedModel], list[Treatment]] | None = None


@dataclass(frozen=True)
class Training:
    """An adapter that is trained for a comparison into the folder that it is given; or made of another, `source`, that lies beside it."""

    __repr__ = one_line

    name: str
    train: Callable[[Path], Any]
    source: str = ""


@dataclass(frozen=True)
class Plan:
    """What is compared, what is trained for it, and what is left out and why."""

    __repr__ = one_line

    rivals: Sequence[Rival]
    trainings: Sequence[Training]
    left_out: dict[str, str]


def plan_rivals(spec: ModelSpec, concept: Concept, cue: str, n_layers: int, lora: LoraSettings, *, quick: bool = False, seed: int = 0,
                protocol: ProtocolName = "best", draws: int = SEEDS, trained: bool = True) -> Plan:
    """Everything that can be tried on a model with a concept and cue; `quick` keeps one or two of each family. `protocol` is that of
    replacement and of LoRA; the paper has no others. `draws`: of noise, the rival itself among them; `trained`: are
    there adapters?

    Only configuration and tokenizer are looked at. Errors: ConceptError for a cue without senses.
    """
    concept.both_senses(concept.cue(cue))
    left_out: dict[str, str] = {}
    rivals: list[Rival] = []
    trainings: list[Training] = []
    if can_steer(concept, cue):
        rivals += _steering(concept, cue, n_layers, quick, protocol)
    else:
        left_out["steering"] = f"the cue {cue} draws from several identifiers"
    if not trained:
        left_out["lora, unlearning"] = "no adapters are trained in these minutes"
    elif trainable(concept, cue):
        trainings, by_adapter, missing = _trained(spec, concept, lora, quick, protocol)
        rivals, left_out = rivals + by_adapter, left_out | missing
    else:
        left_out["lora, unlearning"] = "the concept has no awareness sentences"
    prompted, unknown = _prompted(spec, concept, concept.cue(cue), quick)
    rivals, left_out = rivals + prompted, left_out | unknown
    if can_steer(concept, cue):
        steered = [rival for rival in rivals if rival.family == "steering"]
        placebos, without = _placebos(spec, concept, cue, early_window(n_layers), steered, quick, seed, protocol, draws)
        rivals, left_out = rivals + placebos, left_out | without
    rivals = _matched([*rivals, *_combined(rivals)])
    return Plan(sorted(rivals, key=lambda rival: FAMILIES.index(rival.family)), trainings, left_out)


def given(treatment: Treatment, model: HookedModel) -> Treatment:
    """A treatment that does not depend on the model."""
    return treatment


def _named(name: str, family: str, make: Make, model: HookedModel) -> Treatment:
    made = make(model)
    return replace(made, name=name, family=family)


def _rival(name: str, family: str, make: Make, curve: str = "", dose: float = float("nan")) -> Rival:
    return Rival(name, family, partial(_named, name, family, make), curve, dose)


# ---- steering ----------------------------------------------------------------------------------------------------------


def _by_vectors(concept: Concept, cue: str, method: str, layers: Sequence[int], options: dict[str, Any], model: HookedModel) -> Treatment:
    return steering_vectors(model, concept, cue, concept.group_sense, method, layers=layers).treatment(**options)


def _replaced(concept: Concept, cue: str, sense: str, layers: Sequence[int], protocol: ProtocolName, model: HookedModel) -> Treatment:
    return sense_steering(model, concept, cue, sense, layers, protocol=protocol)


def _steering(concept: Concept, cue: str, n_layers: int, quick: bool, protocol: ProtocolName) -> list[Rival]:
    """Replacement (the paper's), directions at the identifiers in doses, and contrastive addition at what follows the prompt."""
    early, late = early_window(n_layers), late_window(n_layers)
    group = concept.group_sense
    found = [_rival("steer_early", "steering", partial(_replaced, concept, cue, group, early, protocol)),
             _rival("steer_late", "steering", partial(_replaced, concept, cue, group, late, protocol))]
    has = ["mean_difference", "pca", "probe"] if {group, concept.other_sense} <= set(concept.contexts) else []
    for method in has[:1] if quick else has:
        for strength in (1.0,) if quick else STRENGTHS if method == "mean_difference" else (1.0,):
            make = partial(_by_vectors, concept, cue, method, early, {"strength": strength})
            found.append(_rival(f"steer_{method}_x{strength:g}", "steering", make, *(("steering", strength) if method == has[0] else ())))
    if has:
        ablate = partial(_by_vectors, concept, cue, "mean_difference", early, {"how": "ablate"})
        found.append(_rival("ablate_early", "unlearning", ablate))
    if not quick and has:
        everywhere = partial(_by_vectors, concept, cue, "mean_difference", early, {"strength": 0.25, "positions": ("prompt",)})
        found.append(_rival("steer_whole_prompt_x0.25", "steering", everywhere))
    if not quick and concept.awareness is not None and concept.awareness.others:
        windows = layer_windows(n_layers)
        middle = windows[len(windows) // 2]
        found += [_rival(f"steer_contrast_x{strength:g}", "steering",
                         partial(_by_vectors, concept, cue, "contrast", middle, {"strength": strength})) for strength in (0.25, 1.0)]
    return found


# ---- training ----------------------------------------------------------------------------------------------------------


def _trained(spec: ModelSpec, concept: Concept, lora: LoraSettings, quick: bool, protocol: ProtocolName
             ) -> tuple[list[Training], list[Rival], dict[str, str]]:
    """Adapters: awareness by layer group and with an activation loss, its mirror image and placebo, unlearning; some scaled as doses."""
    def aware(kind: str, layers: str, settings: LoraSettings, out: Path) -> Treatment:
        return train_lora(spec, examples_of(concept, kind), layers, out, settings=settings, concept=concept, kind=kind, protocol=protocol)

    def forget(method: str, out: Path) -> Treatment:
        return train_unlearning(spec, concept, out, method=method, settings=UnlearningSettings(lora=lora))

    left_out: dict[str, str] = {}
    plans: list[tuple[str, str, Callable[[Path], Any]]] = [("lora_early", "lora", partial(aware, "aware", "early", lora))]
    if not quick:
        plans += [(f"lora_{layers}", "lora", partial(aware, "aware", layers, lora)) for layers in ("late", "all")]
        if concept.contexts:
            plans.append(("lora_early_activation", "lora", partial(aware, "aware", "early",
                                                                  replace(lora, activation_weight=ACTIVATION_WEIGHT))))
    plans.append(("unlearn_npo", "unlearning", partial(forget, "npo")))
    if not quick:
        plans.append(("unlearn_gradient_ascent", "unlearning", partial(forget, "gradient_ascent")))
        if concept.awareness is not None and concept.awareness.others:
            plans.append(("lora_blind_early", "unlearning", partial(aware, "blind", "early", lora)))
        else:
            left_out["lora_blind_early"] = "the concept has no restatements of the other sense"
        plans.append(("lora_placebo_early", "placebo", partial(aware, "placebo", "early", lora)))
    trainings = [Training(name, train) for name, _, train in plans]
    curves = {"lora_early": "lora", "unlearn_npo": "unlearning"}
    about = {"placebo": {"placebo": "adapter"}}
    made = {name: Treatment(name, adapter=name, family=family, details=about.get(family, {})) for name, family, _ in plans}
    rivals = [Rival(name, family, partial(given, made[name]), curves.get(name, ""), 1.0 if name in curves else float("nan"))
              for name, family, _ in plans]
    for source, curve in () if quick else curves.items():
        for scale in SCALES:
            name = f"{source}_x{scale:g}".replace(".", "p")    # an adapter's name has no full stop
            trainings.append(Training(name, partial(_scaled, source, scale), source))
            rivals.append(Rival(name, curve, partial(given, Treatment(name, adapter=name, family=curve)), curve, scale))
    return trainings, rivals, left_out


def _scaled(source: str, scale: float, out: Path) -> Path:
    """The adapter `source` beside `out`, scaled."""
    return scaled_adapter(out.with_name(source), scale, out)


# ---- prompts and placebos ----------------------------------------------------------------------------------------------


def _prompted(spec: ModelSpec, concept: Concept, cue: Cue, quick: bool) -> tuple[list[Rival], dict[str, str]]:
    """The concept's instructions before the prompt; those that the tokenizer does not know are left out."""
    tokenizer, found, left_out = load_tokenizer(spec), list[Rival](), dict[str, str]()
    for entry in concept.instructions.values():
        name = f"prompt_{entry.name}"
        text = filled(entry.text, marked=cue.marked[0], unmarked=cue.unmarked[0])
        if not _knows(tokenizer, text):
            left_out[name] = f"the tokenizer does not know all words of {text.strip()!r}"
            continue
        family, about = ("placebo", {"placebo": "instruction"}) if entry.placebo else ("prompt", {})
        found.append(Rival(name, family, partial(given, Treatment(name, prefix=text, family=family, details=about))))
    if quick:
        found = [next(rival for rival in found if rival.family == family) for family in dict.fromkeys(rival.family for rival in found)]
    return found, left_out


def _knows(tokenizer: Any, text: str) -> bool:
    return token_count(tokenizer, text) > 0


def _placebos(spec: ModelSpec, concept: Concept, cue: str, early: Sequence[int], steered: Sequence[Rival], quick: bool, seed: int,
              protocol: ProtocolName, draws: int) -> tuple[list[Rival], dict[str, str]]:
    """Steering towards the other sense, a control phrase and a phrase about something else, and noise that does as much as what is
    `steered`."""
    found = [_rival(f"placebo_{sense}_early", "placebo", partial(_replaced, concept, cue, sense, early, protocol))
             for sense in (concept.other_sense, *concept.controls)]
    asked = noise_prompts(concept, cue, seed)
    noise = [replace(_rival(f"{NOISE}{rival.name}", "placebo", partial(_noise, rival, asked, seed)),
                     more=partial(_more_noise, rival, asked, seed, draws - 1)) for rival in (steered[:1] if quick else steered)]
    if quick:
        return [found[0], *noise], {}
    found += noise
    tokenizer, left_out = load_tokenizer(spec), dict[str, str]()
    roles, phrases = {"marked": concept.cue(cue).marked[0], "unmarked": concept.cue(cue).unmarked[0]}, wrong_phrases()
    known = [phrase for phrase in phrases if _knows(tokenizer, filled(phrase, **roles))]
    if not known:
        left_out["placebo_wrong_concept_early"] = f"the tokenizer knows no phrase about something else ({', '.join(phrases)})"
    else:
        with_wrong = replace(concept, controls={**concept.controls, "wrong_concept": Control("wrong_concept", known[0])})
        make = partial(_replaced, with_wrong, cue, "wrong_concept", early, protocol)
        found.append(_rival("placebo_wrong_concept_early", "placebo", make))
    return found, left_out


def noise_prompts(concept: Concept, cue: str, seed: int) -> list[Prompt]:
    """The questions that all draws of noise are asked, and on which it is matched: implicit ones of a few word pairs, balanced design."""
    return implicit_prompts(concept, cue, design="balanced", seed=seed, max_word_pairs=NOISE_PAIRS)


def _noise(steered: Rival, asked: Sequence[Prompt], seed: int, model: HookedModel) -> Treatment:
    return noise_like(model, steered.make(model), asked, seed=seed)


def _more_noise(steered: Rival, asked: Sequence[Prompt], seed: int, n: int, model: HookedModel) -> list[Treatment]:
    drawn = noise_placebos(model, steered.make(model), asked, n=n, seed=seed + 1)
    return [replace(one, name=f"{NOISE}{steered.name}_seed{seed + 1 + i}") for i, one in enumerate(drawn)]


def _matched(rivals: Sequence[Rival]) -> list[Rival]:
    """Every rival with its placebos: noise that does as much; other phrases, of what replaces in the early window; the placebo adapter of
    adapters towards awareness; placebo instructions. A combination has those of its parts. Unlearning has none here."""
    placebos = [rival.name for rival in rivals if rival.family == "placebo"]
    phrases = tuple(name for name in placebos if name.startswith("placebo_") and not name.startswith(NOISE))
    own = {rival.name: (*(name for name in placebos if name == NOISE + rival.name), *(phrases if rival.name == "steer_early" else ()),
                        *(name for name in placebos if rival.family == "lora" and name.startswith("lora_placebo")),
                        *(name for name in placebos if rival.family == "prompt" and name.startswith("prompt_"))) for rival in rivals}
    parts = {rival.name: rival.name.split("+") if rival.family == "combined" else [rival.name] for rival in rivals}
    return [replace(rival, placebos=tuple(name for part in parts[rival.name] for name in own.get(part, ()))) for rival in rivals]


# ---- combinations ------------------------------------------------------------------------------------------------------


def _combined(rivals: Sequence[Rival]) -> list[Rival]:
    """Steering, the trained adapter and the first instruction, two at a time."""
    by_name = {rival.name: rival for rival in rivals}
    prompt = next((rival for rival in rivals if rival.family == "prompt"), None)
    kept = [rival for rival in (by_name.get("steer_early"), by_name.get("lora_early"), prompt) if rival is not None]
    pairs = [(a, b) for i, a in enumerate(kept) for b in kept[i + 1 :]]
    return [Rival(f"{a.name}+{b.name}", "combined", partial(_both, a, b)) for a, b in pairs]


def _both(first: Rival, second: Rival, model: HookedModel) -> Treatment:
    return combine(first.make(model), second.make(model), name=f"{first.name}+{second.name}")


UNTREATED_RIVAL = Rival("untreated", "untreated", partial(given, UNTREATED))
