"""`python -m benchmarks.gpu`: Llama 3 8B's shape with random weights on a GPU, against transformers' own generate at the same batch.

Writes a table (table.md, record.json in --out): tokens a second, peak memory, the share of the floor, and the time of the whole paper at
that rate. Takes ten minutes at most (--limit ends the rounds) and about 20 GB of GPU memory; `--shape tiny --device cpu` tries it out.

The floor is what must be computed at all, at the speed of transformers' own forward pass: the tokens times layers of the prompts that no
other row has computed, and a decoding step, without sampling, for every new token but the first.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from alignblind_mi.models.budget import Budget, RowCost
from alignblind_mi.models.decoding import Stop, decode, sampler
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.models.engine import ATTENTION, Engine
from alignblind_mi.models.tokens import TokenEdit, TokenRow, place
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.forecast import NoText, study_load

LENGTH, NEW = 64, 40
GOAL = 15    # minutes for the whole paper on one H200


def shape(layers: int) -> LlamaConfig:
    """Llama 3 8B's configuration."""
    return LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers, num_attention_heads=32,
                       num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
                       rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def tiny(layers: int) -> LlamaConfig:
    """A configuration that runs anywhere in a second: its numbers say that the script works, and nothing else."""
    return LlamaConfig(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
                       num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)


SHAPES = {"8b": (shape, 32), "tiny": (tiny, 3)}


