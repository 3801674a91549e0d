"""The machinery behind everything that is trained: settings, layers, token ids, a folder that appears whole, a Treatment.

Training is transformers' Trainer (`trainer.py`) on the plain model with a PEFT LoRA adapter. It runs in a folder beside the result,
`.name.part`, which holds a checkpoint an epoch: what was killed goes on there, and a folder begun with other settings is thrown away. This
module does NOT know what the examples say, nor what a loss is for.
"""

import contextlib
import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from alignblind_mi.blocks import decoder_layers
from alignblind_mi.borders import foreign, is_file, named, read_object
from alignblind_mi.edits import Treatment, adapter_name
from alignblind_mi.errors import AlignblindError
from alignblind_mi.loading import ModelSpec, fingerprint, load_config, load_huggingface, load_tokenizer, quiet
from alignblind_mi.progress import interruptible
from alignblind_mi.prompts import Prompt, Span
from alignblind_mi.results import LEFTOVER, name_problem, one_process, refuse_taken, remove_own, versions, write_text
from alignblind_mi.settings import (
    Count,
    Layer,
    LearningRate,
    Listed,
    Name,
    Names,
    PartialShare,
    Rank,
    Seed,
    Tokens,
    Weight,
    Whole,
    check_fields,
    checked,
    shown,
    takes,
)
from alignblind_mi.tokens import Encoded

if TYPE_CHECKING:
    from alignblind_mi.trainer import Objective

# Shares of depth. Early and late are the paper's split (layers 0-19 and 20-31 of 32); middle is 10-21 of 32.
LAYER_GROUPS = {"early": (0.0, 0.625), "middle": (0.3125, 0.6875), "late": (0.625, 1.0), "all": (0.0, 1.0)}
MOST_SAID = 5    # differences between two trainings that a sentence names
LONGEST = 2000    # characters of a text that names layers
Item = dict[str, list[int]]
NOTE, IDENTITY = "training.json", "identity.json"
# What is in the folder of a training that goes on.
DRAFTED = re.compile(r"identity\.json|README\.md|adapter_config\.json|adapter_model\.safetensors|checkpoint-\d+|" + LEFTOVER.pattern)


class LoraError(AlignblindError):
    """Training data, layers or settings that cannot be used."""


