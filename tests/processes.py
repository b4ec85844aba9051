"""What tests ask of processes that they started, any of which may end while it is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_GONE = (FileNotFoundError, ProcessLookupError)
"""What the kernel says of a process that ends, by how far it has; other errors are errors."""


def is_alive(pid: int) -> bool:
    """Whether a thread of it lives: its first may be a zombie while others hold its sockets."""
    with suppress(*_GONE):
        for thread in os.listdir(f"/proc/{pid}/task"):
            stat = read(pid, f"task/{thread}/stat").decode()
            if stat and stat.rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False


def read(pid: int, name: str) -> bytes:
    """A file of its folder in /proc; nothing if it is gone."""
    with suppress(*_GONE):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def listening(pids: Iterable[int]) -> list[str]:
    """Addresses at which they listen by TCP, in hexadecimal as the kernel prints them."""
    inodes = set()
    for pid in pids:
        with suppress(*_GONE):
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with suppress(*_GONE):
                    inodes.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return [
        columns[1].partition(":")[0]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for columns in map(str.split, Path(table).read_text().splitlines()[1:])
        if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes
    ]