def measure(config: LlamaConfig, device: str, rows: int, rounds: int, limit: float = 540.0) -> dict[str, Any]:
    """Interleaved rounds of generation: unedited rows on both sides, a steering sweep of shared prompts on ours, and the floor's parts.

    No round begins after `limit` seconds; one is timed in any case.
    """
    begun = perf_counter()
    torch.manual_seed(0)
    config.dtype = torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    engine = Engine(model, Budget(RowCost.of(config, 2), device))
    ids = torch.randint(10, config.vocab_size, (rows, LENGTH + NEW // 2))
    longer, ids, depth = ids.to(device), ids[:, :LENGTH], config.num_hidden_layers
    plain = [TokenRow(tuple(row)) for row in ids.tolist()]
    vector, layers = torch.randn(config.hidden_size), range(depth // 3, 2 * depth // 3)
    edits = [tuple(TokenEdit(place(layer, "resid_post", at), vector, "replace", 1.0) for at in (20, 45))
             for layer in layers]
    swept = [TokenRow(plain[i % 8].ids, edits[i % len(edits)]) for i in range(rows)]
    computed = sum((1 - engine.entry(row) / depth) * (1 - 20 / LENGTH) for row in swept) + min(8, rows)    # in prompts
    on = ids.to(device)

    def ours(work: list[TokenRow]) -> None:
        for batch in engine.batches(work, NEW):
            decode(batch, NoText(), NEW, Stop(frozenset()), sampler(0.0, []))

    @contextmanager
    def as_transformers() -> Iterator[None]:
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(ATTENTION)

    def theirs() -> None:
        with as_transformers():
            model.generate(on, attention_mask=torch.ones_like(on), max_new_tokens=NEW, do_sample=False, pad_token_id=0)

    def prompts() -> None:
        with as_transformers():
            model(on, use_cache=True, logits_to_keep=1)

    cache: list[Any] = []

    def step() -> None:
        with as_transformers():
            model(on[:, :1], past_key_values=cache[0], use_cache=True)
            cache[0].crop(-1)

    turns = {"ours": lambda: ours(plain), "hugging_face": theirs, "ours_sweep": lambda: ours(swept), "prompts": prompts, "step": step}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    peaks: dict[str, int] = {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            if turn > 1 and perf_counter() - begun > limit:
                break
            for name, act in turns.items():
                cache[:] = [model(longer, use_cache=True, logits_to_keep=1).past_key_values] if name == "step" else []
                took, peak = _timed(act, device)
                if peak:
                    peaks[name] = peak
                if turn:
                    seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    steps = (NEW - 1) * medians["step"]
    floors = {"ours": medians["prompts"] + steps, "ours_sweep": computed / rows * medians["prompts"] + steps}
    sides = ("ours", "hugging_face", "ours_sweep")
    return {"rows": rows, "new_tokens": NEW, "rounds": len(seconds["ours"]), "seconds": medians, "peak_bytes": peaks,
            "tokens_per_second": {name: rows * NEW / medians[name] for name in sides},
            "ratio": medians["hugging_face"] / medians["ours"], "floor_seconds": floors,
            "floor_share": {name: floor / medians[name] for name, floor in floors.items()} | {
                "hugging_face": floors["ours"] / medians["hugging_face"]},
            "batches_of_at_most": str(engine.budget)}


def _timed(act: Callable[[], None], device: str) -> tuple[float, int]:
    """Seconds that a call takes, and the most bytes that were allocated meanwhile (0 on a CPU)."""
    if device == "cpu":
        start = perf_counter()
        act()
        return perf_counter() - start, 0
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = perf_counter()
    act()
    torch.cuda.synchronize()
    return perf_counter() - start, torch.cuda.max_memory_allocated()


def paper_load(config: LlamaConfig) -> dict[str, float]:
    """Tokens of the whole study on a pair of this shape: of prompts, and new ones at most (with its word-level tokenizer)."""
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(organism_path("base")).save_pretrained(folder)
        stages = study_load(StudyConfig.create(folder, folder, device="cpu")).values()
        return {name: sum(stage[name] for stage in stages) for name in ("prompt_tokens", "new_tokens")}


def paper_seconds(load: dict[str, float], record: dict[str, Any]) -> float:
    """The whole paper at the rate of unedited rows, which includes reading a prompt of usual length for every answer; what is read beyond
    that goes at the rate of prompts. Edits, which share work, are taken to save nothing; training is not in it."""
    beyond = max(0.0, load["prompt_tokens"] - LENGTH / NEW * load["new_tokens"])
    return load["new_tokens"] / record["tokens_per_second"]["ours"] + beyond * record["seconds"]["prompts"] / (record["rows"] * LENGTH)


def table(record: dict[str, Any]) -> str:
    """The record as a page of Markdown."""
    names = {"ours": "this engine", "hugging_face": "transformers' generate", "ours_sweep": "this engine, steering sweep"}
    lines = [f"{record['shape']} on {record['device']}: {record['rows']} rows of {LENGTH} tokens, {NEW} new ones, bfloat16, random "
             f"weights, median of {record['rounds']} rounds.", "",
             "| | tokens/s | peak memory, GiB | share of the floor |", "|---|---|---|---|"]
    for key, name in names.items():
        peak = f"{record['peak_bytes'][key] / 2**30:.1f}" if key in record["peak_bytes"] else "-"
        lines.append(f"| {name} | {record['tokens_per_second'][key]:,.0f} | {peak} | {record['floor_share'][key]:.0%} |")
    minutes = record["paper_minutes"]
    goal = f"; the goal is under {GOAL}: {'reached' if minutes < GOAL else 'missed'}" if record["shape"] == "8b" else ""
    lines += ["", f"{record['ratio']:.2f} times as fast as transformers' generate at the same batch. The whole paper (without training) "
              f"would take {minutes:.1f} minutes at this rate{goal}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="other than the shape's own number")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=420.0, help="seconds after which no round begins (default: 420)")
    parser.add_argument("--out", type=Path, help="a folder for table.md and record.json")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU is to be seen here: this was not run. Try the script with --shape tiny --device cpu --rows 8.")
    make, layers = SHAPES[args.shape]
    config = make(args.layers or layers)
    record = measure(config, args.device, args.rows, args.rounds, args.limit)
    load = paper_load(config)
    record |= {"paper": load, "paper_minutes": paper_seconds(load, record) / 60, "shape": args.shape, "layers": args.layers or layers,
               "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu"}
    print(table(record))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "record.json").write_text(json.dumps(record, indent=1), "utf-8")
        (args.out / "table.md").write_text(table(record), "utf-8")


if __name__ == "__main__":
    main()
