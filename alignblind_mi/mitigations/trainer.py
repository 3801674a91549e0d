"""transformers' Trainer with a loss of one's own, and with checkpoints that hold no pickle and lose nothing.

A checkpoint after each epoch is the adapter (PEFT's safetensors), the optimiser's moments and the random generators' states
(safetensors), and the rest of both with the schedule (JSON). A training that goes on from one gives the weights of an undisturbed one, bit
for bit where the arithmetic itself is deterministic (one CPU thread). This module does NOT know texts, or what a loss is for.
"""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from alignblind_mi.models.spec import ModelError
from alignblind_mi.models.weights import ADAPTER, pickles_in
from alignblind_mi.progress import Counter

OPTIMIZER, GENERATORS, STATE = "optimizer.safetensors", "generators.safetensors", "training_state.json"
WHOLE = "whole.json"    # written last: a checkpoint without it was cut off by a kill


@runtime_checkable
class Objective(Protocol):
    """A loss in place of the language model's own, and what there is to say about it afterwards."""

    def __call__(self, model: Any, inputs: dict[str, Tensor], standard: Any, share: float) -> tuple[Tensor, Any]:
        """The loss of a batch and the model's output.

        `standard(inputs)` gives both for the language-model loss, scaled for gradient accumulation; `share` is the weight of this batch
        among those whose gradients are added up, for terms that are means over the batch.
        """

    def over(self) -> bool:
        """Whether training is to stop here; asked after each step."""

    def facts(self, model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
        """What goes into training.json, measured on these batches with the finished adapter."""


class Told(TrainerCallback):
    """Tells a counter of the steps of a training."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        """A training that goes on has some steps behind it."""
        self.counter.total = state.max_steps - state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        """One step more."""
        self.counter(1)


class ResumableTrainer(Trainer):
    """See the module. `objective` None is the language-model loss as transformers computes it."""

    def __init__(self, *args: Any, objective: Objective | None = None, earlier: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.objective, self._earlier, self._begun = objective, earlier, time.monotonic()
        if objective is not None:
            self.add_callback(_StopWhenOver(objective))

    @property
    def seconds(self) -> float:
        """Time spent in training, with that of the runs before a kill up to their last checkpoint."""
        return self._earlier + time.monotonic() - self._begun

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The objective's loss; see `Objective`."""
        def standard(rest: dict[str, Tensor]) -> Any:
            return super(ResumableTrainer, self).compute_loss(model, rest, True, num_items_in_batch)

        scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None    # else the Trainer divides by the number of batches
        share = 1 / self.current_gradient_accumulation_steps if model.training and scaled else 1.0
        loss, outputs = standard(inputs) if self.objective is None else self.objective(model, inputs, standard, share)
        return (loss, outputs) if return_outputs else loss

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()
        save_file({f"{index}.{name}": value.contiguous() for index, entry in state["state"].items() for name, value in entry.items()},
                  str(Path(output_dir) / OPTIMIZER))
        note = {"groups": state["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        (Path(output_dir) / STATE).write_text(json.dumps(note), "utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        note = json.loads((Path(checkpoint) / STATE).read_text("utf-8"))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(str(Path(checkpoint) / OPTIMIZER)).items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        groups = [{key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in note["groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(note["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        states = {"cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        kind, keys, *rest = np.random.get_state()
        note = {"python": random.getstate(), "numpy": [kind, *rest]}
        save_file({**states, "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}, str(Path(output_dir) / GENERATORS),
                  metadata={"states": json.dumps(note)})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        from safetensors import safe_open

        path = str(Path(checkpoint) / GENERATORS)
        states = load_file(path)
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["states"])
        version, words, gauss = note["python"]
        random.setstate((version, tuple(words), gauss))
        kind, *rest = note["numpy"]
        np.random.set_state((kind, states["numpy"].numpy().astype(np.uint32), *rest))
        torch.random.set_rng_state(states["cpu"])
        for name, state in states.items():
            if name.startswith("cuda."):
                torch.cuda.set_rng_state(state, int(name.removeprefix("cuda.")))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir)
        (folder / f"checkpoint-{self.state.global_step}" / WHOLE).write_text(json.dumps({"seconds": self.seconds}), "utf-8")
        kept = {f"checkpoint-{step}" for step in (self.state.global_step, self.state.best_global_step)}
        for path in checkpoints(folder):
            if path.name not in kept:
                (path / WHOLE).unlink()
                shutil.rmtree(path)


class _StopWhenOver(TrainerCallback):
    """Ends training when the objective says so; the epoch's end, with its checkpoint, still comes."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.objective.over():
            control.should_training_stop = True


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a training, oldest first; what a kill cut off is removed.

    Errors: ModelError for one in which lies what would be unpickled, which no training of ours writes, or which lacks its weights.
    """
    found = {}
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).is_file():
            _check(path)
            found[int(path.name.removeprefix("checkpoint-"))] = path
        else:
            shutil.rmtree(path)
    return [found[step] for step in sorted(found)]


def _check(checkpoint: Path) -> None:
    """Errors: ModelError for a checkpoint that is not as it was written: transformers' Trainer and PEFT would take other files instead."""
    for file in pickles_in(checkpoint):
        raise ModelError(f"{file} was not written by this training, and nothing is unpickled: remove it, or delete {checkpoint.parent} to "
                         "train anew.")
    for name in (ADAPTER, OPTIMIZER, GENERATORS, STATE):
        if not (checkpoint / name).is_file():
            raise ModelError(f"the checkpoint {checkpoint} has no {name}: delete {checkpoint.parent} to train anew.")


def seconds_of(checkpoint: Path) -> float:
    """The training time up to a checkpoint."""
    return float(json.loads((checkpoint / WHOLE).read_text("utf-8"))["seconds"])


def state_of(checkpoint: Path) -> Any:
    """transformers' TrainerState at a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def has_ended(state: Any) -> bool:
    """Whether the training was over at this state: all steps done, or stopped early."""
    return bool(state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"])
