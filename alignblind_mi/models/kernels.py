"""Which of torch's attention kernels run on a GPU. Does NOT know models.

cuDNN makes a plan for every new length of the keys, and a decoding step has a new length: on an H200 that took 1.9 ms a layer, forty times
what the attention itself did. Flash and memory-efficient attention need none.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
P = ParamSpec("P")
T = TypeVar("T")


def without_plans(run: Callable[P, T]) -> Callable[P, T]:
    """A method of an engine, which has a `device`: on a GPU it runs by kernels that need no plan for a length.

    For decoding steps, each of which has another length; prompts are read in few.
    """
    @wraps(run)
    def steady(*given: P.args, **named: P.kwargs) -> T:
        engine: Any = given[0]
        if engine.device.type != "cuda":
            return run(*given, **named)
        with sdpa_kernel(WITHOUT_PLANS):
            return run(*given, **named)

    return steady
