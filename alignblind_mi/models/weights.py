"""Weights that must not be measured: files that would be unpickled, that lie elsewhere, that do not fit the model, or are not finite.

Names and places are checked before transformers or PEFT sees a file; what was loaded is checked against what was there, since both of them
draw what is missing at random and leave out what does not fit. Does NOT know how a model is run.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from alignblind_mi.models.configs import load_config
from alignblind_mi.models.spec import ModelError, ModelSpec

INDEX, ADAPTER_CONFIG = "model.safetensors.index.json", "adapter_config.json"
WHOLE = ("model.safetensors", INDEX)
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
ASK = "convert it, or ask for it where you trust who made it (ModelSpec(allow_pickle=True), --allow-pickle)"


# ---- files, before anything is loaded ----------------------------------------------------------------------------------


def check_folder(spec: ModelSpec) -> None:
    """Look at the files of a model's folder, if it is one: nothing to unpickle, nothing from elsewhere. Errors: ModelError."""
    source = Path(spec.source)
    if source.is_file():
        raise ModelError(f"{spec.name} is a file: give the checkpoint folder that holds config.json and the weights, or a .gguf file.")
    if not source.is_dir():
        return
    if (source / ADAPTER_CONFIG).is_file():
        raise ModelError(_embedded(spec))
    config = load_config(spec)
    if spec.gguf_file is not None:
        return
    _check_named(spec, config)
    entry = next((name for name in _entries(spec, config) if (source / name).is_file()), None)
    if entry is None or not entry.endswith(".index.json"):
        return
    for name in _shards(spec, source / entry):
        if not (source / name).is_file():
            raise ModelError(f"{source / entry} names the file {name!r}, which is not in the folder: fetch the checkpoint again.")


def check_repository(spec: ModelSpec) -> None:
    """`check_folder`, and the same of a repository on the hub, of which no more than its index is fetched. Errors: ModelError; OSError for
    one that cannot be reached."""
    if Path(spec.source).exists():
        check_folder(spec)
        return
    if _cached(spec, ADAPTER_CONFIG) is not None:
        raise ModelError(_embedded(spec))
    config = load_config(spec)
    if spec.gguf_file is not None:
        return
    _check_named(spec, config)
    for name in _entries(spec, config):
        found = _cached(spec, name) if name.endswith(".index.json") else None
        if found is not None:
            _shards(spec, found)


def _embedded(spec: ModelSpec) -> str:
    return (f"{spec.name} holds a LoRA adapter ({ADAPTER_CONFIG}), which would be loaded with the model unseen: give the base model as the "
            "model and the adapter's folder as an adapter.")


def _entries(spec: ModelSpec, config: Any) -> tuple[str, ...]:
    """The files that transformers begins with, the first that is there."""
    named = getattr(config, "transformers_weights", None)
    return (str(named),) if named is not None else (*WHOLE, *(PICKLED if spec.allow_pickle else ()))


def _check_named(spec: ModelSpec, config: Any) -> None:
    """A configuration may itself name the file of weights."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        problem = _problem(named, spec, (".safetensors", ".safetensors.index.json"))
        if problem:
            raise ModelError(f"the configuration of {spec.name} names the weights {named!r}, {problem}.")


def _shards(spec: ModelSpec, index: Path) -> list[str]:
    """The files that an index names, each plain. Errors: ModelError for an index that cannot be read or names another one."""
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        shards = sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of weights ({type(error).__name__}): fetch the checkpoint again.") from error
    if not shards:
        raise ModelError(f"{index} names no weights: fetch the checkpoint again.")
    for name in shards:
        problem = _problem(name, spec, (".safetensors",))
        if problem:
            raise ModelError(f"{index} names the weights {name!r}, {problem}.")
    return shards


def _problem(name: Any, spec: ModelSpec, suffixes: tuple[str, ...]) -> str:
    """What is wrong with a name of a file of weights, or nothing."""
    if not isinstance(name, str) or not name or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
        return "which is no plain name of a file in its folder: weights are read from nowhere else"
    if not name.endswith(suffixes) and not (spec.allow_pickle and name.endswith(".bin")):
        return f"which is no safetensors file: only those are read, nothing is unpickled; {ASK}"
    return ""


def _cached(spec: ModelSpec, name: str) -> Path | None:
    """A small file of a repository on the hub, fetched if need be; None if there is none."""
    from transformers.utils import cached_file

    found = cached_file(spec.source, name, revision=spec.revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def files_of(spec: ModelSpec, config: Any) -> list[Path]:
    """The files of weights that a loaded model was read from."""
    if spec.gguf_file is not None:
        return []    # its blocks are expanded into memory
    folder = Path(spec.source)

    def find(name: str) -> Path | None:
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        return _cached(spec, name)

    for entry in _entries(spec, config):
        first = find(entry)
        if first is not None:
            names = _shards(spec, first) if entry.endswith(".index.json") else [entry]
            return [path for name in names if (path := find(name)) is not None]
    return []


def check_adapter_files(folder: Path, allow_pickle: bool) -> None:
    """An adapter's weights are in a safetensors file. Errors: ModelError naming the file that is missing, or would be unpickled."""
    if (folder / ADAPTER).is_file() or (allow_pickle and (folder / PICKLED_ADAPTER).is_file()):
        return
    there = f"it has {PICKLED_ADAPTER} instead, which would be unpickled; {ASK}" if (folder / PICKLED_ADAPTER).is_file() else "convert it"
    raise ModelError(f"the adapter {folder} has no {ADAPTER}: weights are read from safetensors files alone, never unpickled; {there}.")


