"""LoRA adapters on a model: loaded together, all of them off until one is asked for, switched and switched back, merged and unmerged.

Knows PEFT; does NOT know rows or treatments.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.reading import check_file, foreign, is_file, read_object
from alignblind_mi.borders.settings import File, takes
from alignblind_mi.borders.writing import refuse_taken, whole_folder, write_text
from alignblind_mi.models.blocks import own_answers, tolerance
from alignblind_mi.models.configs import load_config, quiet
from alignblind_mi.models.edits import adapter_name
from alignblind_mi.models.fingerprints import fingerprint
from alignblind_mi.models.loading import load_huggingface
from alignblind_mi.models.spec import AnySpec, ModelError, ModelSpec, as_spec
from alignblind_mi.models.weights import ADAPTER_CONFIG, adapter_weights, check_adapter, check_adapter_files

_MARK = "_adapter"    # see `_inside`
SAME = 1e-3    # nats: the same computation twice


def with_adapters(model: Any, folders: Sequence[Path | str], spec: ModelSpec, *, switchable: bool = True) -> Any:
    """The model with LoRA adapters on it (a PeftModel, all of them off), or None without any.

    Errors: ModelError for a folder that is no LoRA adapter, does not fit the model (wholly: every weight of the file has its place, every
    weight of the adapter comes from the file), holds numbers that are not finite, or has the name of another one; where it is to be
    `switchable`, also for one that changes the model even while it is off.
    """
    from peft import PeftModel

    named = list(zip(folders, check_folders(folders, spec.allow_pickle), strict=True))
    tokens = {name: trained_tokens(Path(folder)) for folder, name in named}
    more = sorted(set().union(*tokens.values()))
    with foreign(f"{spec.name} cannot be run", ModelError):
        before = own_answers(model, more)[1] if named and switchable else None
    peft = None
    for folder, name in sorted(named, key=lambda one: bool(tokens[one[1]])):    # PEFT loads none behind one with tokens of its own
        with foreign(f"the adapter {folder} does not fit {spec.name}", ModelError), quiet():
            warnings.filterwarnings("ignore", "Found missing adapter keys")    # refused below, for every adapter
            if peft is None:
                peft = PeftModel.from_pretrained(model, str(folder), adapter_name=_inside(name))
            else:
                peft.load_adapter(str(folder), adapter_name=_inside(name))
        kind = peft.peft_config[_inside(name)].peft_type
        if str(getattr(kind, "value", kind)) != "LORA":
            raise ModelError(f"{folder} is a PEFT folder of type {getattr(kind, 'value', kind)}: only LORA adapters can be switched here.")
        check_adapter(peft, _inside(name), Path(folder), spec.name)
        if before is not None:
            _refuse_changed_base(peft, folder, spec, before, more)
    if peft is not None:
        switch(peft, None)
        peft.eval()
    return peft


def _refuse_changed_base(peft: Any, folder: Path | str, spec: ModelSpec, before: Float[Tensor, "token vocab"], more: Sequence[int]) -> None:
    """Whether the model is what it was while its adapters are off. Errors: ModelError naming the adapter that was loaded last, and why."""
    settings = read_object(Path(folder) / ADAPTER_CONFIG, "", ModelError)
    switch(peft, None)
    peft.eval()
    _, after = own_answers(peft.base_model.model, more)
    if after.shape == before.shape and float((after - before).abs().max()) <= SAME:
        return
    usual: dict[str, tuple[object, ...]] = {"bias": ("none",), "init_lora_weights": (True, False), "layer_replication": (None, [])}
    known = [f"{key} = {str(settings[key])[:60]!r} in its {ADAPTER_CONFIG}" for key in usual
             if settings.get(key) not in (None, *usual[key])]
    why = "; ".join(known) or _own_weights(Path(folder))
    raise ModelError(f"the adapter {folder} changes {spec.name} even while it is off{why and f' ({why})'}, so that nothing could be "
                     "compared with the model without it. Merge it into a checkpoint of its own (alignblind_mi.merge_adapter) and load "
                     "that as a model.")


def trained_tokens(folder: Path) -> list[int]:
    """The tokens whose embeddings an adapter replaces. Errors: ModelError for settings that cannot be read."""
    return _tokens_of(read_object(folder / ADAPTER_CONFIG, "", ModelError).get("trainable_token_indices"))


def _tokens_of(given: Any) -> list[int]:
    lists = given.values() if isinstance(given, dict) else [given]
    return sorted({i for one in lists if isinstance(one, list) for i in one if type(i) is int})


def adapted(peft: Any) -> Iterator[tuple[str, list[int], Float[Tensor, "token vocab"]]]:
    """With one adapter after the other on: its name, a row of tokens, and PEFT's own log-probabilities after each of them."""
    for name in adapters_of(peft):
        with switched(peft, name):
            config = peft.peft_config[_inside(name)]
            yield name, *own_answers(peft, _tokens_of(config.trainable_token_indices))


def _inside(name: str) -> str:
    """An adapter's name inside PEFT, which looks for a module's name in the same strings (a folder may be called `lm_head`)."""
    return f"{name}{_MARK}"


