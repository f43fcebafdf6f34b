"""Memory that tensors free stays with the process: on Linux, steps on a CPU then take less time.

By default glibc gives every freed block above 32 MiB back to the kernel. The next step asks for the block again, and
the kernel maps and zeroes each of its pages anew (mallopt(3), M_MMAP_THRESHOLD). benchmarks/freed_memory.py has times.
"""

from __future__ import annotations

import ctypes
import os
import sys

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed memory and to give none back; the process keeps its peak until it ends.

    Nothing is told where the user set glibc's own variables (`MALLOC_...` or `GLIBC_TUNABLES`), or without glibc.

    Returns:
        Whether it was told so.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(MMAP_MAX, 0)) and bool(library.mallopt(TRIM_THRESHOLD, NEVER))
