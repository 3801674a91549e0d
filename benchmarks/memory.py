"""How much memory a call adds at its highest point, by the kernel's own count of the process."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text("utf-8").splitlines() if line.startswith(field))


def peak_bytes(act: Callable[[], Any]) -> int:
    """Bytes by which the resident set rose above its level before the call (after a first call that loads what is lazy).

    Errors: OSError where the system does not count it (it is read from /proc, so on Linux only).
    """
    act()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)    # what was freed goes back, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = _kilobytes("VmRSS")
    act()
    return (_kilobytes("VmHWM") - before) * 1024
