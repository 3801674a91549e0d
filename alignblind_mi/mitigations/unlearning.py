"""Unlearning: make a model forget to read its identifiers as groups. The conventional rival of raising awareness.

Two methods, trained as LoRA by the same machinery as everything else (`finetuning.py`), on the restatements of the group sense:

* gradient ascent (Jang et al. 2023; Yao et al. 2024): the language-model loss with its sign turned, mean log p(y | x) over tokens. It has
  no lower bound, so training ends when the loss on what is forgotten reaches `forget_bound`;
* negative preference optimisation (NPO, Zhang et al. 2024, eq. 3): -2/beta E[log sigmoid(-beta log p(y | x) / p_ref(y | x))], where the
  reference is the model with the adapter off. Its gradient fades for what is forgotten already.

Either may keep the model near the untreated one on other pairs: `retain` "kl" is KL(reference || model) over the completion's tokens, "ce"
the language-model loss on them. This module does NOT know outcomes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid

from alignblind_mi.borders.settings import File, Positive, check_fields, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.mitigations.examples import Example, Item, encode
from alignblind_mi.mitigations.finetuning import Job, Prepared, finetune
from alignblind_mi.mitigations.lora import awareness_examples, blindness_examples, placebo_examples
from alignblind_mi.mitigations.lora_settings import LoraError, LoraSettings, choose_layers
from alignblind_mi.models.configs import depth_of
from alignblind_mi.models.edits import Treatment
from alignblind_mi.models.spec import AnySpec, as_spec
from alignblind_mi.stimuli.concept import Concept

METHODS = ("npo", "gradient_ascent")
KNOWN = {"retain": ("kl", "ce", "none"), "retain_on": ("neutral", "others")}


@dataclass(frozen=True)
class UnlearningSettings:
    """How to forget. `lora` are the hyper-parameters of the adapter.

    beta: NPO's inverse temperature (its authors' 0.1). retain, retain_weight: the term that keeps the rest, and its weight; retain_on:
    on the placebo pairs ("neutral") or the restatements in the other sense ("others"). forget_bound: training ends when a step's loss on
    what is forgotten (nats a token) is at least this. With 2.5 the embedded pair still does its task (tried on training words), with 5
    it does not.
    """

    __repr__ = one_line

    lora: LoraSettings = field(default_factory=LoraSettings)
    beta: Positive = 0.1
    retain: str = "kl"
    retain_weight: Positive = 1.0
    retain_on: str = "neutral"
    forget_bound: Positive = 2.5

    def __post_init__(self) -> None:
        check_fields(self, LoraError)
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise LoraError(f"unknown {name} {getattr(self, name)!r}. Known: {', '.join(known)}.")
        if self.lora.validation_share or self.lora.activation_weight:
            raise LoraError("unlearning has no best epoch and no activation loss: validation_share and activation_weight must be 0.")


@takes(LoraError)
def train_unlearning(spec: AnySpec, concept: Concept, out: File, *, method: str = "npo", layers: str | int | Sequence[int] = "all",
                     settings: UnlearningSettings | None = None) -> Treatment:
    """Train an adapter that forgets the concept's restatements in the group sense; a Treatment of the family "unlearning".

    The folder, its details and what happens after a kill are as in `train_lora`; training.json also has forget_loss and, with a retain
    term, retain_kl (nats a token, on the training pairs). Where the bound ended training, steps is below steps_planned there.

    Errors: LoraError for an unknown method or settings that make no sense; ConceptError for a concept without the pairs; as `train_lora`.
    """
    if method not in METHODS:
        raise LoraError(f"unknown unlearning method {method!r}. Known: {', '.join(METHODS)}.")
    settings = settings or UnlearningSettings()
    spec = as_spec(spec).resolved()
    chosen = choose_layers(layers, depth_of(spec))
    forget = awareness_examples(concept)
    retain = _retained(concept, settings)

    def prepare(model: Any, tokenizer: Any) -> Prepared:
        learnt, other = (encode(tokenizer, side, settings.lora.max_length) for side in (forget, retain))
        items, kept = learnt.items, other.items
        if retain and not kept:
            raise LoraError("the tokenizer does not know the words of any pair of the retain term: choose another, or retain='none'.")
        paired = [{**item, **_retain_keys(kept[i % len(kept)])} if kept else item for i, item in enumerate(items)]
        return Prepared(paired, dropped=len(forget) - len(items), cut=learnt.cut + other.cut, objective=Forgetting(method, settings))

    own = {key: value for key, value in asdict(settings).items() if key != "lora"}
    learnt_from = [[asdict(example) for example in part] for part in (forget, retain)]
    return finetune(Job(spec, chosen, settings.lora, method, "unlearning", learnt_from, prepare, {"unlearning": own}), Path(out))


def _retained(concept: Concept, settings: UnlearningSettings) -> list[Example]:
    if settings.retain == "none":
        return []
    return blindness_examples(concept) if settings.retain_on == "others" else placebo_examples(concept)


def _retain_keys(item: Item) -> Item:
    return {f"retain_{key}": value for key, value in item.items()}


class Forgetting:
    """The Trainer's objective (`trainer.Objective`) of either method."""

    def __init__(self, method: str, settings: UnlearningSettings) -> None:
        self.method, self.settings = method, settings
        self._losses: list[float] = []    # of the batches of the step under way

    def __call__(self, model: Any, inputs: dict[str, Tensor], standard: Any, share: float) -> tuple[Tensor, Any]:
        """The loss of a batch and the model's output on what is forgotten."""
        with reference(model), torch.no_grad():
            before = token_log_probs(model, inputs)[0] if self.method == "npo" else None
            kept = _logits(model, inputs, "retain_") if self.settings.retain == "kl" else None
        found, outputs = token_log_probs(model, inputs)
        learnt = _learnt(inputs)
        self._losses.append(-float(found.detach()[learnt].mean()))
        loss = found[learnt].mean() if before is None else npo_loss((found - before).sum(-1), self.settings.beta)
        if self.settings.retain == "ce":
            loss = loss - self.settings.retain_weight * token_log_probs(model, inputs, "retain_")[0][_learnt(inputs, "retain_")].mean()
        elif kept is not None:
            loss = loss + self.settings.retain_weight * _kl(kept, _logits(model, inputs, "retain_"))
        return share * loss, outputs

    def over(self) -> bool:
        """Whether the bound is reached, by the step that has just been taken."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) >= self.settings.forget_bound

    def facts(self, model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Losses on the training pairs with the adapter off and on, in nats a token."""
        with reference(model):
            before, kept = self._forget_loss(model, batches), [self._kept(model, batch) for batch in batches]
        after = self._forget_loss(model, batches)
        found: dict[str, Any] = {"forget_loss": {"before": before, "after": after}}
        if self.settings.retain != "none":
            moved = [float(_kl(old, self._kept(model, batch))) for old, batch in zip(kept, batches, strict=True)]
            found["retain_kl"] = round(sum(moved) / len(moved), 4)
        return found

    def _kept(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return _logits(model, batch, "retain_") if self.settings.retain != "none" else torch.empty(0)

    def _forget_loss(self, model: Any, batches: list[dict[str, Tensor]]) -> float:
        values = torch.cat([token_log_probs(model, batch)[0][_learnt(batch)] for batch in batches])
        return round(-float(values.mean()), 4)


def npo_loss(log_ratio: Float[Tensor, " row"], beta: float) -> Float[Tensor, ""]:
    """Negative preference optimisation (Zhang et al. 2024, eq. 3) of log p(y | x) / p_ref(y | x), mean over examples.

    It is bounded below by 0, is 2 log 2 / beta at the reference, and becomes gradient ascent as beta goes to 0.
    """
    return -2 / beta * logsigmoid(-beta * log_ratio).mean()


@contextlib.contextmanager
def reference(model: Any) -> Iterator[None]:
    """The untreated model: the adapter off, no dropout."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)


def token_log_probs(model: Any, inputs: dict[str, Tensor], prefix: str = "") -> tuple[Float[Tensor, "row target"], Any]:
    """Log-probabilities of a batch's labels, 0 where nothing is learnt, and the model's output."""
    outputs = model(input_ids=inputs[f"{prefix}input_ids"], attention_mask=inputs[f"{prefix}attention_mask"])
    labels = inputs[f"{prefix}labels"][:, 1:]
    found = outputs.logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return found * _learnt(inputs, prefix), outputs


def _learnt(inputs: dict[str, Tensor], prefix: str = "") -> Tensor:
    return inputs[f"{prefix}labels"][:, 1:] != -100


def _logits(model: Any, inputs: dict[str, Tensor], prefix: str) -> Float[Tensor, "token vocabulary"]:
    """Log-probabilities at the tokens of the completions."""
    outputs = model(input_ids=inputs[f"{prefix}input_ids"], attention_mask=inputs[f"{prefix}attention_mask"])
    return outputs.logits[:, :-1][_learnt(inputs, prefix)].float().log_softmax(-1)


def _kl(reference: Float[Tensor, "token vocabulary"], own: Float[Tensor, "token vocabulary"]) -> Float[Tensor, ""]:
    """KL(reference || own), mean over tokens, in nats."""
    return kl_div(own, reference, reduction="batchmean", log_target=True)