@dataclass(frozen=True)
class Example:
    """A pair of the training set: `text` ends with the separator, the loss is on `completion` alone.

    `identifiers` are the spans of `text` that name the groups; `source` is what the example was made from: examples of one source stay on
    one side of a validation split (empty: the text itself).
    """

    text: str
    completion: str
    identifiers: tuple[Span, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class LoraSettings:
    """Hyper-parameters; the defaults are the paper's for Llama 3 8B (batch 4 x 4 accumulation steps), also called `PAPER`.

    validation_share: share of the sentences that the loss is measured on after each epoch; the best epoch is kept. patience: training stops
    after so many epochs without a better one (0: never). activation_weight: weight of the activation loss (`sense_loss.py`) beside the
    language-model loss, after activation_layers (empty: the trained ones); 0 is none.
    """

    rank: Rank = 4
    alpha: Count = 32
    dropout: PartialShare = 0.1
    modules: Annotated[tuple[Name, ...], Listed()] = ("q_proj", "v_proj")
    epochs: Count = 7
    batch_size: Count = 4
    accumulation: Count = 4
    learning_rate: LearningRate = 2e-4
    warmup_share: PartialShare = 0.06
    weight_decay: Weight = 0.01
    max_length: Tokens = 256
    seed: Seed = 0
    validation_share: PartialShare = 0.0
    patience: Whole = 0
    activation_weight: Weight = 0.0
    activation_layers: Annotated[tuple[Layer, ...], Listed()] = ()

    def __post_init__(self) -> None:
        check_fields(self, LoraError)
        if not self.modules:
            raise LoraError("modules is empty ('' names none): name the projections to train, e.g. q_proj and v_proj.")
        if self.patience and not self.validation_share:
            raise LoraError("patience needs validation_share above 0: without held-out sentences no epoch is better than another.")


PAPER = LoraSettings()
"""The hyper-parameters of "Aligned but Blind" for Llama 3 8B."""


# ---- layers and modules ------------------------------------------------------------------------------------------------


def layer_group(name: str, n_layers: int) -> range:
    """The layers of a group: early, middle, late or all, as shares of the model's depth (rounded half up)."""
    if name not in LAYER_GROUPS:
        raise LoraError(f"unknown layer group {name!r}. Known: {', '.join(LAYER_GROUPS)}.")
    start, stop = (int(share * n_layers + 0.5) for share in LAYER_GROUPS[name])
    return range(start, max(stop, start + 1))


def choose_layers(which: str | Sequence[int], n_layers: int) -> list[int]:
    """Layers by a group's name ("early"), a text ("0-3,7") or a sequence, sorted. Errors: LoraError for one that the model has not."""
    found = _read_layers(which, n_layers) if isinstance(which, str) else checked(which, Sequence[int], "layers", LoraError)
    wrong = next((layer for layer in found if not 0 <= layer < n_layers), None)
    if wrong is not None or not found:
        said = "no layers are given" if wrong is None else f"layer {shown(wrong)} does not exist"
        raise LoraError(f"{said}: the model has layers 0-{n_layers - 1}{f', got {which!r}' if isinstance(which, str) else ''}.")
    return sorted(set(found))


def _read_layers(text: str, n_layers: int) -> Sequence[int]:
    if text in LAYER_GROUPS:
        return layer_group(text, n_layers)
    runs = [re.fullmatch(r"\s*(?:([0-9]+)\s*-\s*)?([0-9]+)\s*", part) for part in text.split(",")]
    if len(text) > LONGEST or not all(runs):
        raise LoraError(f"the layers {shown(text)} are neither a group ({', '.join(LAYER_GROUPS)}) nor numbers such as 0-3,7.")
    ends = [(int(run[1] or run[2]), int(run[2])) for run in runs if run]
    backwards = next((end for end in ends if end[0] > end[1]), None)
    if backwards is not None:
        raise LoraError(f"{backwards[0]}-{backwards[1]} runs backwards and holds no layers, so no layers are given there: write "
                        f"{backwards[1]}-{backwards[0]}.")
    beyond = [end[1] for end in ends if end[1] >= n_layers]    # found before a run is written out: it may be of any length
    return [max(n_layers, *(end[0] for end in ends if end[1] in beyond))] if beyond else [
        layer for first, last in ends for layer in range(first, last + 1)]


def layers_text(layers: Sequence[int]) -> str:
    """Layers as they are written: "0-3", "5-5", "0-3,7-7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" for first, last in runs)


@takes(LoraError)
def check_modules(spec: ModelSpec, modules: Names) -> None:
    """Whether a model's layers have these projections, from its configuration alone. Errors: LoraError naming an unknown one."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = load_config(spec)
    with torch.device("meta"), quiet(), foreign(f"no model can be made by the configuration of {spec.name}", LoraError,
                                                "mend its config.json, or use another model"):
        empty = AutoModelForCausalLM.from_config(config)
    names = {name.split(".")[-1] for name, module in decoder_layers(empty)[0].named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for module in modules:
        if module not in names:
            raise LoraError(f"the layers of {spec.name} have no projection {module!r}. Known: {', '.join(sorted(names))}.")


# ---- token ids ---------------------------------------------------------------------------------------------------------


def split_examples(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples: `share` of the sources, at least one, are held out. Errors: LoraError if there is only one."""
    if not share:
        return list(examples), []
    sources = sorted({example.source or example.text for example in examples})
    if len(sources) < 2:
        raise LoraError("a validation split needs examples of at least two sentences.")
    held = set(random.Random(f"validation|{seed}").sample(sources, min(max(1, round(share * len(sources))), len(sources) - 1)))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[(example.source or example.text) in held].append(example)
    return sides


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int, *, identifiers: bool = False) -> list[Item]:
    """Token ids and labels (-100 on the text; the completion and its end token are learnt), in a fixed random order.

    Examples with unknown words are left out. `identifiers`: also 1 at the last token of each of the text's identifiers, 0 elsewhere.
    """
    unknown, encoded = tokenizer.unk_token_id, list[Item]()
    for example in examples:
        with foreign("the tokenizer cannot read an example", LoraError, "choose another model or concept"):
            text = tokenizer(example.text, return_offsets_mapping=identifiers)
        ids = text["input_ids"]
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if unknown is not None and unknown in ids + completion:
            continue
        item = {"input_ids": (ids + completion)[:max_length], "labels": ([-100] * len(ids) + completion)[:max_length]}
        if identifiers:
            seen = Encoded(Prompt(example.text), tuple(ids), tuple(tuple(pair) for pair in text["offset_mapping"]))
            last = {seen.tokens_of(span)[-1] for span in example.identifiers}
            item["identifiers"] = [int(i in last) for i in range(len(item["input_ids"]))]
        encoded.append(item)
    random.Random(0).shuffle(encoded)
    return encoded


def collate(batch: Sequence[Item], pad: int) -> dict[str, Tensor]:
    """Items padded on the right to one width, key by key, with an attention mask for each kind of input_ids."""
    out = {}
    for key in batch[0]:
        width, fill = max(len(item[key]) for item in batch), pad if key.endswith("input_ids") else -100 if key.endswith("labels") else 0
        out[key] = torch.tensor([item[key] + [fill] * (width - len(item[key])) for item in batch])
        if key.endswith("input_ids"):
            mask = [[1] * len(item[key]) + [0] * (width - len(item[key])) for item in batch]
            out[key.replace("input_ids", "attention_mask")] = torch.tensor(mask)
    return out


# ---- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is trained on, once the tokenizer and the untreated model are there. `objective` None is the language-model loss."""

    train: list[Item]
    validation: list[Item] = field(default_factory=list)
    dropped: int = 0
    objective: "Objective | None" = None


@dataclass(frozen=True, eq=False)
class Job:
    """One training: an adapter on `layers` of a model, by a method, from whatever `prepare` makes of the plain model and its tokenizer.

    `learnt_from` is everything in the data that the weights depend on; it goes into the identity of the result by a digest.
    """

    spec: ModelSpec
    layers: Sequence[int]
    settings: LoraSettings
    method: str
    family: str
    learnt_from: Any
    prepare: Callable[[Any, Any], Prepared]
    options: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What the weights depend on, as training.json records it."""
        digest = hashlib.sha256(json.dumps(self.learnt_from).encode()).hexdigest()[:16]
        note = {"model": self.spec.name, "revision": fingerprint(self.spec, load_config(self.spec)), "dtype": self.spec.dtype,
                "quantization": self.spec.quantization, "method": self.method, "family": self.family, "layers": list(self.layers),
                "settings": asdict(self.settings), "data": digest, **self.options}
        return json.loads(json.dumps(note))


def finetune(job: Job, out: Path) -> Treatment:
    """The Treatment of a trained adapter in the PEFT folder `out`, trained now if it is not there already.

    The folder appears whole or not at all, without checkpoints. Errors: LoraError if `out` holds an adapter of other settings, and, before
    anything is computed, for a folder of anything else there or beside it.
    """
    problem = name_problem(adapter_name(out))
    if problem:
        raise LoraError(f"{out} cannot be the name of an adapter: it {problem}.")
    if not _is_trained(out):
        refuse_taken(out, what="folder", kind=LoraError)
        refuse_taken(_draft(out), what="folder", mine=_claimed, kind=LoraError)
    identity = job.identity()
    if not _is_trained(out):
        check_modules(job.spec, job.settings.modules)
        load_tokenizer(job.spec)    # refused before a folder is made
        with _alone(out), interruptible(_draft(out), "finished epochs"):
            if not _is_trained(out):    # by a process that was faster
                _make(job, out, identity)
    return _treatment(out, identity)


def _is_trained(out: Path) -> bool:
    return is_file(out / NOTE)


def _draft(out: Path) -> Path:
    """The folder beside `out` in which a training goes on: claimed by `identity.json`, which names the folder itself."""
    return out.absolute().with_name(f".{out.name}.part")


def _claimed(draft: Path) -> bool:
    """Whether a folder is one in which a training of ours goes on: it, or its copy from elsewhere, is named by the identity in it."""
    try:
        found = json.loads((draft / IDENTITY).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and Path(str(found.get("folder", ""))).name == draft.name and {"settings", "versions"} <= set(found)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process trains in a folder at a time; the operating system frees it when that process ends, however it ends."""
    from safetensors import SafetensorError

    lock = out.with_name(f".{out.name}.lock")
    try:
        with one_process(lock, LoraError(f"another process is training {out}: wait for it, or give another folder.")):
            yield
            lock.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"cannot write {out} ({error}): what was trained up to the last whole epoch is kept and will be gone on with."
                        ) from error


def _make(job: Job, out: Path, identity: dict[str, Any]) -> None:
    """Train, or go on, beside `out`; then put it in its place, which is empty."""
    draft = _begin(_draft(out), identity)
    note = {**identity, **_train(job, draft)}
    for path in (*draft.glob("checkpoint-*"), draft / IDENTITY, draft / "README.md"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (draft / NOTE).write_text(json.dumps(note, indent=1), "utf-8")
    if out.is_dir():
        out.rmdir()    # fails where anything has come to lie in it
    draft.rename(out)


def _begin(draft: Path, identity: dict[str, Any]) -> Path:
    """The draft in which this very training goes on; one of ours with other settings, or moved from elsewhere, is thrown away."""
    wanted = json.dumps({**identity, "folder": str(draft), "versions": versions()})
    if draft.exists() and _claimed(draft) and (draft / IDENTITY).read_text("utf-8") != wanted:
        remove_own(draft, DRAFTED)
    if not draft.exists() or not any(draft.iterdir()):
        draft.mkdir(parents=True, exist_ok=True)
        write_text(draft / IDENTITY, wanted)
    return draft


def _treatment(out: Path, identity: dict[str, Any]) -> Treatment:
    note = read_object(out / NOTE, "", LoraError, advice=f"delete {out} to train this adapter anew")
    there, here = _flat(note), _flat(identity)
    other = [key for key, value in here.items() if there.get(key) != value]
    if other:
        said = "; ".join(f"{key} is {shown(there.get(key))} there and {shown(here[key])} here" for key in other[:MOST_SAID])
        more = f"; and {len(other) - MOST_SAID} more" if len(other) > MOST_SAID else ""
        raise LoraError(f"{out} holds an adapter of another training: {said}{more}. Give another folder, or delete it.")
    return trained_treatment(out)


def _flat(note: dict[str, Any]) -> dict[str, Any]:
    """The entries of a note, those of its tables by a name of their own: settings.rank."""
    tables = {key: value for key, value in note.items() if isinstance(value, dict)}
    inner = {f"{table}.{key}": value for table, entries in tables.items() for key, value in entries.items()}
    return {key: value for key, value in note.items() if key not in tables} | inner


def trained_treatment(folder: Path) -> Treatment:
    """The Treatment of a finished adapter folder, from its training.json.

    details: method, layers, parameters (trained ones), seconds, folder. Errors: LoraError if there is no training.json.
    """
    if not is_file(folder / NOTE):
        raise LoraError(f"{named('', folder)} is no adapter that was trained here: it has no training.json.")
    note = read_object(folder / NOTE, "", LoraError, needs=("method", "layers", "parameters", "seconds", "family"),
                       advice=f"delete {folder} to train this adapter anew")
    if not isinstance(note["layers"], list) or not all(type(layer) is int for layer in note["layers"]):
        raise LoraError(f"{folder / NOTE} is damaged: its layers are no list of whole numbers; delete {folder} to train this adapter anew.")
    details = {"method": note["method"], "layers": layers_text(note["layers"]), "parameters": str(note["parameters"]),
               "seconds": str(note["seconds"]), "folder": str(folder)}
    return Treatment(adapter_name(folder), adapter=adapter_name(folder), family=note["family"], details=details)


def _train(job: Job, folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    from alignblind_mi.trainer import ResumableTrainer, checkpoints, has_ended, seconds_of, state_of

    settings = job.settings
    model, tokenizer = load_huggingface(job.spec)
    data = job.prepare(model, tokenizer)
    if not data.train or (settings.validation_share and not data.validation):
        raise LoraError(f"the tokenizer of {job.spec.name} does not know the words of any training example.")
    set_seed(settings.seed)
    with quiet():
        peft = get_peft_model(model, LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(settings.modules),
            layers_to_transform=list(job.layers), task_type="CAUSAL_LM"))
    parameters = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    pad = int(tokenizer.pad_token_id)
    done = checkpoints(folder)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)    # transformers' own, about its next major version
        trainer = ResumableTrainer(
            model=peft, args=_arguments(settings, folder, job.spec), train_dataset=data.train, eval_dataset=data.validation or None,
            data_collator=lambda batch: collate(batch, pad), objective=data.objective, earlier=seconds_of(done[-1]) if done else 0.0,
            callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience else [])
        trainer.remove_callback(PrinterCallback)    # losses go to training.json, not to standard output
        if not (done and has_ended(state_of(done[-1]))):
            trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
    seconds, done = trainer.seconds, checkpoints(folder)
    state = state_of(done[-1])
    kept = folder / f"checkpoint-{state.best_global_step}" if data.validation else done[-1]
    peft.load_adapter(str(kept), "default", torch_device="cpu")
    peft.peft_config["default"].base_model_name_or_path = job.spec.name    # the name, not where it lies on this machine
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    note = {"examples": len(data.train), "examples_dropped": data.dropped, "parameters": parameters, "steps": state.global_step,
            "steps_planned": state.max_steps, "seconds": round(seconds, 2), **_losses(state, bool(data.validation)), "versions": versions()}
    if data.validation:
        note["examples_validation"] = len(data.validation)
    if data.objective is not None:
        peft.eval()
        items = data.validation or data.train
        batches = [{key: value.to(peft.device) for key, value in collate(items[i : i + settings.batch_size], pad).items()}
                   for i in range(0, len(items), settings.batch_size)]
        with torch.no_grad():
            note |= data.objective.facts(peft, batches)
    return note


def _losses(state: Any, validated: bool) -> dict[str, Any]:
    """One training loss an epoch and their mean; with a validation split its losses too, and the epoch (from 1) that was kept."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    found: dict[str, Any] = {"loss": sum(losses) / len(losses), "losses": losses}
    if validated:
        measured = [entry for entry in state.log_history if "eval_loss" in entry]
        steps = [entry["step"] for entry in measured]
        found |= {"validation_losses": [entry["eval_loss"] for entry in measured], "best_epoch": steps.index(state.best_global_step) + 1}
    return found


def _arguments(settings: LoraSettings, folder: Path, spec: ModelSpec) -> Any:
    from transformers import TrainingArguments

    validated: dict[str, Any] = {"eval_strategy": "epoch", "metric_for_best_model": "loss", "greater_is_better": False,
                                 "load_best_model_at_end": True, "per_device_eval_batch_size": settings.batch_size,
                                 "prediction_loss_only": True}
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation, learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_share, weight_decay=settings.weight_decay, seed=settings.seed, data_seed=settings.seed,
        save_strategy="epoch", restore_callback_states_from_checkpoint=True, logging_strategy="epoch",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, use_cpu=spec.device == "cpu",
        bf16=spec.dtype == "bfloat16" and spec.device != "cpu", dataloader_pin_memory=False,
        **(validated if settings.validation_share else {}))
    arguments._n_gpu = min(arguments.n_gpu, 1)    # else several GPUs would each get a batch: another batch size than the settings say
    return arguments
