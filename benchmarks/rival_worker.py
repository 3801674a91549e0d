"""Runs inside a rival's own environment (it imports nothing of this project): one batched patchscope, timed each time a line comes in."""

import contextlib
import importlib
import io
import json
import sys
import time
import warnings
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def nnsight(folder: str, ids: Any, vectors: Any, layer: int, at: int) -> Any:
    """nnsight: a trace over the whole batch."""
    model = importlib.import_module("nnsight").LanguageModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
                                                             tokenizer=AutoTokenizer.from_pretrained(folder))

    def run() -> Any:
        with model.trace(ids):
            model.model.layers[layer].output[:, at] = vectors
            logits = model.lm_head.output[:, -1].save()
        return logits

    return run


def nnterp(folder: str, ids: Any, vectors: Any, layer: int, at: int) -> Any:
    """nnterp: the same through its standardised names."""
    model = importlib.import_module("nnterp").StandardizedTransformer(folder, dtype=torch.float32)

    def run() -> Any:
        with model.trace(ids):
            model.layers_output[layer][:, at] = vectors
            logits = model.logits[:, -1].save()
        return logits

    return run


def pyvene(folder: str, ids: Any, vectors: Any, layer: int, at: int) -> Any:
    """pyvene: a vanilla intervention with given source representations."""
    library = importlib.import_module("pyvene")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    intervention = library.VanillaIntervention(embed_dim=vectors.shape[1])
    intervenable = library.IntervenableModel([{"layer": layer, "component": "block_output", "intervention": intervention}], model=model)

    def run() -> Any:
        _, out = intervenable({"input_ids": ids}, unit_locations={"sources->base": (None, [[[at]] * len(ids)])},
                              source_representations=vectors[:, None])
        return out.logits[:, -1]

    return run


def main() -> None:
    """`rival_worker.py NAME CHECKPOINT TENSORS JOB`: says "ready", then answers every line with seconds and probabilities."""
    name, folder, file, job = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    settings, tensors = json.loads(job), load_file(file)
    ids = tensors["ids"].repeat(len(tensors["vectors"]), 1)
    out = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()):
        run = {"nnsight": nnsight, "nnterp": nnterp, "pyvene": pyvene}[name](folder, ids, tensors["vectors"], settings["layer"],
                                                                             settings["position"])
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            probabilities = run().softmax(-1)[:, settings["targets"]]
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "probabilities": probabilities.tolist()}), file=out, flush=True)


if __name__ == "__main__":
    main()
