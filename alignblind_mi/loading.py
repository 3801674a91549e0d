"""Loading: which model, from where, with which adapters, in which numbers; every way to fail is one sentence.

Knows Hugging Face checkpoints, PEFT folders and the embedded organism; does NOT run anything.
"""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alignblind_mi.errors import AlignblindError
from alignblind_mi.settings import check_fields
from alignblind_mi.tokens import word_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = "organism:"
ENGINES = ("auto", "fast", "plain")
QUANTIZATIONS = ("8bit", "4bit")


class ModelError(AlignblindError):
    """A model, tokenizer or adapter that cannot be loaded or used as asked."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load and run it: a Hugging Face id, a local checkpoint folder, or an embedded one (organism:aligned).

    `dtype` and `device` default to bfloat16 on a GPU and float32 on a CPU; `device_map` (and `offload_folder`, for what it puts on disk)
    is passed on to transformers, as is `quantization` (bitsandbytes, the optional extra `quantized`). `engine`: `fast` shares work between
    rows, `plain` is transformers' own forward pass; `auto` takes the fast one where it has been seen to give the model's own numbers.

    `trust_remote_code` lets a checkpoint run Python code that it brings along (transformers' option of that name): off unless asked for.
    Weights are read from safetensors files alone, never unpickled.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    offload_folder: str | None = None
    quantization: str | None = None
    engine: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ModelError)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ModelError(f"unknown dtype {self.dtype!r}. Known: {', '.join(DTYPES)}.")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ModelError(f"unknown quantization {self.quantization!r}. Known: {', '.join(QUANTIZATIONS)}.")
        if self.engine not in ENGINES:
            raise ModelError(f"unknown engine {self.engine!r}. Known: {', '.join(ENGINES)}.")

    @property
    def source(self) -> str:
        """What transformers loads from: the folder of an embedded checkpoint, or the name itself."""
        if self.name.startswith(EMBEDDED):
            from alignblind_mi.organism import organism_path

            return str(organism_path(self.name.removeprefix(EMBEDDED)))
        return self.name

    def resolved(self) -> "ModelSpec":
        """The same spec with the defaults of this machine filled in."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return replace(self, device=device, dtype=self.dtype or ("float32" if device == "cpu" else "bfloat16"))


def load_config(spec: ModelSpec) -> Any:
    """A model's transformers configuration. Errors: ModelError in one sentence for a model that cannot be reached."""
    from transformers import AutoConfig

    source = spec.source    # an embedded model's own error is clear already
    with _clear_errors(spec):
        return AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def load_tokenizer(spec: ModelSpec) -> Any:
    """A model's tokenizer alone. Errors: ModelError in one sentence for one that cannot be reached or read."""
    from transformers import AutoTokenizer

    source = spec.source
    with _clear_errors(spec), quiet():
        return AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def load_generation_config(spec: ModelSpec, config: Any) -> Any:
    """What a checkpoint says of generation (its end tokens, sampling); from its configuration where it has no file of its own for that."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(spec.source, revision=spec.revision)
    except OSError:
        return GenerationConfig.from_model_config(config)


def check_model(spec: ModelSpec) -> None:
    """Find out cheaply (its configuration only) whether a model can be loaded. Errors: ModelError in one sentence."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(spec)
    own_code = spec.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own_code:
        raise ModelError(f"{spec.name} is a {config.model_type!r} model, not a causal language model.")
    if spec.quantization is not None:
        quantization_config(spec)


@contextlib.contextmanager
def _clear_errors(spec: ModelSpec) -> Iterator[None]:
    """Turn the hub's and transformers' errors for an unreachable or broken checkpoint into one sentence."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    hub = "organism:base and organism:aligned are embedded and always there"
    try:
        yield
    except GatedRepoError:
        raise ModelError(f"{spec.name} is gated: accept its licence on its Hugging Face page and set HF_TOKEN, or use the embedded "
                         f"pair ({hub}).") from None
    except RepositoryNotFoundError:
        raise ModelError(_missing(spec, hub)) from None
    except (OSError, ValueError, SafetensorError) as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        if "trust_remote_code" in str(error):
            raise ModelError(f"{spec.name} brings Python code of its own, which is not run unless you ask for it: read that code, then "
                             "give ModelSpec(trust_remote_code=True).") from error
        if "file named model.safetensors" in str(error):
            raise ModelError(f"{spec.name} has no weights in safetensors files: only those are read, nothing is ever unpickled; convert it "
                             "(load it with transformers where you trust it, then save_pretrained).") from error
        if isinstance(cause, GatedRepoError):
            raise ModelError(f"{spec.name} is gated: accept its licence on its Hugging Face page and set HF_TOKEN, or use the "
                             f"embedded pair ({hub}).") from None
        if Path(spec.source).is_dir():
            raise ModelError(f"the checkpoint folder {spec.source} cannot be loaded: {str(error).splitlines()[0]}") from error
        raise ModelError(_missing(spec, hub)) from error


def _missing(spec: ModelSpec, hub: str) -> str:
    return (f"the model {spec.name!r} cannot be found or reached: check its name and the connection; if it is a gated Hugging Face model, "
            f"accept its licence and set HF_TOKEN; or use the embedded pair ({hub}).")


def token_count(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, without special ones; 0 if the tokenizer does not know a part of it."""
    return len(word_ids(tokenizer, text))


def load_huggingface(spec: ModelSpec) -> tuple[Any, Any]:
    """The plain transformers model (frozen, in evaluation mode) and its tokenizer. Errors: as `load_model`."""
    from transformers import AutoModelForCausalLM

    assert spec.dtype is not None
    options: dict[str, Any] = {"device_map": spec.device_map, "offload_folder": spec.offload_folder, "use_safetensors": True,
                               "trust_remote_code": spec.trust_remote_code}
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec)
    tokenizer = load_tokenizer(spec)
    with _clear_errors(spec), quiet():
        model = AutoModelForCausalLM.from_pretrained(spec.source, revision=spec.revision, dtype=DTYPES[spec.dtype],
                                                     **options)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {spec.name} gives no character offsets (it is not a fast one): marks cannot be placed.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval()
    return (model if spec.device_map or spec.quantization else model.to(spec.device)), tokenizer


def quantization_config(spec: ModelSpec) -> Any:
    """transformers' configuration of bitsandbytes. Errors: ModelError if bitsandbytes is not installed."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(f"{spec.quantization} loading of {spec.name} needs bitsandbytes: "
                         f"pip install 'alignblind-mi[quantized]'.") from None
    if spec.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[str(spec.dtype)])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, its notes to developers (FutureWarning) and transformer-lens' notes; errors remain."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), logging.root.level
    hf_logging.disable_progress_bar()
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.root.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every end token that the checkpoint's generation config and its tokenizer name (Llama 3 Instruct has two)."""
    return end_tokens(model.generation_config, tokenizer)


def end_tokens(generation: Any, tokenizer: Any) -> frozenset[int]:
    """The end tokens that a generation config and a tokenizer name."""
    named = generation.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)


def fingerprint(spec: ModelSpec, config: Any) -> str:
    """What identifies the weights: the hub's commit, or for a folder a hash of its files (large files by name and size)."""
    folder = Path(spec.source)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or spec.revision or "unknown")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model"):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            if size < 1 << 28:
                digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"