def pickles_in(folder: Path) -> list[Path]:
    """Files below a folder that whoever reads them would unpickle."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLES)


# ---- what was loaded ---------------------------------------------------------------------------------------------------


def check_loaded(spec: ModelSpec, model: Any, found: Mapping[str, Any]) -> None:
    """All weights of a model come from its checkpoint, all of the checkpoint is in the model, and all of it is finite.

    `found` is transformers' loading info, without what it ignores by itself (tied weights, buffers that older versions saved). Errors:
    ModelError naming one or two keys, and how many there are.
    """
    misfits = [
        (found["missing_keys"], "lacks weights of the model, which would be drawn at random"),
        ([f"{key} (shape {_shape(there)}, the model's is {_shape(here)})" for key, there, here in found["mismatched_keys"]],
         "has weights of other shapes than the model's"),
        (found["unexpected_keys"], "has weights that the model has no place for")]
    for keys, what in misfits:
        if keys:
            raise ModelError(f"the checkpoint of {spec.name} {what}: {named(keys)}. Its config.json (layers, sizes, tied embeddings) and "
                             "its weights do not belong together, or the weights have other names: fetch or save it again.")
    broken = list(_not_finite_in(model))
    if not broken and _is_elsewhere(model):
        broken = [key for file in files_of(spec, model.config) for key, tensor in _tensors_of(file) if not is_finite(tensor)]
    if broken:
        raise ModelError(f"the checkpoint of {spec.name} has weights that are not finite (NaN or infinite) in {spec.dtype}: {named(broken)}"
                         ". Nothing can be measured on it: fetch it again, or load it in numbers with a wider range (float32, bfloat16).")


def named(keys: Collection[str]) -> str:
    """One or two keys, and how many there are."""
    first = sorted(keys)[:2]
    return " and ".join(first) if len(keys) <= len(first) else f"{', '.join(first)} ... ({len(keys)} in all)"


def _shape(sizes: Collection[int]) -> str:
    return "x".join(map(str, sizes)) or "a number"


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; true for whole numbers and packed bits. One pass, without a copy."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor    # a process' own part
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float())    # NaN and infinity carry through
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _not_finite_in(model: Any) -> Iterator[str]:
    """Parameters in memory that are not finite, and buffers of the checkpoint that are not numbers (masks may be infinite)."""
    parameters = dict(model.named_parameters())
    for name, tensor in parameters.items():
        if not tensor.is_meta and not is_finite(tensor):
            yield name
    for name, tensor in model.state_dict().items():
        seen = name not in parameters and isinstance(tensor, Tensor) and not tensor.is_meta and tensor.is_floating_point()
        if seen and bool(torch.isnan(tensor.float()).any()):
            yield name


def _is_elsewhere(model: Any) -> bool:
    """Whether weights cannot be seen in memory: offloaded ones, and quantised ones, whose packed bits are always finite."""
    return any(p.is_meta or not p.is_floating_point() or p.dtype.itemsize == 1 for p in model.parameters())


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of weights, one after the other."""
    from safetensors import safe_open
    from transformers.modeling_utils import load_state_dict

    if file.suffix != ".safetensors":    # only where it was asked for: see `check_repository`
        yield from load_state_dict(str(file)).items()
        return
    with safe_open(str(file), "pt") as opened:
        for key in opened.keys():    # noqa: SIM118 - it is no mapping
            yield key, opened.get_tensor(key)


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in an adapter's file, by their names in it."""
    from peft.utils.save_and_load import load_peft_weights

    return load_peft_weights(str(folder), device="cpu")


def check_adapter(peft: Any, name: str, folder: Path, model: str) -> None:
    """All of an adapter's file is in the model, and all of that adapter in the model comes from the file, which holds finite numbers.

    PEFT warns at most. Its own reading is done once more, so that what it renames is renamed here too. Errors: ModelError naming one or two
    keys, and how many there are.
    """
    from peft.utils.save_and_load import set_peft_model_state_dict

    weights = adapter_weights(folder)
    if not weights:
        raise ModelError(f"the adapter {folder} holds no weights: train or fetch it again.")
    broken = [key for key, tensor in weights.items() if not is_finite(tensor)]
    if broken:
        raise ModelError(f"the adapter {folder} has weights that are not finite (NaN or infinite): {named(broken)}. Nothing can be "
                         "measured with it: train or fetch it again.")
    read = set_peft_model_state_dict(peft, weights, adapter_name=name)
    if read.unexpected_keys:
        raise ModelError(f"the adapter {folder} does not fit {model}: the model has no place for {named(read.unexpected_keys)}. It was "
                         "trained on another model or another class of it (such as one without the head), or its weights were renamed.")
    state, missing = peft.state_dict(), set(read.missing_keys)
    given = {state[key].data_ptr() for key in state if key not in missing and not state[key].is_meta}    # shared where layers are tied
    unset = [key for key in missing if _belongs(key, name) and (state[key].is_meta or state[key].data_ptr() not in given)]
    if unset:
        raise ModelError(f"the adapter {folder} does not fit {model}: its file lacks {named(unset)}, which its {ADAPTER_CONFIG} promises.")


def _belongs(key: str, adapter: str) -> bool:
    """Whether a key of a PEFT model is a weight of this adapter."""
    return re.search(rf"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{re.escape(adapter)}(\.|$)", key) is not None
