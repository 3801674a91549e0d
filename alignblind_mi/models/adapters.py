"""LoRA adapters on a model: loaded together, all of them off until one is asked for, switched and switched back, merged and unmerged.

Knows PEFT; does NOT know rows or treatments.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignblind_mi.borders.reading import check_file, foreign, is_file, read_object
from alignblind_mi.borders.settings import File, takes
from alignblind_mi.borders.writing import refuse_taken, whole_folder, write_text
from alignblind_mi.models.configs import load_config, quiet
from alignblind_mi.models.edits import adapter_name
from alignblind_mi.models.fingerprints import fingerprint
from alignblind_mi.models.loading import load_huggingface
from alignblind_mi.models.spec import AnySpec, ModelError, ModelSpec, as_spec
from alignblind_mi.models.weights import check_adapter, check_adapter_files


def with_adapters(model: Any, folders: Sequence[Path | str], spec: ModelSpec) -> Any:
    """The model with LoRA adapters on it (a PeftModel, all of them off), or None without any.

    Errors: ModelError for a folder that is no LoRA adapter, does not fit the model (wholly: every weight of the file has its place, every
    weight of the adapter comes from the file), holds numbers that are not finite, or has the name of another one.
    """
    from peft import PeftModel

    peft = None
    for folder, name in zip(folders, check_folders(folders, spec.allow_pickle), strict=True):
        with foreign(f"the adapter {folder} does not fit {spec.name}", ModelError), quiet():
            warnings.filterwarnings("ignore", "Found missing adapter keys")    # refused below, for every adapter
            if peft is None:
                peft = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                peft.load_adapter(str(folder), adapter_name=name)
        kind = peft.peft_config[name].peft_type
        if str(getattr(kind, "value", kind)) != "LORA":
            raise ModelError(f"{folder} is a PEFT folder of type {getattr(kind, 'value', kind)}: only LORA adapters can be switched here.")
        check_adapter(peft, name, Path(folder), spec.name)
    if peft is not None:
        switch(peft, None)
        peft.eval()
    return peft


def _first(error: Exception) -> str:
    """What an error says: its first line, with the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])


def check_folders(folders: Sequence[Path | str], allow_pickle: bool = False) -> list[str]:
    """The names of adapter folders. Errors: ModelError for a folder that is no adapter with safetensors weights, or two of one name."""
    names = [adapter_name(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ModelError(f"two adapters have the same name ({', '.join(names)}): an adapter is called as its folder; rename one.")
    for folder in folders:
        if not is_file(Path(folder) / "adapter_config.json"):
            raise ModelError(f"{folder} is no PEFT adapter folder: it has no adapter_config.json.")
        check_adapter_files(Path(folder), allow_pickle)
        _check_settings(Path(folder))
    return names


def _check_settings(folder: Path) -> None:
    """Whether an adapter's two files can be read, and its numbers be those of an adapter. Errors: ModelError naming what is wrong."""
    from safetensors import safe_open

    config = folder / "adapter_config.json"
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
        peft.set_adapter(name, inference_mode=True)


def active(peft: Any) -> str | None:
    """The adapter that is on, or None."""
    status = peft.get_model_status()
    return str(status.active_adapters[0]) if status.enabled and status.active_adapters else None


@contextlib.contextmanager
def switched(peft: Any, name: str | None) -> Iterator[None]:
    """An adapter on (or all off) for a while; then as it was before. Without adapters (`peft` None) there is nothing to do."""
    if peft is None:
        yield
        return
    before = active(peft)
    switch(peft, name)
    try:
        yield
    finally:
        switch(peft, before)


@takes(ModelError)
def merge_adapter(spec: AnySpec, adapter: File, out: File) -> Path:
    """A plain transformers checkpoint `out` (safetensors, with the tokenizer) of a model with an adapter merged into its weights.

    It needs no PEFT and has no latency of an adapter. In the spec's dtype: merge in float32 to keep within 1e-4 of the adapter's own
    log-probabilities. Returns `out`, which appears whole or not at all. Errors: ModelError for a quantised model, a folder that is no
    fitting adapter, or an `out` that is there already.
    """
    return _write(as_spec(spec), adapter, Path(out), merging=True)


@takes(ModelError)
def unmerge_adapter(spec: AnySpec, adapter: File, out: File) -> Path:
    """The way back: a checkpoint of the model that `spec` was merged from, up to rounding. Errors: as `merge_adapter`."""
    return _write(as_spec(spec), adapter, Path(out), merging=False)


def _write(spec: ModelSpec, adapter: Path | str, out: Path, *, merging: bool) -> Path:
    """Add what an adapter does to the weights, or take it out, and save."""
    from peft.tuners.lora import LoraLayer

    spec = spec.resolved()
    if spec.quantization is not None:
        raise ModelError(f"{spec.name} is to be loaded in {spec.quantization}: quantised weights cannot carry an adapter exactly. Merge "
                         "without quantization.")
    refuse_taken(out, what="new folder", kind=ModelError)
    model, tokenizer = load_huggingface(spec)
    peft, name = with_adapters(model, [adapter], spec), adapter_name(adapter)
    if not merging:
        if peft.peft_config[name].use_dora:
            raise ModelError(f"{adapter} is a DoRA adapter: it cannot be taken out of weights again.")
        for layer in peft.modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                layer.merged_adapters.append(name)
                layer.unmerge()
    plain = peft.merge_and_unload(safe_merge=True, adapter_names=[name]) if merging else peft.unload()
    with whole_folder(out, ModelError) as draft:
        plain.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        note = {"model": spec.name, "revision": fingerprint(spec, load_config(spec)), "dtype": spec.dtype, "adapter": str(adapter),
                "merged": merging}
        write_text(draft / "merge.json", json.dumps(note, indent=1))
    return out


def scaled_adapter(folder: Path, scale: float, out: Path) -> Path:
    """A copy of an adapter folder whose update of the weights is multiplied by `scale` (its lora_alpha is): a dose of it.

    Errors: ModelError for a folder that is no adapter, or an `out` that is there.
    """
    config = folder / "adapter_config.json"
    if not is_file(config):
        raise ModelError(f"{folder} is no PEFT adapter folder: it has no adapter_config.json.")
    with whole_folder(out, ModelError) as draft:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        settings = json.loads(config.read_text("utf-8"))
        settings["lora_alpha"] *= scale
        (draft / "adapter_config.json").write_text(json.dumps(settings, indent=1), "utf-8")
    return out
