"""Which model, from where, with which adapters and numbers: values that are checked before anything is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from alignblind_mi.borders import ranks
from alignblind_mi.borders.settings import Made, PathText, check_fields, path_text, widened
from alignblind_mi.borders.texts import one_line, shown
from alignblind_mi.errors import AlignblindError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = "organism:"
ENGINES = ("auto", "fast", "plain")
QUANTIZATIONS = ("8bit", "4bit")


class ModelError(AlignblindError):
    """A model, tokenizer or adapter that cannot be loaded or used as asked."""


@widened
@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load and run it: a Hugging Face id, a local checkpoint folder, or an embedded one (organism:aligned).

    A GGUF file is named by its path, or by its place in a repository on the hub (owner/name/file.gguf). Its weights are expanded when it
    is read: numbers on it are those of the quantised model, in `dtype`.

    `dtype` and `device` default to bfloat16 on a GPU and float32 on a CPU; `device_map` (and `offload_folder`, for what it puts on disk)
    is passed on to transformers, as is `quantization` (bitsandbytes, the optional extra `quantized`). `engine`: `fast` shares work between
    rows, `plain` is transformers' own forward pass; `auto` takes the fast one where it has been seen to give the model's own numbers.

    `tensor_parallel`: every process that torchrun has started holds a part of each layer, by transformers' plan of the model's family; all
    of them run the same calls. How numbers come about is no setting of a study: its folder may be begun without and gone on with, or the
    other way round.

    `trust_remote_code` lets a checkpoint run Python code that it brings along (transformers' option of that name): off unless asked for.
    Weights are read from safetensors files alone, and never unpickled unless `allow_pickle` asks for it (a model's or an adapter's .bin
    files are read then where there are no others, by torch with weights_only: from makers that you trust).
    """

    __repr__ = one_line

    name: PathText
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    offload_folder: PathText | None = None
    quantization: str | None = None
    engine: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    tensor_parallel: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ModelError)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ModelError(f"unknown dtype {self.dtype!r}. Known: {', '.join(DTYPES)}.")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ModelError(f"unknown quantization {self.quantization!r}. Known: {', '.join(QUANTIZATIONS)}.")
        if self.device is not None:
            _device(self.device)
        if self.quantization is not None and self.gguf_file is not None:
            raise ModelError(f"{self.name} is a GGUF file: its weights are quantised already, and are expanded when it is read; leave out "
                             "the quantization.")
        beside = next((name for name in ("device_map", "quantization", "gguf_file") if getattr(self, name) is not None), None)
        if self.tensor_parallel and beside is not None:
            raise ModelError(f"{self.name} cannot be loaded with tensor parallelism and a {beside} at once: leave out one of them.")
        if self.engine not in ENGINES:
            raise ModelError(f"unknown engine {self.engine!r}. Known: {', '.join(ENGINES)}.")

    @property
    def gguf_file(self) -> str | None:
        """The GGUF file that the name names, as it is called in its folder or its repository (see `source`); None for other models."""
        return None if self._gguf is None else self._gguf[1]

    @property
    def source(self) -> str:
        """What transformers loads from: the folder of an embedded checkpoint or of a GGUF file, or the name itself."""
        if self._gguf is not None:
            return self._gguf[0]
        if self.name.startswith(EMBEDDED):
            from alignblind_mi.models.embedded import organism_path

            return str(organism_path(self.name.removeprefix(EMBEDDED)))
        return self.name

    @property
    def _gguf(self) -> tuple[str, str] | None:
        """The folder or the repository of a GGUF file, and its name there."""
        path = Path(self.name)
        if path.suffix.lower() != ".gguf":
            return None
        on_the_hub = not path.parent.is_dir() and not path.is_absolute() and len(path.parts) > 2
        return ("/".join(path.parts[:2]), "/".join(path.parts[2:])) if on_the_hub else (str(path.parent), path.name)

    @property
    def options(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` is given beside the source, of a configuration, a tokenizer and a model alike."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code,
                **({} if self.gguf_file is None else {"gguf_file": self.gguf_file})}

    def resolved(self) -> "ModelSpec":
        """The same spec with the defaults of this machine filled in. Errors: ModelError for devices that this machine has not."""
        check_device(self)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return replace(self, device=device, dtype=self.dtype or ("float32" if device == "cpu" else "bfloat16"))


def as_spec(value: Any) -> ModelSpec:
    """A spec as it is; a model's name, or the path of its folder, as the spec of it alone. Errors: TypeError for anything else."""
    return value if isinstance(value, ModelSpec) else ModelSpec(path_text(value))


AnySpec = Annotated[ModelSpec | str | Path, Made(as_spec, "a ModelSpec, a model's name or its folder", ModelSpec | str | Path)]


def check_device(spec: ModelSpec) -> None:
    """Whether this machine has the devices that a spec names. Errors: ModelError saying which there are."""
    if spec.tensor_parallel:
        _check_processes(spec)
    if spec.device is not None:
        _check_device(spec.device)
    known, given = ("auto", "balanced", "balanced_low_0", "sequential"), spec.device_map
    if isinstance(given, dict):
        for place in given.values():
            if place == "disk" and spec.offload_folder is None:
                raise ModelError("the device map puts layers on disk: give an offload_folder for them, or another place.")
            if place != "disk":
                _check_device(f"cuda:{place}" if type(place) is int else place)
    elif given is not None and given not in known:
        try:
            _check_device(given)
        except ModelError as error:
            raise ModelError(f"the device map {given!r} cannot be used: give {', '.join(known)}, or a device: {error}") from error
    if spec.quantization is not None and torch.device(spec.device or "cpu").type == "mps":
        raise ModelError(f"{spec.quantization} loading does not run on {spec.device}: leave out the quantization, or use a CUDA GPU.")


def _check_processes(spec: ModelSpec) -> None:
    """Whether several processes run, each with a device of its own. Errors: ModelError saying how to start them."""
    count, kind = ranks.started(), ranks.kind()
    if count < 2:
        raise ModelError(f"{spec.name} is to be loaded with tensor parallelism, which needs several processes: start with "
                         "torchrun --nproc-per-node N -m alignblind_mi ..., or leave it out.")
    if spec.device not in (None, kind):
        raise ModelError(f"tensor parallelism works on all {kind} devices of this machine, not on {spec.device!r}: leave out the device.")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and count > torch.cuda.device_count()):
        raise ModelError(f"torchrun has started {count} processes, and this machine has {torch.accelerator.device_count()} devices of the "
                         f"kind {kind}: start one process for each CUDA GPU.")


def _device(name: Any) -> torch.device:
    """A device by its name, whether this machine has it or not. Errors: ModelError for a name of none."""
    try:
        device = torch.device(name) if isinstance(name, str) else None
    except (RuntimeError, ValueError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ModelError(f"unknown device {shown(name)}: give cpu, cuda, cuda:0 (a number) or mps.")
    return device


def _check_device(name: Any) -> None:
    device = _device(name)
    module = torch.get_device_module(device.type)
    count = 1 if device.type in ("cpu", "mps") else module.device_count()
    if not module.is_available() or (device.index or 0) >= count:
        raise ModelError(f"there is no device {name!r} that torch can use here: give cpu, or one that this machine has.")


def not_finite(spec: ModelSpec) -> ModelError:
    """The error for a model whose activations become NaN or infinite: which numbers it ran in, and which would hold."""
    wider = {"float16": "load it in bfloat16 or float32, whose range is wider (dtype, --dtype)", "bfloat16": "load it in float32 (--dtype)"}
    advice = wider.get(str(spec.dtype), "its weights, or a vector that is put into it, are too large")
    return ModelError(f"the numbers of {spec.name} become NaN or infinite in {spec.dtype}, so that no answer of it means anything: "
                      f"{advice}.")
