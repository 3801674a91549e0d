"""Loading: which model, from where, with which adapters, in which numbers; every way to fail is one sentence.

Knows Hugging Face checkpoints, PEFT folders and the embedded organism; does NOT run anything.
"""

import logging
from typing import Any

from alignblind_mi.borders import ranks
from alignblind_mi.borders.reading import foreign
from alignblind_mi.models.configs import clear_errors, load_config, load_tokenizer, quiet, without_reports
from alignblind_mi.models.gguf import check_gguf_weights, forget_header, read_once
from alignblind_mi.models.spec import DTYPES, EMBEDDED, ModelError, ModelSpec, check_device
from alignblind_mi.models.tokens import word_ids

log = logging.getLogger(__name__)


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
    from alignblind_mi.models.weights import check_folder

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
    stored = stored_quantization(config)
    if stored:
        if spec.quantization is not None:
            raise ModelError(f"{spec.name} is quantised already in its checkpoint ({stored}), and cannot be in {spec.quantization} beside "
                             "that: leave out the quantization, or give the checkpoint that it was made from.")
        log.warning("%s is quantised in its checkpoint (%s): numbers on it are those of the quantised weights.", spec.name, stored)
    if spec.tensor_parallel:
        check_plan(spec, config)
        ranks.join()
    if spec.quantization is not None:
        if spec.name.startswith(EMBEDDED):
            raise ModelError(f"{spec.name} cannot be quantised: it is tiny, and was measured as it is; leave out the quantization.")
        quantization_config(spec)


def check_plan(spec: ModelSpec, config: Any) -> None:
    """Whether a model's layers can be cut among the processes of torchrun. Errors: ModelError saying why not."""
    text, count = config.get_text_config(), ranks.started()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise ModelError(f"transformers has no plan of tensor parallelism for {config.model_type!r} models such as {spec.name}: use "
                         "device_map='auto' (--device-map auto) instead.")
    if stored_quantization(config) or getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None):
        raise ModelError(f"{spec.name} has quantised weights or experts, which are not run with tensor parallelism here: use "
                         "device_map='auto' (--device-map auto) instead.")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(text, name, None)
        if isinstance(size, int) and size % count:
            raise ModelError(f"{spec.name} cannot be cut among {count} processes: its {name} is {size}; start a number that divides it.")


def stored_quantization(config: Any) -> str:
    """How a checkpoint's weights are quantised, by its own configuration; empty if they are not."""
    stored = getattr(config, "quantization_config", None) or {}
    given = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method") or ""))
    bits = given.get("bits") or (4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else None)
    return ", ".join(part for part in (method, f"{bits} bits" if bits else "") if part)


def token_count(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, without special ones; 0 if the tokenizer does not know a part of it."""
    problem = f"the tokenizer of {tokenizer.name_or_path} cannot read {text!r}"
    with foreign(problem, ModelError, "choose another model, or another concept or cue"):
        return len(word_ids(tokenizer, text))


def load_huggingface(spec: ModelSpec) -> tuple[Any, Any]:
    """The plain transformers model (frozen, in evaluation mode) and its tokenizer. Errors: as `load_model`."""
    from transformers import AutoModelForCausalLM

    from alignblind_mi.models.weights import check_loaded, check_repository

    assert spec.dtype is not None    # of a resolved spec, whose devices are known to be here
    options: dict[str, Any] = {"device_map": spec.device_map, "offload_folder": spec.offload_folder,
                               "use_safetensors": None if spec.allow_pickle or spec.gguf_file is not None else True, **spec.options}
    if spec.tensor_parallel:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=ranks.started())
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec)
    with clear_errors(spec):
        check_repository(spec)
    tokenizer = load_tokenizer(spec)
    if spec.gguf_file is not None:
        options["config"] = load_config(spec)    # transformers would read the file for it once more
    with clear_errors(spec), quiet(), without_reports(), read_once(spec):
        model, found = AutoModelForCausalLM.from_pretrained(spec.source, dtype=DTYPES[spec.dtype],
                                                            output_loading_info=True, ignore_mismatched_sizes=True, **options)
    check_loaded(spec, model, found)
    if spec.gguf_file is not None:
        check_gguf_weights(spec, model)
        _forget_the_file(model)
        forget_header()
    check_vocabulary_size(model, tokenizer, spec.name)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {spec.name} gives no character offsets (it is not a fast one): marks cannot be placed.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval()
    return (model if spec.device_map or spec.quantization or spec.tensor_parallel else model.to(spec.device)), tokenizer


def _forget_the_file(model: Any) -> None:
    """A GGUF file's weights have been expanded: transformers would go on taking the model for a quantised one, and refuse to train it."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


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


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every end token that the checkpoint's generation config and its tokenizer name (Llama 3 Instruct has two)."""
    return end_tokens(model.generation_config, tokenizer)


def end_tokens(generation: Any, tokenizer: Any) -> frozenset[int]:
    """The end tokens that a generation config and a tokenizer name."""
    named = generation.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)
