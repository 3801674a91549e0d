"""Which architectures of transformers are right here, and what is refused of the others: a table, by trying all of them.

Of each a tiny model with random weights is made and saved. Its own forward pass, one row at a time, is what is right; held against it, raw
and in a chat: the plain engine and the fast one (next tokens, a greedy answer), and transformer-lens' bridge.

    python tests/families.py [--only NAME ...] > docs/families.md
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from doubles import TINY_CHAT, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alignblind_mi.errors import AlignblindError
from alignblind_mi.models.chat import Chat
from alignblind_mi.models.edits import Row
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.stimuli.prompts import mark

WORDS = [f"w{i}" for i in range(60)] + ["user", "assistant", ":"]
TEXTS = [" ".join(WORDS[:40]), "w3 w5 w8", "w1"]
ALIKE = 2e-3
LARGEST, SECONDS, WIDEST = 20_000_000, 90, 110
# What a tiny model of any family is made with, as far as its configuration has the name.
SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "ffn_hidden_size": 48, "d_inner": 48, "n_inner": 48, "moe_intermediate_size": 24,
    "ffn_dim_multiplier": 1.0, "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_sequence_length": 256, "max_seq_len": 256,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_topk": 2, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "sliding_window": 512, "initializer_range": 0.2, "state_size": 8,
    "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2, "mamba_n_groups": 1, "n_groups": 1,
    "time_step_rank": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "rotary_dim": 8, "attention_hidden_size": 32, "lru_width": 32, "num_attention_heads_per_layer": 4, "conv_L_cache": 3,
    "first_k_dense_replace": 1, "shared_expert_intermediate_size": 24, "expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
}
OWN = {    # what one family needs beside them
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]}, "cpmant": {"dim_head": 8, "dim_ff": 48},
    "gpt_neo": {"attention_types": [[["global"], 4]]}, "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2}, "xlnet": {"d_head": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "mpt": {"attn_config": {"attn_impl": "torch"}}, "falcon": {"new_decoder_architecture": False, "multi_query": False, "alibi": False},
    "bloom": {"n_head": 4}, "stablelm": {"use_qkv_bias": False}, "phi3": {"pad_token_id": 0}, "gemma3_text": {"sliding_window": 16},
    "qwen2_moe": {"decoder_sparse_step": 1}, "qwen3_moe": {"decoder_sparse_step": 1}, "moshi": {"ffn_dim": 48},
    "zamba": {"attn_layer_period": 2},
}


def make(family: str, tokenizer: Any, folder: Path) -> Path:
    """A tiny model of a family, with the words' tokenizer."""
    known = AutoConfig.for_model(family)
    text = known.get_text_config()
    own = OWN.get(family, {})
    given = {name: value for name, value in {**SIZES, **own}.items()
             if name in own or (hasattr(text, name) and not isinstance(getattr(type(text), name, None), property))}
    if "qk_rope_head_dim" in given:    # a head is that part and another one, and has keys and values of its own
        given = {name: value for name, value in given.items() if name not in ("head_dim", "num_key_value_heads")}
        given["num_key_value_heads"] = given["num_attention_heads"]
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = type(text)(**{**given, **tokens})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.05:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_answers(model: Any, ids: list[int]) -> torch.Tensor:
    """The model's own log-probabilities after a row."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """The most probable tokens, each read anew from the beginning."""
    said = list[int]()
    for _ in range(n):
        said.append(int(own_answers(model, ids + said).argmax()))
    return said


def right(hooked: HookedModel, model: Any, chat: bool) -> str:
    """Whether an engine gives the model's own numbers: "right", or how it differs."""
    asked = hooked.in_chat(Chat()) if chat else hooked
    rows = asked.rows(TEXTS)
    ids = [list(one.ids) for one in asked.encode([row.prompt for row in rows])]
    tokenizer = hooked.tokenizer
    theirs = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True)["input_ids"]
              if chat else tokenizer(text).input_ids for text in TEXTS]
    if ids != theirs:
        return "WRONG text"
    apart = (asked.next_log_probs(rows) - torch.stack([own_answers(model, one) for one in ids])).abs().max()
    if not apart < ALIKE:
        return f"WRONG by {apart:.2g}"
    for row, one in zip(asked.generate(rows[1:2], 3), ids[1:2], strict=True):
        expected = tokenizer.decode([i for i in greedy(model, one, 3) if i not in hooked.stop_ids], skip_special_tokens=True)
        if not expected.startswith(row.text) and row.text != expected:
            return f"WRONG answer {row.text!r}, not {expected!r}"
    return "right"


