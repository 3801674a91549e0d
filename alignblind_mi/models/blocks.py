"""Where things are in a Hugging Face decoder: its layers, their attention and MLP, and taps on them.

Knows modules and their names; does NOT know prompts or batches.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from alignblind_mi.borders import ranks
from alignblind_mi.models.edits import EditError
from alignblind_mi.models.tokens import Taps

# The children of a pre-norm block, in which resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out.
PRE_NORM = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
# Where heads and neurons are mixed into the residual stream: the input of these modules of a layer is z, and post.
MIXERS = {"z": (("self_attn", "attn", "attention"), ("o_proj", "c_proj", "out_proj", "dense")),
          "post": (("mlp",), ("down_proj", "c_proj", "fc2", "dense_4h_to_h"))}
PROJECT_AND_ROTATE = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}    # attention that was read: projections, a rotation, no more
PLAIN_ROPE = {"default", "llama3", "linear", "yarn"}    # rotary embeddings that do not depend on the length of the text


def text_config(model: Any) -> Any:
    """The configuration of a model's language part (its own, where there is no other part)."""
    return model.config.get_text_config()


def position_limit(model: Any) -> int | None:
    """How many tokens a model can read at all, where its positions are a table that ends (GPT-2, OPT, GPT-J); None for others."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    table = model.get_input_embeddings()
    learned = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not table)
    tables = [module.num_embeddings for module in learned]
    tables += [buffer.shape[0] for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    return most if any(0 <= size - most <= 8 for size in tables) else None    # some tables begin with a few unused rows


def trial_ids(model: Any) -> list[int]:
    """Forty random tokens, always the same ones: what is tried at load."""
    return torch.randint(text_config(model).vocab_size, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def own_answers(model: Any, more: Sequence[int] = ()) -> tuple[list[int], Float[Tensor, "token vocab"]]:
    """One fixed row of random tokens (and up to 64 `more`), and the log-probabilities after each by the model's own forward pass."""
    ids = trial_ids(model) + list(more)[:64]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=input_device(model))).logits
    return ids, logits[0].float().log_softmax(-1).cpu()


def tolerance(model: Any) -> float:
    """How far log-probabilities of two computations of the same model may be apart: rounding, more of it in fewer bits.

    In float32 a thousandth. In fewer bits it depends on the model (its depth, how large its activations and logits are), so that it is
    measured, once: four times as far as the log-probabilities after a token move when the output of every layer is rounded otherwise (the
    median over the tokens of a trial, of the most over the vocabulary), and 0.2 at least.
    """
    if model.dtype == torch.float32 and not getattr(model, "is_quantized", False):
        return 1e-3
    if model not in _ROUNDING:
        _ROUNDING[model] = max(0.2, 4 * _rounding(model))
    return _ROUNDING[model]


_ROUNDING: "WeakKeyDictionary[nn.Module, float]" = WeakKeyDictionary()


def _rounding(model: Any) -> float:
    """How far log-probabilities move when every layer's output is off by up to half a unit in its last place."""
    drawn, half = torch.Generator().manual_seed(0), torch.finfo(model.dtype if model.dtype.is_floating_point else torch.float16).eps / 2

    def rounded(layer: nn.Module, args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        off = 1 + half * (2 * torch.rand(hidden.shape, generator=drawn) - 1)
        hidden = (hidden.float() * off.to(hidden.device)).to(hidden.dtype)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    own, hooks = own_answers(model)[1], [layer.register_forward_hook(rounded) for layer in decoder_layers(model)]
    try:
        return float((own_answers(model)[1] - own).abs().amax(-1).nan_to_num().median())
    finally:
        for hook in hooks:
            hook.remove()


def input_device(model: Any) -> torch.device:
    """Where token ids go in: the embedding's device, or that of the hook which brings an offloaded embedding."""
    table = model.get_input_embeddings()
    if table.weight.device.type != "meta":
        return torch.device(table.weight.device)
    return torch.device(getattr(getattr(table, "_hf_hook", None), "execution_device", None) or "cpu")


def device_shares(model: Any) -> dict[torch.device, float]:
    """The devices that a model lies on, and which share of all keys and values each of them holds.

    Layers count where they are run (offloaded ones: where their hook brings them); of several processes each holds its part.
    """
    layers = decoder_layers(model)
    shares = {input_device(model): 0.0}
    for layer in layers:
        hooks = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in layer.modules())
        run_on = next((place for place in hooks if place is not None), None)
        weight = next((weight for weight in layer.parameters() if not weight.is_meta), None)
        if run_on is not None:
            where = torch.device("cuda", run_on) if isinstance(run_on, int) else torch.device(run_on)
        else:
            where = input_device(model) if weight is None else weight.device
        shares[where] = shares.get(where, 0.0) + 1 / (len(layers) * ranks.together())
    return shares


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers. Errors: EditError if the model has no list of as many modules as its config has layers."""
    depth = text_config(model).num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not found:
        raise EditError(f"{type(model).__name__} has no list of {depth} decoder layers: rows cannot be run on it.")
    return found[0]


def is_pre_norm(layer: nn.Module) -> bool:
    """Whether a layer is x + attention(norm(x)), then x + mlp(norm(x)), as in Llama, by its children's names."""
    return {name for name, _ in layer.named_children()} == PRE_NORM


