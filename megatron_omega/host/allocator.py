"""The C library's allocator, told to keep the memory that every step of a training asks for again.

glibc maps each large tensor anew and gives it back to the kernel when it is freed, and the kernel clears every page at
its first touch. Two ranks that form the gradients of a whole model each pay for it twice.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""glibc's names M_TRIM_THRESHOLD and M_MMAP_MAX (malloc.h). No mapping, rather than a high threshold for mappings: that
may be 32 MiB at most, and a wide layer's gradients and activations are larger."""
_LEFT_AT_THE_TOP = (1 << 31) - 1
"""Bytes that may be free at the end of the heap before it shrinks: the most that mallopt's `int` can say."""


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process; return whether the C library could be told.

    What the environment says about the allocator (MALLOC_*, GLIBC_TUNABLES) stands.
    """
    said = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    if any(name in os.environ for name in said) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others have none
    if mallopt is None:
        return False
    told = [mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, _LEFT_AT_THE_TOP)]
    return all(told)
