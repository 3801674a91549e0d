"""The configuration and the tokenizer of a model, and what is wrong with them: read before any weights."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignblind_mi.borders.reading import NOTE, TABLE, check_file, foreign, is_file, is_folder, is_panic, read_object, said
from alignblind_mi.errors import AlignblindError
from alignblind_mi.models.gguf import check_gguf, file_state, gguf_path, read_once
from alignblind_mi.models.spec import EMBEDDED, ModelError, ModelSpec

SIZES = {"num_hidden_layers": 1000, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_attention_heads": 1 << 12,
         "num_key_value_heads": 1 << 12, "head_dim": 1 << 14, "vocab_size": 1 << 23, "max_position_embeddings": 1 << 30,
         "num_local_experts": 1 << 12, "num_experts": 1 << 12, "n_routed_experts": 1 << 12}    # the largest that is believed
LEAST = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
         "max_position_embeddings")    # without which there is no model


def load_config(spec: ModelSpec) -> Any:
    """A model's transformers configuration. Errors: ModelError in one sentence for a model that cannot be reached."""
    from transformers import AutoConfig

    source = spec.source    # an embedded model's own error is clear already
    if spec.revision is not None and (spec.name.startswith(EMBEDDED) or is_folder(source)):
        raise ModelError(f"the revision {spec.revision!r} was given for {spec.name}, which is not on the hub: it has no other versions; "
                         "leave it out.")
    _check_folder(spec)
    with clear_errors(spec), quiet(), without_reports():
        config = AutoConfig.from_pretrained(source, **spec.options) if spec.gguf_file is None else _gguf_config(spec)
    check_sizes(config, spec.name)
    return config


def _gguf_config(spec: ModelSpec) -> Any:
    """The configuration in a GGUF file, kept as long as the file stays as it is: reading it takes seconds."""
    def read() -> Any:
        from transformers import AutoConfig

        check_gguf(spec)
        return AutoConfig.from_pretrained(spec.source, **spec.options)

    return _kept("configuration", spec, read)


def _gguf_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer in a GGUF file, kept likewise."""
    def read() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(spec.source, config=_gguf_config(spec), **spec.options)

    return _kept("tokenizer", spec, read)


def _kept(what: str, spec: ModelSpec, read: Callable[[], Any]) -> Any:
    """A copy of what was read from a GGUF file, read anew if the file has changed. Errors: ModelError if there is no file."""
    path = gguf_path(spec)
    if not path.is_file():
        raise ModelError(f"there is no file {path}: check its name.")
    key = (what, path, *file_state(path))
    if key not in _GGUF:
        with read_once(spec):
            _GGUF[key] = read()
    return copy.deepcopy(_GGUF[key])


_GGUF: dict[tuple[object, ...], Any] = {}


def depth_of(spec: ModelSpec) -> int:
    """How many decoder layers a model has, by its configuration. Errors: as `load_config`."""
    return int(load_config(spec).get_text_config().num_hidden_layers)


def load_tokenizer(spec: ModelSpec) -> Any:
    """A model's tokenizer alone. Errors: ModelError in one sentence for one that cannot be reached or read."""
    from transformers import AutoTokenizer

    source = spec.source
    _check_folder(spec)
    with clear_errors(spec), quiet(), without_reports():
        tokenizer = AutoTokenizer.from_pretrained(source, **spec.options) if spec.gguf_file is None else _gguf_tokenizer(spec)
        tokenizer("")    # some settings that cannot be are found out only now
    return tokenizer


def load_generation_config(spec: ModelSpec, config: Any) -> Any:
    """What a checkpoint says of generation (its end tokens, sampling); from its configuration where it has no file of its own for that."""
    from transformers import GenerationConfig

    if spec.gguf_file is not None:
        return GenerationConfig.from_model_config(config)
    try:
        with clear_errors(spec, but=OSError), without_reports():
            return GenerationConfig.from_pretrained(spec.source, revision=spec.revision)
    except OSError:
        return GenerationConfig.from_model_config(config)


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


def _numbers(table: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a table, those of tables in it too (rope's may be one for each kind of layer)."""
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(key), float(value) if abs(value) < 1e30 else float("inf")


@contextlib.contextmanager
def clear_errors(spec: ModelSpec, but: type[Exception] | None = None) -> Iterator[None]:
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, its notes to developers (FutureWarning) and transformer-lens' notes; errors remain."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as hf_logging

    bars, level, own_bar = hf_logging.is_progress_bar_enabled(), logging.root.level, gguf.tqdm
    hf_logging.disable_progress_bar()
    gguf.tqdm = hf_logging.tqdm    # its bar is of another kind, which does not listen
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        gguf.tqdm = own_bar
        logging.root.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Silence transformers' own warnings of what is wrong with a file: that is refused in one sentence."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