def is_llama_like(model: Any) -> bool:
    """Whether the layers may be called one by one: Llama's module names, full attention everywhere, a fixed rotary embedding.

    Necessary, not sufficient: the engine compares itself with the model's own forward pass before it is used.
    """
    core, config = getattr(model, "model", None), model.config
    named = all(hasattr(core, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")) and hasattr(model, "lm_head")
    rope = getattr(config, "rope_parameters", None) or {}
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return bool(named and full and not window and rope.get("rope_type", "default") in PLAIN_ROPE)


def has_own_keys(layer: nn.Module) -> bool:
    """Whether a layer's keys and values are known to be two projections and a rotation, by the name of its attention's class."""
    return is_pre_norm(layer) and type(layer.self_attn).__name__ in PROJECT_AND_ROTATE


def keys_and_values(layer: Any, hidden: Float[Tensor, "row column d_model"], rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rotated keys and the values of a layer (`has_own_keys`) at all columns, [row, kv head, column, head dim]."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    key, value = (project(normed).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(key[:, :0], key, *(part.to(key.device) for part in rope))[1], value


def mixer(layer: nn.Module, stream: str) -> nn.Module:
    """The projection whose input is a layer's `z` or `post`. Errors: EditError if the layer has none of a known name."""
    outer, inner = MIXERS[stream]
    for name in outer:
        for projection in inner:
            found = getattr(getattr(layer, name, None), projection, None)
            if isinstance(found, nn.Module):
                return found
    raise EditError(f"{type(layer).__name__} has no projection of a known name behind {stream} ({'/'.join(outer)} with {'/'.join(inner)}): "
                    "edit or read a residual stream of this model.")


def mixer_width(layer: nn.Module, stream: str) -> int:
    """The size of a layer's `z` (all heads together) or `post`."""
    module: Any = mixer(layer, stream)
    module = getattr(module, "base_layer", module)    # around a part of a projection PEFT says the part's size
    return int(module.in_features if hasattr(module, "in_features") else module.weight.shape[0])    # GPT-2's Conv1D is [in, out]


@contextlib.contextmanager
def inner_taps(layer: nn.Module, index: int, taps: Taps) -> Iterator[None]:
    """Touch the streams inside one layer while it runs: attn_out, resid_mid and mlp_out, and what z and post bring to them.

    Errors: EditError for a layer without such streams.
    """
    if index not in taps.inside:
        yield
        return
    with contextlib.ExitStack() as stack:
        for stream in MIXERS:
            if taps.any(index, stream):    # type: ignore[arg-type]
                stack.enter_context(_mixer_taps(layer, index, stream, taps))
        if taps.any(index, "attn_out", "resid_mid", "mlp_out"):
            stack.enter_context(_added_taps(layer, index, taps))
        yield


def _mixer_taps(layer: nn.Module, index: int, stream: Any, taps: Taps) -> contextlib.AbstractContextManager[None]:
    width = mixer_width(layer, stream)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        value = args[0]
        if value.shape[-1] == width:
            return (taps.touch(index, stream, value), *args[1:])
        return (ranks.own_part(taps.touch(index, stream, ranks.gathered(value))), *args[1:])

    return hooked(mixer(layer, stream).register_forward_pre_hook(before))


@contextlib.contextmanager
def _added_taps(layer: nn.Module, index: int, taps: Taps) -> Iterator[None]:
    """Touch what is added to the residual stream, and the stream in between.

    Errors: EditError for a layer that is not pre-norm, by its parts' names or by what is seen to enter its second norm.
    """
    if not is_pre_norm(layer):
        raise EditError(f"the streams inside {type(layer).__name__} are not a pre-norm block's: edit or read resid_pre or resid_post.")
    attention, mlp, norm = (layer.get_submodule(name) for name in ("self_attn", "mlp", "post_attention_layernorm"))
    entering: list[Tensor] = []
    standing: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        entering[:] = [args[0]]

    def after_attention(module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        value = taps.touch(index, "attn_out", output[0])
        if taps.any(index, "resid_mid"):
            mid = entering[0] + value
            touched = taps.touch(index, "resid_mid", mid)
            if touched is not mid:
                value = touched - entering[0]
        standing[:] = [entering[0] + value]
        return (value, *output[1:])

    def before_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.allclose(args[0], standing[0].to(args[0]), rtol=1e-2, atol=1e-2 * float(standing[0].detach().abs().mean())):
            raise EditError(f"in {type(layer).__name__} attention is not simply added to the stream: the streams inside it are not those "
                            "of a pre-norm block. Edit or read resid_pre or resid_post.")

    with hooked(layer.register_forward_pre_hook(before), attention.register_forward_hook(after_attention),
                norm.register_forward_pre_hook(before_norm),
                mlp.register_forward_hook(output_hook(lambda value: taps.touch(index, "mlp_out", value)))):
        yield


@contextlib.contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Hooks that are there until the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_hook(touch: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that touches a module's output, be it a tensor or a tuple that begins with one."""
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (touch(output[0]), *output[1:]) if isinstance(output, tuple) else touch(output)

    return hook


def final_norm(model: Any) -> nn.Module:
    """The norm before the head. Errors: EditError if there is none of a known name."""
    for name in FINAL_NORMS:
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)
    raise EditError(f"{type(model).__name__} has no final norm of a known name ({', '.join(FINAL_NORMS)}): residual streams cannot be read "
                    "through its head.")


def unembed(model: Any, hidden: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at vocabulary"]:
    """Logits of residual streams by a model's own final norm and head, in float32."""
    return model.get_output_embeddings()(final_norm(model)(hidden)).float()


def log_probs_of(model: Any, hidden: Float[Tensor, "row d_model"], ids: Int[Tensor, "*row target"], block: tuple[int, int]
                 ) -> Float[Tensor, "row target"]:
    """Exact log-probabilities of target tokens after residual streams, on the CPU; `ids` are those of every row, or each row's own.

    Logits exist for a `block` of (rows, words) at a time. A head that is more than a matrix in memory, or a part of one, is asked for all
    words at once.
    """
    head, (rows, words) = model.get_output_embeddings(), block
    whole = type(head) is not nn.Linear or hasattr(head, "_hf_hook") or hasattr(head.weight, "to_local")
    out = torch.empty(len(hidden), ids.shape[-1])
    for start in range(0, len(hidden), rows):
        normed = final_norm(model)(hidden[start : start + rows])
        asked = ids if ids.ndim == 1 else ids[start : start + rows]
        if whole:
            logits = head(normed).float()
            asked = asked.to(logits.device)
            wanted, total = logits[:, asked] if asked.ndim == 1 else logits.gather(1, asked), logits.logsumexp(-1)
        else:
            normed, bias = normed.to(head.weight.device), None if head.bias is None else head.bias[asked]
            if asked.ndim == 1:
                wanted = linear(normed, head.weight[asked], bias).float()
            else:
                wanted = torch.bmm(head.weight[asked], normed[:, :, None])[..., 0]
                wanted = (wanted if bias is None else wanted + bias).float()
            total = torch.stack([linear(normed, weight, bias).float().logsumexp(-1) for weight, bias in _parts(head, words)]).logsumexp(0)
        out[start : start + len(normed)] = (wanted - total[:, None]).cpu()
    return out


def _parts(head: nn.Linear, words: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(head.weight), words):
        yield head.weight[start : start + words], None if head.bias is None else head.bias[start : start + words]
