"""Loading: which model, from where, with which adapters, in which numbers; every way to fail is one sentence.

Knows Hugging Face checkpoints, PEFT folders and the embedded organism; does NOT run anything.
"""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alignblind_mi.borders import NOTE, TABLE, check_file, foreign, is_file, is_folder, is_panic, read_object, said
from alignblind_mi.errors import AlignblindError
from alignblind_mi.settings import check_fields, shown
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
    Weights are read from safetensors files alone, and never unpickled unless `allow_pickle` asks for it (a model's or an adapter's .bin
    files are read then where there are no others, by torch with weights_only: from makers that you trust).
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
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ModelError)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ModelError(f"unknown dtype {self.dtype!r}. Known: {', '.join(DTYPES)}.")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ModelError(f"unknown quantization {self.quantization!r}. Known: {', '.join(QUANTIZATIONS)}.")
        if self.device is not None:
            _device(self.device)
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
        """The same spec with the defaults of this machine filled in. Errors: ModelError for devices that this machine has not."""
        check_device(self)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return replace(self, device=device, dtype=self.dtype or ("float32" if device == "cpu" else "bfloat16"))


def load_config(spec: ModelSpec) -> Any:
    """A model's transformers configuration. Errors: ModelError in one sentence for a model that cannot be reached."""
    from transformers import AutoConfig

    source = spec.source    # an embedded model's own error is clear already
    if spec.revision is not None and (spec.name.startswith(EMBEDDED) or is_folder(source)):
        raise ModelError(f"the revision {spec.revision!r} was given for {spec.name}, which is not on the hub: it has no other versions; "
                         "leave it out.")
    _check_folder(spec)
    with _clear_errors(spec):
        config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    check_sizes(config, spec.name)
    return config


def load_tokenizer(spec: ModelSpec) -> Any:
    """A model's tokenizer alone. Errors: ModelError in one sentence for one that cannot be reached or read."""
    from transformers import AutoTokenizer

    source = spec.source
    _check_folder(spec)
    with _clear_errors(spec), quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        tokenizer("")    # some settings that cannot be are found out only now
    return tokenizer


def load_generation_config(spec: ModelSpec, config: Any) -> Any:
    """What a checkpoint says of generation (its end tokens, sampling); from its configuration where it has no file of its own for that."""
    from transformers import GenerationConfig

    try:
        with _clear_errors(spec, but=OSError):
            return GenerationConfig.from_pretrained(spec.source, revision=spec.revision)
    except OSError:
        return GenerationConfig.from_model_config(config)


def check_device(spec: ModelSpec) -> None:
    """Whether this machine has the devices that a spec names. Errors: ModelError saying which there are."""
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


def _check_folder(spec: ModelSpec) -> None:
    """Whether the notes of a checkpoint folder are regular files of a bounded size. Errors: ModelError naming the one that is not."""
    if not is_folder(spec.source):
        return
    for file in sorted(Path(spec.source).iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors") and not file.name.startswith("."):
            vocabulary = file.suffix in (".model", ".txt") or file.name in ("tokenizer.json", "vocab.json")
            limit = TABLE if vocabulary else NOTE * 4
            check_file(file, f"{spec.name}:", ModelError, limit=1 << 50 if file.suffix == ".safetensors" else limit)
    generation = Path(spec.source) / "generation_config.json"
    if is_file(generation):    # transformers passes over one that it cannot read
        _check_ids(read_object(generation, "", ModelError, advice="save the checkpoint anew"), str(generation))


def _check_ids(settings: Mapping[str, Any], where: str) -> None:
    """Whether the special tokens that settings name can be tokens. Errors: ModelError naming the entry."""
    for key in ("eos_token_id", "bos_token_id"):
        given = settings.get(key)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and (type(value) is not int or not 0 <= value < SIZES["vocab_size"]):
                raise ModelError(f"{where} says {key} = {str(value)[:60]}: the number of a token was expected; mend it.")


SIZES = {"num_hidden_layers": 1000, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_attention_heads": 1 << 12,
         "num_key_value_heads": 1 << 12, "head_dim": 1 << 14, "vocab_size": 1 << 23, "max_position_embeddings": 1 << 30,
         "num_local_experts": 1 << 12, "num_experts": 1 << 12, "n_routed_experts": 1 << 12}    # the largest that is believed


def check_sizes(config: Any, name: str) -> None:
    """Whether the numbers of a configuration are those of a model, before anything is built of them. Errors: ModelError naming one."""
    with foreign(f"the configuration of {name} cannot be used", ModelError):
        text = config.get_text_config()
    for key, most in SIZES.items():
        given = getattr(text, key, None)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and (type(value) is not int or not 0 <= value <= most or (value == 0 and key in LEAST)):
                raise ModelError(f"the configuration of {name} says {key} = {str(value)[:60]!s}: a whole number from 1 to {most:,} was "
                                 "expected; mend its config.json, or use another model.")
    _check_ids(vars(text), f"the configuration of {name}")
    ropes = getattr(text, "rope_parameters", None)
    broken = {**{key: value for key, value in vars(text).items() if isinstance(value, float)},
              **{f"rope {key}": value for key, value in _numbers(ropes)}}
    for key, value in broken.items():
        if not -1e30 < value < 1e30 or (key in ("rope rope_theta", "rope factor") and value <= 0):
            raise ModelError(f"the configuration of {name} says {key} = {value}: a finite number was expected (above 0 for rope's); mend "
                             "its config.json, or use another model.")


LEAST = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
         "max_position_embeddings")    # without which there is no model


