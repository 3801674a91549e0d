"""LoRA fine-tuning on race awareness: generated pairs, layer groups, a stock PEFT adapter folder as the result.

Source: "Aligned but Blind", section on LoRA (its hyper-parameters are `LoraSettings()`); Hu et al. 2021. Training is transformers'
Trainer on the plain model; evaluation loads the adapter before the bridge, so that hooks are live. This module does NOT know outcomes.
"""

import json
import random
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from alignblind_mi.concept import Concept, ConceptError
from alignblind_mi.edits import Treatment, adapter_name
from alignblind_mi.errors import AlignblindError
from alignblind_mi.loading import ModelSpec, fingerprint, load_huggingface
from alignblind_mi.results import versions

# Shares of depth. Early and late are the paper's split (layers 0-19 and 20-31 of 32); middle is 10-21 of 32.
LAYER_GROUPS = {"early": (0.0, 0.625), "middle": (0.3125, 0.6875), "late": (0.625, 1.0), "all": (0.0, 1.0)}


class LoraError(AlignblindError):
    """Training data or settings that cannot be used."""


@dataclass(frozen=True)
class Example:
    """A pair of the training set: `text` ends with the separator, the loss is on `completion` alone."""

    text: str
    completion: str


@dataclass(frozen=True)
class LoraSettings:
    """Hyper-parameters; the defaults are the paper's for Llama 3 8B (batch 4 x 4 accumulation steps)."""

    rank: int = 4
    alpha: int = 32
    dropout: float = 0.1
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    epochs: int = 7
    batch_size: int = 4
    accumulation: int = 4
    learning_rate: float = 2e-4
    warmup_share: float = 0.06
    weight_decay: float = 0.01
    max_length: int = 256
    seed: int = 0


def layer_group(name: str, n_layers: int) -> range:
    """The layers of a group: early, middle, late or all, as shares of the model's depth (rounded half up)."""
    if name not in LAYER_GROUPS:
        raise LoraError(f"unknown layer group {name!r}. Known: {', '.join(LAYER_GROUPS)}.")
    start, stop = (int(share * n_layers + 0.5) for share in LAYER_GROUPS[name])
    return range(start, max(stop, start + 1))


def awareness_examples(concept: Concept) -> list[Example]:
    """Every sentence with both orders of the identifiers and every restatement, in a fixed order.

    Errors: ConceptError for a concept without senses or awareness sentences.
    """
    concept.both_senses()
    if concept.awareness is None:
        raise ConceptError(f"the concept {concept.name!r} has no [awareness] sentences: add them to train LoRA on it.")
    cue = next(iter(concept.cues.values()))
    data = concept.awareness
    orders = [(cue.marked[0], cue.unmarked[0]), (cue.unmarked[0], cue.marked[0])]
    return [Example(sentence.format(x=x, y=y) + data.separator, restatement.format(x=x, y=y))
            for sentence, (x, y), restatement in product(data.sentences, orders, data.restatements)]


def trainable(concept: Concept, cue: str) -> bool:
    """Whether there is anything to train awareness on: senses that the cue's identifiers have, and sentences about them."""
    return concept.has_senses(cue) and concept.awareness is not None


def train_lora(spec: ModelSpec | str, examples: Sequence[Example], layers: Sequence[int], out: Path, *,
               settings: LoraSettings | None = None) -> Treatment:
    """Train an adapter on `layers` and save it as a PEFT folder `out` with its `training.json`; an existing one is kept as it is.

    The folder appears whole or not at all. Errors: LoraError for too few examples, ModelError as in `load_model`.
    """
    settings = settings or LoraSettings()
    spec = (ModelSpec(spec) if isinstance(spec, str) else spec).resolved()
    treatment = Treatment(adapter_name(out), adapter=adapter_name(out), family="lora",
                          details={"layers": f"{min(layers)}-{max(layers)}", "folder": str(out)})
    if (out / "training.json").is_file():
        return treatment
    if len(examples) < settings.batch_size:
        raise LoraError(f"{len(examples)} examples do not fill a batch of {settings.batch_size}.")
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    note = _train(spec, examples, layers, settings, beside)
    (beside / "training.json").write_text(json.dumps(note, indent=1), "utf-8")
    shutil.rmtree(out, ignore_errors=True)
    beside.replace(out)
    return treatment


def _train(spec: ModelSpec, examples: Sequence[Example], layers: Sequence[int], settings: LoraSettings, folder: Path) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, set_seed

    model, tokenizer = load_huggingface(spec)
    encoded, dropped = _encode(tokenizer, examples, settings.max_length)
    set_seed(settings.seed)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(settings.modules),
                        layers_to_transform=list(layers), task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    trainer = Trainer(model=peft, args=_arguments(settings, folder, spec), train_dataset=encoded,
                      data_collator=lambda batch: _collate(batch, int(tokenizer.pad_token_id)))
    trainer.remove_callback(PrinterCallback)    # losses go to training.json, not to standard output
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)    # transformers' own, about its next major version
        outcome = trainer.train()
    peft.peft_config["default"].base_model_name_or_path = spec.name    # the name, not where it lies on this machine
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    parameters = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"model": spec.name, "revision": fingerprint(spec, model.config), "layers": list(layers), "settings": asdict(settings),
            "examples": len(encoded), "examples_dropped": dropped, "parameters": parameters, "loss": outcome.training_loss,
            "losses": losses, "seconds": round(outcome.metrics["train_runtime"], 2), "versions": versions()}


def _arguments(settings: LoraSettings, folder: Path, spec: ModelSpec) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation, learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_share, weight_decay=settings.weight_decay, seed=settings.seed, data_seed=settings.seed,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10, remove_unused_columns=False,
        use_cpu=spec.device == "cpu", bf16=spec.dtype == "bfloat16" and spec.device != "cpu", dataloader_pin_memory=False)


def _encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> tuple[list[dict[str, list[int]]], int]:
    """Token ids and labels (-100 on the text, the completion and its end token are learnt); examples with unknown words are dropped."""
    unknown, encoded = tokenizer.unk_token_id, []
    for example in examples:
        text = tokenizer(example.text)["input_ids"]
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if unknown is not None and unknown in text + completion:
            continue
        encoded.append({"input_ids": (text + completion)[:max_length], "labels": ([-100] * len(text) + completion)[:max_length]})
    if not encoded:
        raise LoraError("the tokenizer does not know the words of any training example.")
    random.Random(0).shuffle(encoded)
    return encoded, len(examples) - len(encoded)


def _collate(batch: list[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    import torch

    width = max(len(item["input_ids"]) for item in batch)
    fill = {"input_ids": pad, "labels": -100}
    out = {key: torch.tensor([item[key] + [value] * (width - len(item[key])) for item in batch]) for key, value in fill.items()}
    mask = [[1] * len(item["input_ids"]) + [0] * (width - len(item["input_ids"])) for item in batch]
    return out | {"attention_mask": torch.tensor(mask)}
