"""Models in GGUF files, which llama.cpp reads: what transformers makes of one, and what it would leave out of it, which is refused.

transformers expands the quantised weights when it reads the file, so that everything else sees an ordinary model. What the file says of a
model and transformers does not read (a scaling of the rotation, a cap of the logits) would make it another model without a word. Knows the
file's table of contents; does NOT load weights.
"""

import contextlib
import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignblind_mi.borders.reading import check_file, foreign
from alignblind_mi.models.spec import ModelError, ModelSpec

MAGIC = b"GGUF"
LIMIT = 1 << 40
# What a model computes is changed by entries whose names hold one of these.
MATTER = ("rope.scaling", "rope.factors", "softcap", "scale", "sliding_window", "expert_weights", "alibi", "clamp_kqv")
SPLIT_LIKE_GPT2 = {"gpt-2", "default", "smollm", "olmo", "phi-2", "mpt"}    # ways to split a text in which GPT-2's gives the same tokens


def gguf_path(spec: ModelSpec) -> Path:
    """Where a spec's GGUF file lies on this machine, fetched from the hub if need be. Errors: ModelError, OSError (of the hub)."""
    from transformers.utils import cached_file

    assert spec.gguf_file is not None
    here = Path(spec.source) / spec.gguf_file
    if here.is_file() or Path(spec.source).is_dir():
        return here
    return Path(cached_file(spec.source, spec.gguf_file, revision=spec.revision))


def check_gguf(spec: ModelSpec) -> None:
    """Whether transformers reads all of a GGUF file that matters. Errors: ModelError naming what it would leave out, or what is missing."""
    try:
        import gguf  # noqa: F401 - transformers needs it
    except ImportError:
        raise ModelError(f"{spec.name} is a GGUF file: reading it needs the package gguf (pip install 'alignblind-mi[gguf]').") from None
    path = gguf_path(spec)
    check_file(path, f"{spec.name}:", ModelError, limit=LIMIT)
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != MAGIC or len(start) < 8:
        raise ModelError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}; fetch it again.")
    if struct.unpack("<I", start[4:])[0] > 0xFFFF:
        raise ModelError(f"{path} is a GGUF file for machines of the other byte order: fetch the usual one (little-endian).")
    said, names = _contents(path)
    left_out = [*_entries_left_out(said), *(name for name in names if name.startswith("rope_"))]
    if left_out:
        raise ModelError(f"{path} says what transformers does not read from GGUF ({', '.join(left_out[:3])}): the model would be another "
                         "one. Use the checkpoint that the file was made from (safetensors).")
    split = said.get("tokenizer.ggml.pre")
    if said.get("tokenizer.ggml.model") == "gpt2" and split is not None and split not in _splits():
        raise ModelError(f"{path} splits texts in a way that transformers does not know from GGUF ({split!r}): they would be other tokens. "
                         "Use the checkpoint that the file was made from (safetensors).")


@contextlib.contextmanager
def read_once(spec: ModelSpec) -> Iterator[None]:
    """While transformers reads a GGUF file: its header is parsed once for all that is read from it, gguf's table of tensor names made once
    and not for every module. Either takes seconds."""
    if spec.gguf_file is None:
        yield
        return
    import gguf
    from gguf import gguf_reader, tensor_mapping

    names = functools.cache(tensor_mapping.get_tensor_name_map)
    vars(gguf).update(GGUFReader=lambda path, *_: _header(Path(path), file_state(Path(path))), get_tensor_name_map=names)
    try:
        yield
    finally:    # from where they are defined: another thread may be loading too
        vars(gguf).update(GGUFReader=gguf_reader.GGUFReader, get_tensor_name_map=tensor_mapping.get_tensor_name_map)


def forget_header() -> None:
    """Free the header that is kept: of a large vocabulary it takes hundreds of MiB."""
    _header.cache_clear()


def check_gguf_weights(spec: ModelSpec, model: Any) -> None:
    """Whether a GGUF file holds no more weights than the model that was read from it. Errors: ModelError saying how many have no place."""
    path = gguf_path(spec)
    _, names = _contents(path)
    places = len({tensor.data_ptr() for tensor in model.state_dict().values()})    # tied ones are one
    if len(names) > places and not any("_exps." in name for name in names):    # experts are put together
        raise ModelError(f"{path} has {len(names) - places} weights that transformers leaves out: the model would be another one. Use the "
                         "checkpoint that the file was made from (safetensors).")


def _contents(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a file says of its model, and the names of its tensors; kept as long as the file stays as it is. Errors: ModelError."""
    state = file_state(path)
    with foreign(f"{path} is damaged", ModelError, "fetch it again"):
        return _read(path, state)


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file does: for what is kept as long as it stays as it is."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


@functools.lru_cache(maxsize=4)
def _read(path: Path, state: tuple[int, ...]) -> tuple[dict[str, Any], list[str]]:
    header = _header(path, state)
    return ({name: field.contents() for name, field in header.fields.items() if len(field.types) == 1},
            [tensor.name for tensor in header.tensors])


@functools.lru_cache(maxsize=1)
def _header(path: Path, state: tuple[int, ...]) -> Any:
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path)


def _entries_left_out(said: dict[str, Any]) -> Iterator[str]:
    """Entries of a file that change what its model computes, and that transformers passes over."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    own = str(said.get("general.architecture", ""))
    family = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}.get(own, own)
    read, given = GGUF_CONFIG_MAPPING.get(family, {}), GGUF_CONFIG_DEFAULTS_MAPPING.get(family) or {}
    for name, value in said.items():
        key = name.removeprefix(f"{own}.")
        if key == name or key in read or value in (0, 1, 0.0, 1.0, "none", False) or not any(part in key for part in MATTER):
            continue
        handled = family == "gpt_oss" and key.startswith("rope.scaling")
        if not handled and given.get(key.rpartition(".")[2]) != value:
            yield f"{name} = {value}"


def _splits() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:    # versions that split all as their own tokenizers do
        return SPLIT_LIKE_GPT2 | {"llama-bpe", "qwen2"}
    return SPLIT_LIKE_GPT2 | set(GGUF_PRE_TOKENIZER_SPLITS)