def adapters_of(peft: Any) -> tuple[str, ...]:
    """The names of the adapters on a model; none where `peft` is None."""
    return () if peft is None else tuple(name.removesuffix(_MARK) for name in peft.peft_config)


def check_folders(folders: Sequence[Path | str], allow_pickle: bool = False) -> list[str]:
    """The names of adapter folders. Errors: ModelError for a folder that is no adapter with safetensors weights, or two of one name."""
    names = [adapter_name(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ModelError(f"two adapters have the same name ({', '.join(names)}): an adapter is called as its folder; rename one.")
    for folder in folders:
        if not is_file(Path(folder) / ADAPTER_CONFIG):
            raise ModelError(f"{folder} is no PEFT adapter folder: it has no {ADAPTER_CONFIG}.")
        check_adapter_files(Path(folder), allow_pickle)
        _check_settings(Path(folder))
    return names


def _check_settings(folder: Path) -> None:
    """Whether an adapter's two files can be read, and its numbers be those of an adapter. Errors: ModelError naming what is wrong."""
    from safetensors import safe_open

    config = folder / ADAPTER_CONFIG
    settings = read_object(config, "", ModelError, needs=("peft_type",), advice="save the adapter anew")
    for key, least, most in (("r", 1, 1 << 16), ("lora_alpha", -1e6, 1e6), ("lora_dropout", 0, 1)):
        value = settings.get(key)
        if value is not None and (type(value) not in ((int,) if key == "r" else (int, float)) or not least <= value <= most):
            raise ModelError(f"{config} says {key} = {str(value)[:60]}: a number from {least} to {most} was expected; save it anew.")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict) or not all(type(value) in (int, float) and abs(value) <= 1 << 16 for value in pattern.values()):
            raise ModelError(f"{config} says {key} = {str(pattern)[:60]}: names with a number each, at most {1 << 16}, were expected; "
                             "save it anew.")
    weights = folder / "adapter_model.safetensors"
    if not is_file(weights):    # a pickled file instead, which was asked for
        return
    check_file(weights, "", ModelError, limit=1 << 40)
    with foreign(f"{weights} is damaged", ModelError, "save the adapter anew"), safe_open(str(weights), "pt") as file:
        file.keys()


def switch(peft: Any, name: str | None) -> None:
    """Turn one adapter on, or all of them off; their weights never become trainable by it."""
    if name is None:
        peft.base_model.disable_adapter_layers()
    else:
        peft.base_model.enable_adapter_layers()
        peft.set_adapter(_inside(name), inference_mode=True)


def active(peft: Any) -> str | None:
    """The adapter that is on, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # All layers are alike, and PEFT refuses an adapter that finds none; its own status looks at every one, which is slow.
    layer = next(module for module in peft.base_model.modules() if isinstance(module, BaseTunerLayer))
    names = [] if layer.disable_adapters else layer.active_adapters
    return str(names[0]).removesuffix(_MARK) if names else None


@contextlib.contextmanager
def switched(peft: Any, name: str | None) -> Iterator[None]:
    """An adapter on (or all off) for a while; then as it was before. Without adapters (`peft` None) there is nothing to do."""
    if peft is None:
        yield
        return
    before = active(peft)
    if before == name:
        yield
        return
    switch(peft, name)
    try:
        yield
    finally:
        switch(peft, before)


@takes(ModelError)
def merge_adapter(spec: AnySpec, adapter: File, out: File) -> Path:
    """A plain transformers checkpoint `out` (safetensors, with the tokenizer) of a model with an adapter merged into its weights.

    It needs no PEFT and has no latency of an adapter. In the spec's dtype: merge in float32 to keep within 1e-4 of the adapter's own
    log-probabilities. The checkpoint is loaded and held against the adapter before it gets its name. Returns `out`, which appears whole or
    not at all. Errors: ModelError for a quantised model, a folder that is no fitting adapter, one that PEFT cannot merge, or an `out` that
    is there already.
    """
    return _write(as_spec(spec), adapter, Path(out), merging=True)


@takes(ModelError)
def unmerge_adapter(spec: AnySpec, adapter: File, out: File) -> Path:
    """The way back: a checkpoint of the model that `spec` was merged from, up to rounding.

    Errors: as `merge_adapter`, and for an adapter that does more than add to weights (see `more_than_added`).
    """
    return _write(as_spec(spec), adapter, Path(out), merging=False)


def _write(spec: ModelSpec, adapter: Path | str, out: Path, *, merging: bool) -> Path:
    """Add what an adapter does to the weights, or take it out, and save. With the adapter on, both sides give the same answers."""
    spec = spec.resolved()
    if spec.quantization is not None:
        raise ModelError(f"{spec.name} is to be loaded in {spec.quantization}: quantised weights cannot carry an adapter exactly. Merge "
                         "without quantization.")
    refuse_taken(out, what="new folder", kind=ModelError)
    (name,) = check_folders([adapter], spec.allow_pickle)
    more = "" if merging else more_than_added(Path(adapter)) or _own_weights(Path(adapter))
    if more:
        raise ModelError(f"{adapter} cannot be taken out of weights again: {more}.")
    model, tokenizer = load_huggingface(spec)
    tokens = trained_tokens(Path(adapter))
    peft = with_adapters(model, [adapter], spec, switchable=False)
    switch(peft, name if merging else None)
    _, expected = own_answers(peft, tokens)
    _untie(peft)
    with foreign(f"PEFT cannot {'merge' if merging else 'unmerge'} {adapter}", ModelError), quiet():
        plain = peft.merge_and_unload(safe_merge=True, adapter_names=[_inside(name)]) if merging else _without(peft, name)
    head, table = plain.get_output_embeddings(), plain.get_input_embeddings()
    if head is not None and head.weight is not table.weight:
        plain.config.tie_word_embeddings = False
    with whole_folder(out, ModelError) as draft:
        with foreign(f"{out} cannot be written", ModelError):
            plain.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
        note = {"model": spec.name, "revision": fingerprint(spec, load_config(spec)), "dtype": spec.dtype, "adapter": str(adapter),
                "merged": merging}
        write_text(draft / "merge.json", json.dumps(note, indent=1))
        del plain, peft, model
        written, _ = load_huggingface(replace(spec, name=str(draft), revision=None))
        back = written if merging else with_adapters(written, [adapter], spec, switchable=False)
        if not merging:
            switch(back, name)
        apart = float((own_answers(back, tokens)[1] - expected).abs().max())
        if not apart <= tolerance(written):
            raise ModelError(f"{adapter} cannot be {'merged into' if merging else 'taken out of'} {spec.name}: the checkpoint's "
                             f"log-probabilities are {apart:.2g} apart from those with the adapter on.")
    return out


def merge_in_place(peft: Any, name: str) -> None:
    """Add what an adapter does to the weights that lie in memory; PEFT's own errors are ModelErrors."""
    _untie(peft)
    with foreign(f"PEFT cannot merge {name}", ModelError):
        switch(peft, name)
        peft.merge_adapter([_inside(name)])


def _without(peft: Any, name: str) -> Any:
    """The model without what an adapter added to its weights."""
    from peft.tuners.lora import LoraLayer

    for layer in peft.modules():
        if isinstance(layer, LoraLayer) and _inside(name) in (*layer.lora_A, *layer.lora_embedding_A):
            layer.merged_adapters.append(_inside(name))
            layer.unmerge()
    return peft.unload()


def _untie(peft: Any) -> None:
    """Give the head weights of its own where they are the embedding's and an adapter acts on either: what it adds to one is not added to
    the other."""
    def weights(module: Any) -> Any:
        while hasattr(module, "base_layer") or hasattr(module, "original_module"):
            module = module.base_layer if hasattr(module, "base_layer") else module.original_module
        return module

    plain = peft.base_model.model
    head, table = plain.get_output_embeddings(), plain.get_input_embeddings()
    touched = head is not None and (weights(head) is not head or weights(table) is not table)
    if touched and weights(head).weight is weights(table).weight:
        weights(head).weight = torch.nn.Parameter(weights(head).weight.detach().clone(), requires_grad=False)


def more_than_added(folder: Path) -> str:
    """Why an adapter is more than an update that is added to weights (it cannot be scaled, or taken out again); empty if it is one."""
    settings = read_object(folder / ADAPTER_CONFIG, "", ModelError)
    parts = {"use_dora": "DoRA also changes the weights' lengths", "modules_to_save": "it replaces whole modules",
             "trainable_token_indices": "it replaces the embeddings of tokens", "layer_replication": "it repeats layers",
             "alora_invocation_tokens": "it acts behind certain tokens only"}
    found = [f"{what} ({key})" for key, what in parts.items() if settings.get(key)]
    found += [f"it replaces biases (bias = {settings['bias']!r})"] if settings.get("bias", "none") != "none" else []
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq")):
        found.append(f"it belongs to weights that its initialisation changed (init_lora_weights = {start!r})")
    return "; ".join(found)


def _own_weights(folder: Path) -> str:
    """Whether an adapter's file also holds weights of the model itself, which PEFT writes over the model's; empty if not."""
    own = [key for key in adapter_weights(folder) if ".base_layer." in key and ".lora_" not in key]
    return f"its file also holds weights of the model it was trained on, such as {own[0]}" if own else ""


def scaled_adapter(folder: Path, scale: float, out: Path) -> Path:
    """A copy of an adapter folder whose update of the weights is multiplied by `scale` (its alphas are): a dose of it.

    Errors: ModelError for a folder that is no adapter, an adapter that is more than such an update, or an `out` that is there.
    """
    config = folder / ADAPTER_CONFIG
    if not is_file(config):
        raise ModelError(f"{folder} is no PEFT adapter folder: it has no {ADAPTER_CONFIG}.")
    more = more_than_added(folder)
    if more:
        raise ModelError(f"{folder} has no doses: {more}.")
    with whole_folder(out, ModelError) as draft:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        settings = json.loads(config.read_text("utf-8"))
        settings["lora_alpha"] *= scale
        settings["alpha_pattern"] = {key: alpha * scale for key, alpha in (settings.get("alpha_pattern") or {}).items()}
        (draft / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1), "utf-8")
    return out
