"""Other libraries as rivals, each in a virtual environment of its own and a process that stays up between rounds.

They take part in the patchscope job, where each has a batched way. One that does not install or start is left out with a message.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

REQUIRES = {"nnsight": ["nnsight"], "nnterp": ["nnterp", "nnsight<0.7"], "pyvene": ["pyvene"]}
WORKER = Path(__file__).with_name("rival_worker.py")


def environment(name: str, folder: Path, say: Callable[[str], None]) -> Path | None:
    """The Python of a rival's environment, made if it is not there; None (said) where it does not install."""
    python = folder / name / "bin" / "python"
    if not (folder / name / "installed").is_file():
        say(f"installing {name} into {folder / name}")
        packages = [f"torch=={version('torch').split('+')[0]}", "safetensors", *REQUIRES[name]]
        for command in ([sys.executable, "-m", "venv", str(folder / name)], [str(python), "-m", "pip", "install", "--quiet", *packages]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                say(f"{name} is left out: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
                return None
        (folder / name / "installed").touch()
    return python


@contextmanager
def worker(name: str, python: Path, checkpoint: Path, job: dict[str, Any], tensors: dict[str, Tensor], folder: Path,
           say: Callable[[str], None]) -> Iterator[Callable[[], dict[str, Any]] | None]:
    """A running rival: calling it runs its batch once and gives its own seconds and probabilities. None if it does not start."""
    file = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    errors = (folder / f"{name}.err").open("w+", encoding="utf-8")
    process = subprocess.Popen([str(python), str(WORKER), name, str(checkpoint), str(file), json.dumps(job)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def run() -> dict[str, Any]:
        process.stdin.write("run\n")    # type: ignore[union-attr]
        process.stdin.flush()    # type: ignore[union-attr]
        found = json.loads(process.stdout.readline())    # type: ignore[union-attr]
        return {"timed": (found["seconds"], torch.tensor(found["probabilities"]))}

    try:
        ready = process.stdout.readline().strip() == "ready"
        if not ready:
            errors.seek(0)
            say(f"{name} is left out: {(errors.read().strip().splitlines() or ['it ended without a word'])[-1]}")
        yield run if ready else None
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()
        errors.close()
