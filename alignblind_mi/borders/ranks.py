"""Several processes of one program that hold one model together (torchrun): all run the same calls, the first one alone writes and prints.

Knows processes; does NOT know models. Where nothing has joined, this process is the only one and leads.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_JOINED: list[int] = []    # (this process' number, how many there are), once it has joined


def started() -> int:
    """How many processes torchrun has started; 1 without it."""
    named = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if named and os.environ["WORLD_SIZE"].isdigit() else 1


def join() -> None:
    """From here on the processes of torchrun act as one: see `leads` and `agreed`. A second call changes nothing."""
    if _JOINED:
        return
    import torch

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if not torch.distributed.is_initialized():
        device = None
        if kind() == "cuda":
            torch.cuda.set_device(local)
            device = torch.device("cuda", local)
        torch.distributed.init_process_group("nccl" if device else "gloo", rank=rank, world_size=started(), device_id=device,
                                             timeout=timedelta(hours=2))    # reading 70B weights takes its time
    _JOINED[:] = [rank, started()]
    if rank:
        logging.getLogger("alignblind_mi").setLevel(logging.ERROR)


def kind() -> str:
    """The kind of device that the processes share work on: this machine's accelerator, or cpu."""
    import torch

    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def leads() -> bool:
    """Whether this process writes and prints."""
    return not _JOINED or _JOINED[0] == 0


def rank() -> int:
    """The number of this process, from 0."""
    return _JOINED[0] if _JOINED else 0


def together() -> int:
    """How many processes act as one; 1 where none has joined."""
    return _JOINED[1] if _JOINED else 1


def agreed(value: T) -> T:
    """The first process' value, in all of them, which wait for it."""
    if together() == 1:
        return value
    import torch

    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def least(number: int) -> int:
    """The smallest of all processes' numbers, in all of them."""
    if together() == 1:
        return number
    import torch

    held: list[int] = [0] * together()
    torch.distributed.all_gather_object(held, number)
    return min(held)


def gathered(part: Tensor) -> Tensor:
    """The parts of a tensor that is cut along its last dimension, which are of one size, joined in all processes."""
    import torch

    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(together())]
    torch.distributed.all_gather(parts, part)
    return torch.cat(parts, -1)


def own_part(whole: Tensor) -> Tensor:
    """This process' part of a tensor that is whole in all of them: the way back from `gathered`."""
    return whole.chunk(together(), -1)[rank()]
