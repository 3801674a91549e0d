"""How many rows run together: forecast from the memory that is free, halved when the forecast was wrong.

Knows sizes of models and of memory; does NOT run anything.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignblind_mi.errors import AlignblindError

USABLE = 0.6             # share of the free memory that a batch may fill
LOGIT_BYTES = 1 << 28    # float32 logits that exist at a time
MOST_TOKENS = {"cpu": 4096, "cuda": 65536}    # more tokens at a time gain nothing
MOST_ROWS = {"cpu": 256, "cuda": 2048}
log = logging.getLogger(__name__)


class OutOfMemoryError(AlignblindError):
    """Not even a single row fits into the memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ("can't allocate memory", "DefaultCPUAllocator")))


def free_memory(device: torch.device | str) -> int:
    """Bytes that are free on a device (what PyTorch has reserved and does not use included)."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class RowCost:
    """Bytes that a row needs while it runs: per prompt token that it computes, and per column of its cache."""

    token: int
    column: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any, itemsize: int) -> "RowCost":
        """From a model's configuration: the widest moment of a layer, and keys and values of all layers."""
        d, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or d // heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "intermediate_size", None) or 4 * d
        return cls(token=(6 * d + 3 * heads * head + 3 * inner) * itemsize, column=2 * config.num_hidden_layers * kv * head * itemsize,
                   vocabulary=config.vocab_size)


class Budget:
    """What may run together on a device. `tokens` prompt tokens and `rows` rows at most, and `memory` bytes."""

    def __init__(self, cost: RowCost, device: torch.device | str, *, free: int | None = None) -> None:
        kind = torch.device(device).type
        self.cost, self.device = cost, device
        self.memory = int(USABLE * (free_memory(device) if free is None else free))
        self.tokens = max(1, min(MOST_TOKENS.get(kind, MOST_TOKENS["cpu"]), self.memory // cost.token))
        self.rows = MOST_ROWS.get(kind, MOST_ROWS["cpu"])

    @property
    def logit_rows(self) -> int:
        """Rows whose logits over the vocabulary may exist at a time."""
        return max(1, LOGIT_BYTES // (4 * self.cost.vocabulary))

    def fits(self, rows: int, tokens: int, columns: int, *, keep: bool) -> bool:
        """Whether so many rows may run together, each computing `tokens` tokens and, with `keep`, caching `columns` in all layers."""
        if rows == 1:
            return True
        cached = rows * columns * self.cost.column if keep else 0
        most = min(self.rows, self.logit_rows) if keep else self.rows
        return rows <= most and rows * tokens <= self.tokens and rows * tokens * self.cost.token + cached <= self.memory

    def trunks(self, groups: Sequence[list[int]], length: Sequence[int]) -> Iterator[Sequence[list[int]]]:
        """Cut groups of rows that share a prompt (long prompts first) into chunks whose trunks exist at a time."""
        chunk: list[list[int]] = []
        for group in groups:
            if chunk and not self.fits(len(chunk) + 1, length[chunk[0][0]], length[chunk[0][0]], keep=True):
                yield chunk
                chunk = []
            chunk.append(group)
        if chunk:
            yield chunk

    def shrink(self, error: BaseException) -> None:
        """Half as much from now on. Errors: OutOfMemoryError where there is nothing left to halve."""
        if self.tokens == 1 or self.rows == 1:
            raise OutOfMemoryError(f"not even one row fits into the memory of {self.device} ({error}): use a smaller dtype, a larger "
                                   "device or device_map='auto'.") from error
        self.tokens, self.rows, self.memory = max(1, self.tokens // 2), max(1, self.rows // 2), self.memory // 2
        log.warning("out of memory on %s: going on with batches of at most %s", self.device, self)

    def __str__(self) -> str:
        return f"{self.tokens} prompt tokens, {self.rows} rows and {self.memory / 2**30:.1f} GiB"


def release() -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