def bridged(hooked: HookedModel, model: Any) -> str:
    """Whether transformer-lens' bridge gives the model's own numbers."""
    ids = list(hooked.encode([Row(mark(TEXTS[1])).prompt])[0].ids)
    with torch.no_grad():
        found = hooked.bridge.forward(torch.tensor([ids]))[0, -1].float().log_softmax(-1)
    apart = float((found - own_answers(model, ids)).abs().max())
    return "right" if apart < ALIKE else f"WRONG by {apart:.2g}"


def tried(work: Any, *args: Any) -> str:
    """What a trial says, or the sentence in which it was refused."""
    try:
        return str(work(*args))
    except AlignblindError as error:
        return f"refused: {error}"
    except Exception as error:    # noqa: BLE001 - a fault of ours, which the table is made to find
        return f"CRASH {type(error).__name__}: {error}"


def row_of(family: str, tokenizer: Any) -> dict[str, str]:
    """The table's row of a family."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = make(family, tokenizer, Path(scratch))
        except Exception as error:    # noqa: BLE001 - a family whose tiny model needs more than is known here
            return {"family": family, "made": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = {"family": family, "made": ""}
        for engine in ("plain", "fast"):
            def load(engine: str = engine) -> HookedModel:
                return load_model(ModelSpec(str(folder), engine=engine, device="cpu", dtype="float32"))

            for name, chat in (("raw", False), ("chat", True)):
                found[f"{engine} {name}"] = tried(lambda chat=chat, load=load: right(load(), model, chat))
        found["bridge"] = tried(lambda: bridged(load_model(ModelSpec(str(folder), engine="plain", device="cpu", dtype="float32")), model))
        return {key: value.replace(str(folder), "the model") for key, value in found.items()}


@contextlib.contextmanager
def one_tokenizer() -> Iterator[Any]:
    """The word-level tokenizer, for all of them: some families' folders would be given a tokenizer class of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        words = AutoTokenizer.from_pretrained(tiny_llama(Path(scratch), WORDS, chat_template=TINY_CHAT))
        real = AutoTokenizer.from_pretrained
        AutoTokenizer.from_pretrained = lambda *args, **kwargs: words
        try:
            yield words
        finally:
            AutoTokenizer.from_pretrained = real


def families() -> list[str]:
    """All architectures that transformers calls causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def short(said: str) -> str:
    """A cell: right, or a reason without what all of them begin with."""
    for start in ("refused: the fast engine cannot run the model: ", "refused: the model ", "refused: "):
        if said.startswith(start):
            reason = said.removeprefix(start).replace("Use engine='plain' (or auto).", "").replace("|", "/").strip()
            return f"no: {reason if len(reason) <= WIDEST else reason[:WIDEST] + ' ...'}"
    return said


def line(family: str, cells: list[str]) -> str:
    """A row of the table: right or no, and each reason once."""
    reasons = dict.fromkeys(cell.removeprefix("no: ") for cell in cells if cell.startswith("no: "))
    return f"| {' | '.join([family, *('no' if cell.startswith('no: ') else cell for cell in cells), ' '.join(reasons)])} |"


class Late(BaseException):
    """A family took too long; no handler of errors takes it for one of its own."""


def _late(*_: object) -> None:
    raise Late


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=None)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    with one_tokenizer() as tokenizer:
        rows = []
        for family in asked.only or families():
            signal.alarm(SECONDS)
            try:
                rows.append(row_of(family, tokenizer))
            except Late:
                rows.append({"family": family, "made": f"more than {SECONDS} seconds"})
            signal.alarm(0)
            print(family, {key: value[:60] for key, value in rows[-1].items()}, file=sys.stderr, flush=True)
    print(PAGE.format(version=transformers.__version__, made=sum(not row["made"] for row in rows)))
    print("| family | plain, raw | plain, chat | fast, raw | fast, chat | bridge | why not |\n|---|---|---|---|---|---|---|")
    for row in rows:
        if not row["made"]:
            print(line(row["family"], [short(row[key]) for key in COLUMNS]))
    others = [row for row in rows if row["made"]]
    if others:
        print(f"\nNot tried, because no model of them that is small and quick enough was made ({len(others)}): "
              f"{', '.join(row['family'] for row in others)}.")


COLUMNS = ("plain raw", "plain chat", "fast raw", "fast chat", "bridge")
PAGE = """# Architectures

Written by `tests/families.py`, with transformers {version}. Of each of {made} architectures a tiny model with random weights was made.
"right": next-token log-probabilities of rows of different lengths, read together, are those of the model's own forward pass on one row at a
time (to 2e-3 nats), and a greedy answer is the one that is read anew from the beginning at every token. "Why not" is what a user is told.
The engine `auto` takes the fast one where it is right, and the plain one otherwise; what the bridge cannot carry needs hook points:
attention views, `cache`.
"""


if __name__ == "__main__":
    main()
