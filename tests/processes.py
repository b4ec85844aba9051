"""What tests ask of processes that they started."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a thread of it lives: its first may be a zombie while others hold its sockets."""
    for stat in Path("/proc").glob(f"{pid}/task/*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False
