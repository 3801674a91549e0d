"""The machinery behind everything that is trained: settings, layers, token ids, a folder that appears whole, a Treatment.

Training is transformers' Trainer (`trainer.py`) on the plain model with a PEFT LoRA adapter. It runs in a folder beside the result,
`.name.part`, which holds a checkpoint an epoch: what was killed goes on there, and a folder begun with other settings is thrown away. This
module does NOT know what the examples say, nor what a loss is for.
"""

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignblind_mi.borders.reading import is_file, named, read_object
from alignblind_mi.borders.settings import File, takes
from alignblind_mi.borders.texts import shown
from alignblind_mi.borders.writing import LEFTOVER, name_problem, one_process, refuse_taken, remove_own, write_text
from alignblind_mi.mitigations.examples import Item, collate
from alignblind_mi.mitigations.lora_settings import LoraError, LoraSettings, check_modules, layers_text
from alignblind_mi.models.configs import load_config, load_tokenizer, quiet
from alignblind_mi.models.edits import Treatment, adapter_name
from alignblind_mi.models.fingerprints import fingerprint
from alignblind_mi.models.loading import load_huggingface
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.progress import counted, interruptible
from alignblind_mi.results import versions

if TYPE_CHECKING:
    from alignblind_mi.mitigations.trainer import Objective

NOTE, IDENTITY = "training.json", "identity.json"
# What is in the folder of a training that goes on.
MOST_SAID = 5    # differences between two trainings that a sentence names
DRAFTED = re.compile(r"identity\.json|README\.md|adapter_config\.json|adapter_model\.safetensors|checkpoint-\d+|" + LEFTOVER.pattern)


"""The hyper-parameters of "Aligned but Blind" for Llama 3 8B."""


# ---- layers and modules ------------------------------------------------------------------------------------------------


# ---- token ids ---------------------------------------------------------------------------------------------------------


# ---- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is trained on, once the tokenizer and the untreated model are there. `objective` None is the language-model loss.

    `dropped`: examples that are not trained on; `cut`: those that lost a part of what is to be learnt to the longest length.
    """

    train: list[Item]
    validation: list[Item] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0
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
    if not _is_trained(out) and job.spec.tensor_parallel:
        raise LoraError(f"{out} is not trained with tensor parallelism: train it in one process (leave out tensor_parallel, "
                        "--tensor-parallel); what is trained may be used with it.")
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
    there, here = ({"protocol": "best"} | _flat(one) for one in (note, identity))    # what was trained before there were two
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


@takes(LoraError)
def trained_treatment(folder: File) -> Treatment:
    """The Treatment of a finished adapter folder, from its training.json.

    details: method, protocol, layers, parameters (trained ones), seconds, folder. Errors: LoraError if there is no training.json.
    """
    folder = Path(folder)
    if not is_file(folder / NOTE):
        raise LoraError(f"{named('', folder)} is no adapter that was trained here: it has no training.json.")
    note = read_object(folder / NOTE, "", LoraError, needs=("method", "layers", "parameters", "seconds", "family"),
                       advice=f"delete {folder} to train this adapter anew")
    if not isinstance(note["layers"], list) or not all(type(layer) is int for layer in note["layers"]):
        raise LoraError(f"{folder / NOTE} is damaged: its layers are no list of whole numbers; delete {folder} to train this adapter anew.")
    details = {"method": note["method"], "protocol": str(note.get("protocol", "best")), "layers": layers_text(note["layers"]),
               "parameters": str(note["parameters"]), "seconds": str(note["seconds"]), "folder": str(folder)}
    return Treatment(adapter_name(folder), adapter=adapter_name(folder), family=note["family"], details=details)


def _train(job: Job, folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    from alignblind_mi.mitigations.trainer import ResumableTrainer, Told, checkpoints, has_ended, seconds_of, state_of

    settings = job.settings
    model, tokenizer = load_huggingface(job.spec)
    data = job.prepare(model, tokenizer)
    if not data.train or (settings.validation_share and not data.validation):
        raise LoraError(f"no example is left to train on: {data.dropped} are not known to the tokenizer of {job.spec.name}, or have "
                        f"nothing to be learnt within {settings.max_length} tokens (max_length; {data.cut} are longer).")
    set_seed(settings.seed)
    with quiet():
        peft = get_peft_model(model, LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(settings.modules),
            layers_to_transform=list(job.layers), task_type="CAUSAL_LM"))
    parameters = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    pad = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)    # masked, and never learnt
    done = checkpoints(folder)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)    # transformers' own, about its next major version
        trainer = ResumableTrainer(
            model=peft, args=_arguments(settings, folder, job.spec), train_dataset=data.train, eval_dataset=data.validation or None,
            data_collator=lambda batch: collate(batch, pad), objective=data.objective, earlier=seconds_of(done[-1]) if done else 0.0,
            callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience else [])
        trainer.remove_callback(PrinterCallback)    # losses go to training.json, not to standard output
        if not (done and has_ended(state_of(done[-1]))):
            with counted(f"training {job.method}", None, "steps") as advance:
                trainer.add_callback(Told(advance))
                trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
    seconds, done = trainer.seconds, checkpoints(folder)
    state = state_of(done[-1])
    kept = folder / f"checkpoint-{state.best_global_step}" if data.validation else done[-1]
    peft.load_adapter(str(kept), "default", torch_device="cpu")
    peft.peft_config["default"].base_model_name_or_path = job.spec.name    # the name, not where it lies on this machine
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    note = {"examples": len(data.train), "examples_dropped": data.dropped, "examples_cut": data.cut, "parameters": parameters,
            "steps": state.global_step, "steps_planned": state.max_steps, "seconds": round(seconds, 2),
            **_losses(state, bool(data.validation)), "versions": versions()}
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
