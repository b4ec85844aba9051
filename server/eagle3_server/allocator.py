"""What glibc does with freed memory: keeps it for a CPU target's activations."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")


def keep_freed_memory() -> bool:
    """Tell glibc to reuse what a forward freed instead of giving it back; returns whether it does.

    By default it may unmap activations after every layer, and each comes back one page fault per
    4 KiB: from 25,000 to 120,000 a forward on the same model, differing from run to run. Call it
    before threads are made. The operator's own variables win. Blocks over 32 MiB are mapped anew in
    any case, and an allocator that was preloaded in glibc's place is not affected.
    """
    if any(name in os.environ for name in _VARIABLES):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = (
        (_M_ARENA_MAX, 1),  # other arenas are cut into heaps of 64 MiB, unmapped when empty
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
    )
    return all(mallopt(name, value) for name, value in settings)


def give_back_freed_memory() -> None:
    """Give back to the system what loading used and freed: more than any forward will need.

    Where there is no glibc, nothing happens.
    """
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
