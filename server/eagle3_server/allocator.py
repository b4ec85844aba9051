"""Makes glibc give large freed blocks back, so that a server's memory is what it uses."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_THRESHOLD_BYTES: Final = 1 << 20


def return_large_blocks() -> bool:
    """Let every block of 1 MiB and more be mapped, and unmapped when it is freed.

    By default glibc raises that threshold up to 32 MiB as blocks are freed, and keeps what is
    smaller: on a CPU target this doubled the peak of a request (benchmarks/results/head.md, malloc
    default against fixed). The same as MALLOC_MMAP_THRESHOLD_=1048576.

    Returns:
        Whether it took effect; False without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
