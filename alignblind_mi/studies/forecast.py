"""Before anything is loaded: does this model fit here, in which numbers, and how long will this study take at the rate that is measured?

Sizes come from the configuration alone; the rate from one and from two of the model's layers with empty weights, run
by the engine itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch

from alignblind_mi.borders.reading import foreign
from alignblind_mi.models.blocks import is_llama_like
from alignblind_mi.models.budget import Budget, RowCost, free_memory, release
from alignblind_mi.models.configs import load_config
from alignblind_mi.models.decoding import Stop, decode, sampler
from alignblind_mi.models.engine import Engine
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.spec import DTYPES, ModelError, ModelSpec
from alignblind_mi.models.tokens import TokenRow
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.loads import TokenCount
from alignblind_mi.studies.part import TRAINING_COST
from alignblind_mi.studies.parts import lora_groups, study_parts, training_loads
from alignblind_mi.studies.running import check_fits

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.55}    # of a block's weight; 4bit with its scales
TRIAL_ROWS, TRIAL_TOKENS, TRIAL_STEPS = {"cpu": 32, "cuda": 512}, 64, 8


@dataclass(frozen=True)
class Fit:
    """Whether a model fits into the memory that is free, in one kind of numbers. Sizes in bytes; `rows` is the largest batch."""

    numbers: str
    weights: int
    free: int
    rows: int

    @property
    def fits(self) -> bool:
        """Whether the weights and a batch of one row are less than what is free."""
        return self.rows > 0


@dataclass(frozen=True)
class Rate:
    """Seconds per prompt token and per generated token of one row, in batches of `rows`, by the engine on this machine."""

    prompt_token: float
    new_token: float
    rows: int


@dataclass(frozen=True)
class Forecast:
    """What `alignblind forecast` says: sizes, how many rows and tokens the study has, and its time (None where no rate was measured)."""

    model: str
    parameters: int
    layers: int
    fits: tuple[Fit, ...]
    chosen: str
    rate: Rate | None
    stages: dict[str, dict[str, float]]
    seconds: float | None

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.parameters / 1e9:.3g} billion parameters, {self.layers} layers; "
                 f"{self.fits[0].free / 2**30:.1f} GiB free here", ""]
        for one in self.fits:
            said = f"fits, {one.rows} rows of {TRIAL_TOKENS} tokens at a time" if one.fits else "does not fit"
            chosen = "  <- as asked" if one.numbers == self.chosen else ""
            lines.append(f"  {one.numbers:<9}{one.weights / 2**30:>9.2f} GiB of weights  {said}{chosen}")
        lines += ["", f"  {'stage':<12}{'rows':>10}{'prompt tokens':>16}{'new tokens <=':>16}{'time <=':>12}"]
        for name, stage in self.stages.items():
            numbers = "".join(f"{stage[key]:>{width},.0f}" for key, width in (("rows", 10), ("prompt_tokens", 16), ("new_tokens", 16)))
            lines.append(f"  {name:<12}{numbers}{_duration(stage.get('seconds')):>12}")
        if self.rate is None:
            return "\n".join([*lines, "", "No rate was measured: two of its layers do not fit here, or --no-rate was asked for."])
        lines += ["", f"At the rate measured here ({1 / self.rate.prompt_token:,.0f} prompt tokens and {1 / self.rate.new_token:,.0f} new "
                  f"tokens a second, {self.rate.rows} rows at a time) at most {_duration(self.seconds)}, loading not counted.",
                  "Answers are counted as long as they may become; training as three forward passes."]
        return "\n".join(lines)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def forecast(config: StudyConfig, *, measure: bool = True) -> Forecast:
    """Forecast a study of a pair from the larger model's configuration. Errors: ModelError as in `load_model`, for a
    missing model; as `check_fits`, for settings that the models have nothing for.

    Answers count as long as they may become (`max_new_tokens`), so the time is an upper bound; loading and downloads are not in it.
    """
    check_fits(config, ("base", "aligned"), lora=bool(lora_groups(config)))
    spec = max((config.base, config.aligned), key=lambda s: parameter_count(load_config(s))[0])
    model_config = load_config(spec)
    total, free, fits = model_fits(spec, model_config)
    chosen = spec.quantization or str(spec.dtype)
    rate = measured_rate(model_config, spec, free) if measure else None
    stages = study_load(config)
    for stage in stages.values():
        if rate is not None:
            stage["seconds"] = stage["prompt_tokens"] * rate.prompt_token + stage["new_tokens"] * rate.new_token
    seconds = sum(stage["seconds"] for stage in stages.values()) if rate is not None else None
    return Forecast(spec.name, total, model_config.get_text_config().num_hidden_layers, fits, chosen, rate, stages, seconds)


def model_fits(spec: ModelSpec, config: Any) -> tuple[int, int, tuple[Fit, ...]]:
    """(parameters, free bytes, whether the model fits in each kind of numbers) on the device that a resolved spec asks for."""
    device, (total, embedded) = torch.device(spec.device or "cpu"), parameter_count(config)
    spread = device.type == "cuda" and spec.device_map is not None
    free = sum(free_memory(f"cuda:{i}") for i in range(torch.cuda.device_count())) if spread else free_memory(device)
    return total, free, tuple(fit(config, total, embedded, numbers, free, device) for numbers in BYTES)


def parameter_count(config: Any) -> tuple[int, int]:
    """Numbers of parameters of a configuration: all, and those of embedding and head (which quantisation leaves alone)."""
    model = _empty(config, torch.device("meta"))
    tables = {id(p): p.numel() for module in (model.get_input_embeddings(), model.get_output_embeddings()) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters()), sum(tables.values())


def fit(config: Any, total: int, embedded: int, numbers: str, free: int, device: torch.device) -> Fit:
    """Memory of one kind of numbers: quantised models keep embedding and head in two bytes."""
    tables = embedded * (2.0 if numbers in ("8bit", "4bit") else BYTES[numbers])
    weights = int((total - embedded) * BYTES[numbers] + tables)
    itemsize = DTYPES[numbers].itemsize if numbers in DTYPES else 2
    cost, left = RowCost.of(config, itemsize), free - weights
    one_row = TRIAL_TOKENS * (cost.token + cost.column) + 4 * cost.vocabulary
    rows = Budget(cost, device, free=left).most_rows(TRIAL_TOKENS, 2 * TRIAL_TOKENS, keep=True) if left > one_row else 0
    return Fit(numbers, weights, free, rows)


def _empty(config: Any, device: torch.device, layers: int | None = None) -> Any:
    """A model of a configuration without weights, perhaps with fewer layers."""
    from transformers import AutoModelForCausalLM

    if layers is not None:
        config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    own_code = type(config).__module__.startswith("transformers_modules")    # it was asked for: the configuration itself is of that code
    with torch.device("meta"), foreign("no model can be made by this configuration", ModelError, "mend its config.json"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=own_code).eval()
    if device.type == "meta":
        return model
    model = model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    return model


def measured_rate(config: Any, spec: ModelSpec, free: int) -> Rate | None:
    """Time a model of one and of two layers and extrapolate to all of them; None where not even that fits."""
    device, dtype = torch.device(spec.device or "cpu"), DTYPES[str(spec.dtype)]
    total, embedded = parameter_count(config)
    small = (embedded + 2 * (total - embedded) // config.get_text_config().num_hidden_layers) * dtype.itemsize
    if small > 0.8 * free:
        return None
    rows, times = TRIAL_ROWS[device.type if device.type == "cuda" else "cpu"], []
    for layers in (1, 2):
        times.append(_time(config, layers, dtype, device, rows))
        release()
    depth = config.get_text_config().num_hidden_layers - 1
    prompt, step = (one + depth * max(two - one, 0.0) for one, two in zip(*times, strict=True))
    return Rate(prompt / (rows * TRIAL_TOKENS), step / rows, rows)


def _time(config: Any, layers: int, dtype: torch.dtype, device: torch.device, rows: int) -> tuple[float, float]:
    """Seconds of reading `rows` prompts and of one decoding step of all of them."""
    model = _empty(config, device, layers).to(dtype)
    budget = Budget(RowCost.of(model.config, dtype.itemsize), device)
    engine = Engine(model, budget) if is_llama_like(model) else PlainEngine(model, budget)
    engine.budget.tokens = engine.budget.rows = rows * TRIAL_TOKENS
    vocabulary = config.get_text_config().vocab_size
    work = [TokenRow((i % vocabulary, *(1,) * (TRIAL_TOKENS - 1))) for i in range(rows)]    # no beginning in common
    found = []
    with torch.no_grad():
        for steps in (2, 2, 2 + TRIAL_STEPS):    # the first is for warming up
            _wait(device)
            start = perf_counter()
            for batch in engine.batches(work, steps):
                decode(batch, NoText(), steps, Stop(frozenset()), sampler(0.0, []))
            _wait(device)
            found.append(perf_counter() - start)
    step = max((found[2] - found[1]) / TRIAL_STEPS, 0.0)
    return max(found[1] - step, 0.0), step


class NoText:
    """A tokenizer for tokens that nobody reads."""

    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """No text."""
        return ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def study_load(config: StudyConfig) -> dict[str, dict[str, float]]:
    """Rows, prompt tokens and generated tokens (at most) of each stage of a study, by the pair's own tokenizer."""
    concept, tokens = load_concept(config.concept), TokenCount(config)
    stages: dict[str, dict[str, float]] = {}
    loads = [(part.name.split("_")[0], load) for part in study_parts(config, concept) for load in part.loads()]
    for stage, load in (*loads, *(("training", load) for load in training_loads(config, concept))):
        entry = stages.setdefault(stage, {"rows": 0.0, "prompt_tokens": 0.0, "new_tokens": 0.0})
        read, made = tokens(load)
        entry["rows"] += len(load.prompts) * load.times / (TRAINING_COST if stage == "training" else 1)
        entry["prompt_tokens"] += read
        entry["new_tokens"] += made
    return stages
