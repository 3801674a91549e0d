"""`python -m benchmarks.gpu`: Llama 3 8B's shape with random weights on a GPU, against transformers' own generate at the same batch.

Reports tokens a second, peak memory, and the time of the whole paper at that rate. Needs about 20 GB of GPU memory; `--layers` and
`--device cpu` are there to try the script itself.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from alignblind_mi.models.budget import Budget, RowCost
from alignblind_mi.models.decoding import Stop, decode, sampler
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.models.engine import Engine
from alignblind_mi.models.tokens import TokenEdit, TokenRow, place
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.forecast import NoText, study_load

LENGTH, NEW = 64, 40


def shape(layers: int) -> LlamaConfig:
    """Llama 3 8B's configuration."""
    return LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers, num_attention_heads=32,
                       num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
                       rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def measure(config: LlamaConfig, device: str, rows: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of generation: unedited rows on both sides, and a steering sweep of shared prompts on ours."""
    torch.manual_seed(0)
    config.dtype = torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    engine = Engine(model, Budget(RowCost.of(config, 2), device))
    ids = torch.randint(10, config.vocab_size, (rows, LENGTH))
    plain = [TokenRow(tuple(row)) for row in ids.tolist()]
    vector, layers = torch.randn(config.hidden_size), range(config.num_hidden_layers // 3, 2 * config.num_hidden_layers // 3)
    edits = [tuple(TokenEdit(place(layer, "resid_post", at), vector, "replace", 1.0) for at in (20, 45))
             for layer in layers]
    swept = [TokenRow(plain[i % 8].ids, edits[i % len(edits)]) for i in range(rows)]

    def ours(work: list[TokenRow]) -> None:
        for batch in engine.batches(work, NEW):
            decode(batch, NoText(), NEW, Stop(frozenset()), sampler(0.0, []))

    def theirs() -> None:
        model.set_attn_implementation("sdpa")
        on = ids.to(device)
        model.generate(on, attention_mask=torch.ones_like(on), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        model.set_attn_implementation("alignblind_sdpa")

    turns = {"ours": lambda: ours(plain), "hugging_face": theirs, "ours_sweep": lambda: ours(swept)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    peaks: dict[str, int] = {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, act in turns.items():
                if device != "cpu":
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                start = perf_counter()
                act()
                if device != "cpu":
                    torch.cuda.synchronize()
                    peaks[name] = torch.cuda.max_memory_allocated()
                if turn:
                    seconds[name].append(perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"rows": rows, "new_tokens": NEW, "seconds": medians, "peak_bytes": peaks,
            "tokens_per_second": {name: rows * NEW / took for name, took in medians.items()},
            "ratio": medians["hugging_face"] / medians["ours"], "batches_of_at_most": str(engine.budget)}


def paper_tokens(config: LlamaConfig) -> float:
    """Tokens that the whole study generates at most on a pair of this shape (its own word-level tokenizer stands in for Llama's)."""
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(organism_path("base")).save_pretrained(folder)
        return sum(stage["new_tokens"] for stage in study_load(StudyConfig.create(folder, folder, device="cpu")).values())


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU is to be seen here: this was not run. Try the script with --device cpu --layers 1 --rows 2.")
    config = shape(args.layers)
    record = measure(config, args.device, args.rows, args.rounds)
    tokens = paper_tokens(config)
    record |= {"paper_new_tokens": tokens, "paper_hours": tokens / record["tokens_per_second"]["ours"] / 3600,
               "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu"}
    text = json.dumps(record, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
