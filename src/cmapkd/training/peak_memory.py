"""How much memory a stretch of work takes at its peak: of the GPU where there is one, else of this process."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

_FORGET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Begins a new stretch. Where the system cannot do so (no GPU, and not Linux) the peak is the whole process's."""
    gc.collect()
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # else what was freed before still counts as resident
        library.malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _FORGET.exists():
        try:
            _FORGET.write_text("5", encoding="ascii")
        except OSError:  # some containers show the file and refuse it
            return


def peak_bytes(device: torch.device) -> int:
    """The most bytes held at once since the stretch began: by the GPU's allocator, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"))):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
