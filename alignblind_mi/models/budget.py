"""How many rows run together: forecast from the memory that is free, halved when the forecast was wrong.

Knows sizes of models and of memory; does NOT run anything.
"""

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from alignblind_mi.borders import ranks
from alignblind_mi.errors import AlignblindError

USABLE = 0.6             # share of the free memory that a batch may fill
LOGIT_BYTES = 1 << 28    # float32 logits that exist at a time while answers are decoded
LENS_BLOCK = {"cpu": (512, 256), "cuda": (4096, 8192)}    # rows and words whose logits exist at a time in a read-out of few words
MOST_TOKENS = {"cpu": 16384, "cuda": 65536}    # more tokens or rows at a time gain nothing
MOST_ROWS = {"cpu": 512, "cuda": 2048}
OVERHEAD = {"cpu": 20.0, "cuda": 300.0}    # what a batch costs beyond its tokens, in tokens: measured on a CPU, of a GPU's order
OUT_OF_MEMORY = ("can't allocate memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
Numbers = Sequence[int] | Mapping[int, int]
log = logging.getLogger(__name__)


class OutOfMemoryError(AlignblindError):
    """Not even a single row fits into the memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY))


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
        config = config.get_text_config()

        def most(name: str, usual: int) -> int:
            given = getattr(config, name, None) or usual
            return max(given) if isinstance(given, list | tuple) else int(given)    # a number for each layer

        d = config.hidden_size
        heads = most("num_attention_heads", max(1, d // 64))    # a recurrent model has none
        head, kv, inner = most("head_dim", d // heads), most("num_key_value_heads", heads), most("intermediate_size", 4 * d)
        return cls(token=(6 * d + 3 * heads * head + 3 * inner) * itemsize, column=2 * config.num_hidden_layers * kv * head * itemsize,
                   vocabulary=config.vocab_size)


class Budget:
    """What may run together: `tokens` prompt tokens and `rows` rows at most, and on each device what its own free memory holds.

    `shares`: the devices that a model lies on besides, and which share of all keys and values each holds (`blocks.device_shares`); without
    it all lie on `device`. Of several processes the one with the least memory decides, so that all make the same batches.
    """

    def __init__(self, cost: RowCost, device: torch.device | str, *, free: int | None = None,
                 shares: Mapping[torch.device, float] | None = None) -> None:
        self.kind = kind = torch.device(device).type
        self.cost, self.device = cost, device
        self.places = [(ranks.least(int(USABLE * (free_memory(place) if free is None else free))), share)
                       for place, share in (shares or {torch.device(device): 1.0}).items()]
        self.tokens = max(1, min(MOST_TOKENS.get(kind, MOST_TOKENS["cpu"]), self.memory // cost.token))
        self.rows = MOST_ROWS.get(kind, MOST_ROWS["cpu"])
        self.lens_block = LENS_BLOCK.get(kind, LENS_BLOCK["cpu"])

    @property
    def memory(self) -> int:
        """Bytes that may be filled on the device that has the least."""
        return min(memory for memory, _ in self.places)

    @property
    def logit_rows(self) -> int:
        """Rows whose logits over the vocabulary may exist at a time."""
        return max(1, LOGIT_BYTES // (4 * self.cost.vocabulary))

    def most_rows(self, tokens: int, columns: int, *, keep: bool) -> int:
        """How many rows may run at a time, each computing `tokens` and, with `keep`, caching `columns` in all layers: at least one."""
        kept = columns * self.cost.column if keep else 0
        holds = min(int(memory / (tokens * self.cost.token + share * kept)) for memory, share in self.places)
        most = min(self.rows, self.tokens // tokens, holds, self.logit_rows if keep else self.rows)
        return max(1, most)

    def trunks(self, groups: Sequence[list[int]], length: Sequence[int]) -> Iterator[Sequence[list[int]]]:
        """Cut groups of rows that share a prompt (long prompts first) into chunks whose trunks exist at a time."""
        chunk: list[list[int]] = []
        for group in groups:
            longest = length[chunk[0][0]] if chunk else 0
            if chunk and len(chunk) >= self.most_rows(longest, longest, keep=True):
                yield chunk
                chunk = []
            chunk.append(group)
        if chunk:
            yield chunk

    def parts(self, order: Sequence[int], length: Numbers, width: Numbers, room: int | None, share: Mapping[int, float] | None = None
              ) -> Iterator[list[int]]:
        """Cut rows (long ones first) into batches that may run together, at the least cost: see `cheapest_cuts`.

        `length[i]` are the tokens that row i computes, in a `share` of the layers (default: all); with `room`, `width[i]` + `room` columns
        are cached. Batches of one cut are of like size where memory asks for several.
        """
        overhead = OVERHEAD.get(self.kind, OVERHEAD["cpu"]) * (1 + (room or 0))
        for same in cheapest_cuts(order, length, share or {}, overhead):
            most = self.most_rows(length[same[0]], max(width[i] for i in same) + (room or 0), keep=room is not None)
            count = -(-len(same) // most)
            sizes = [len(same) // count + (k < len(same) % count) for k in range(count)]
            for size in sizes:
                yield same[:size]
                same = same[size:]

    def shrink(self, error: BaseException) -> None:
        """Half as much from now on. Errors: OutOfMemoryError where there is nothing left to halve."""
        if ranks.together() > 1:    # one process alone cannot go on otherwise than the others
            raise OutOfMemoryError(f"memory ran out on {self.device} ({error}), and batches are not halved with tensor parallelism: start "
                                   "more processes, use a smaller dtype, or see to it that nothing else fills the memory.") from error
        if self.tokens == 1 or self.rows == 1:
            raise OutOfMemoryError(f"not even one row fits into the memory of {self.device} ({error}): use a smaller dtype, a larger "
                                   "device or device_map='auto'.") from error
        self.tokens, self.rows = max(1, self.tokens // 2), max(1, self.rows // 2)
        self.places = [(memory // 2, share) for memory, share in self.places]
        log.warning("out of memory on %s: going on with batches of at most %s", self.device, self)

    def __str__(self) -> str:
        return f"{self.tokens} prompt tokens, {self.rows} rows and {self.memory / 2**30:.1f} GiB"


def cheapest_cuts(order: Sequence[int], length: Numbers, share: Mapping[int, float], overhead: float) -> list[list[int]]:
    """Cut rows, long ones first, into batches of the least cost.

    Each row of a batch costs the length of its longest row, times the share of the layers that it runs (default 1); each batch costs
    `overhead` tokens more, as a small batch uses a processor badly. Exact, by dynamic programming over the different lengths.
    """
    lengths = sorted({length[i] for i in order}, reverse=True)
    work = dict.fromkeys(lengths, 0.0)
    for i in order:
        work[length[i]] += share.get(i, 1.0)
    before = [0.0, *accumulate(work[n] for n in lengths)]
    best, cut = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        costs = [best[start] + lengths[start] * (before[end] - before[start]) + overhead for start in range(end)]
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    bounds, end = [], len(lengths)
    while end:
        bounds.append((lengths[cut[end]], lengths[end - 1]))
        end = cut[end]
    return [[i for i in order if low <= length[i] <= high] for high, low in reversed(bounds)]


def release() -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