def _numbers(table: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a table, those of tables in it too (rope's may be one for each kind of layer)."""
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(key), float(value) if abs(value) < 1e30 else float("inf")


def check_vocabulary_size(model: Any, tokenizer: Any, name: str) -> None:
    """Whether every token has a row of the embedding. Errors: ModelError saying how many there are of both."""
    rows, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ModelError(f"the tokenizer of {name} has the token id {largest}, its embedding {rows} rows: resize it "
                         "(resize_token_embeddings) and save the checkpoint again.")


def check_model(spec: ModelSpec) -> None:
    """Find out cheaply (its configuration, and the names of its files where they lie here) whether a model can be loaded.

    Errors: ModelError in one sentence.
    """
    from alignblind_mi.weights import check_folder

    check_config(spec)
    check_folder(spec)


def check_config(spec: ModelSpec) -> None:
    """`check_model` without the files of weights. Errors: ModelError in one sentence."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    check_device(spec)
    config = load_config(spec)
    own_code = spec.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own_code:
        raise ModelError(f"{spec.name} is a {config.model_type!r} model, not a causal language model.")
    if spec.quantization is not None:
        if spec.name.startswith(EMBEDDED):
            raise ModelError(f"{spec.name} cannot be quantised: it is tiny, and was measured as it is; leave out the quantization.")
        quantization_config(spec)


@contextlib.contextmanager
def _clear_errors(spec: ModelSpec, but: type[Exception] | None = None) -> Iterator[None]:
    """Turn whatever the hub, transformers and tokenizers raise for an unreachable or broken checkpoint into one sentence (`but` what is
    expected). Around their calls alone."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    hub = "organism:base and organism:aligned are embedded and always there"
    try:
        yield
    except AlignblindError:
        raise
    except GatedRepoError:
        raise ModelError(f"{spec.name} is gated: accept its licence on its Hugging Face page and set HF_TOKEN, or use the embedded "
                         f"pair ({hub}).") from None
    except RepositoryNotFoundError:
        raise ModelError(_missing(spec, hub)) from None
    except (OSError, ValueError, SafetensorError) as error:
        if but is not None and isinstance(error, but):
            raise
        cause = error.__cause__ if error.__cause__ is not None else error
        if "trust_remote_code" in str(error):
            raise ModelError(f"{spec.name} brings Python code of its own, which is not run unless you ask for it: read that code, then "
                             "give ModelSpec(trust_remote_code=True).") from error
        if "file named model.safetensors" in str(error):
            raise ModelError(f"{spec.name} has no weights in safetensors files: only those are read, nothing is unpickled; convert it "
                             "(load it with transformers where you trust it, then save_pretrained), or ask for it "
                             "(ModelSpec(allow_pickle=True), --allow-pickle).") from error
        if isinstance(cause, GatedRepoError):
            raise ModelError(f"{spec.name} is gated: accept its licence on its Hugging Face page and set HF_TOKEN, or use the "
                             f"embedded pair ({hub}).") from None
        if is_folder(spec.source):
            raise ModelError(f"the checkpoint folder {spec.source} cannot be loaded: {said(error)}.") from error
        raise ModelError(_missing(spec, hub)) from error
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        where = "checkpoint folder" if is_folder(spec.source) else "model"
        raise ModelError(f"the {where} {spec.source} cannot be loaded: {said(error)}; mend its files, or use another model.") from error


def _missing(spec: ModelSpec, hub: str) -> str:
    return (f"the model {spec.name!r} cannot be found or reached: check its name and the connection; if it is a gated Hugging Face model, "
            f"accept its licence and set HF_TOKEN; or use the embedded pair ({hub}).")


def token_count(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, without special ones; 0 if the tokenizer does not know a part of it."""
    problem = f"the tokenizer of {tokenizer.name_or_path} cannot read {text!r}"
    with foreign(problem, ModelError, "choose another model, or another concept or cue"):
        return len(word_ids(tokenizer, text))


def load_huggingface(spec: ModelSpec) -> tuple[Any, Any]:
    """The plain transformers model (frozen, in evaluation mode) and its tokenizer. Errors: as `load_model`."""
    from transformers import AutoModelForCausalLM

    from alignblind_mi.weights import check_loaded, check_repository

    assert spec.dtype is not None    # of a resolved spec, whose devices are known to be here
    options: dict[str, Any] = {"device_map": spec.device_map, "offload_folder": spec.offload_folder,
                               "use_safetensors": None if spec.allow_pickle else True, "trust_remote_code": spec.trust_remote_code}
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec)
    with _clear_errors(spec):
        check_repository(spec)
    tokenizer = load_tokenizer(spec)
    with _clear_errors(spec), quiet(), _without_reports():
        model, found = AutoModelForCausalLM.from_pretrained(spec.source, revision=spec.revision, dtype=DTYPES[spec.dtype],
                                                            output_loading_info=True, ignore_mismatched_sizes=True, **options)
    check_loaded(spec, model, found)
    check_vocabulary_size(model, tokenizer, spec.name)
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


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Silence transformers' table of what does not fit: that is refused in one sentence."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


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
