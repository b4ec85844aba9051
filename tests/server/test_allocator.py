"""`allocator`: a forward's memory is there again for the next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from eagle3_server import allocator

GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it sets glibc's allocator: another has no such knobs"
)

# Whether a block of 31 MiB lies in the heap, which is kept, or in a mapping, which is given back;
# and how much memory stays when it is freed, and after loading gave back all that was.
PLACE_A_BLOCK = """
import sys, torch
from pathlib import Path
from eagle3_server.allocator import give_back_freed_memory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
before = resident()
block = torch.full((31 << 18,), 1.0)
heap = [line for line in Path("/proc/self/maps").read_text().splitlines() if "[heap]" in line]
start, end = (int(edge, 16) for edge in heap[0].split()[0].split("-"))
print(start <= block.data_ptr() < end)
del block
print(resident() - before > 30 << 20)
give_back_freed_memory()
print(resident() - before > 30 << 20)
"""


def place(mode: str, **variables: str) -> list[str]:
    """What the script prints in a fresh process."""
    environment = {k: v for k, v in os.environ.items() if "MALLOC" not in k.upper()}
    ran = subprocess.run(
        [sys.executable, "-c", PLACE_A_BLOCK, mode],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


@GLIBC
def test_what_is_freed_is_kept_for_the_next_forward() -> None:
    assert place("keep") == ["True", "True", "True", "False"]
    assert place("leave") == ["None", "False", "False", "False"]  # what there is to mend


@GLIBC
def test_the_operators_own_variables_win() -> None:
    for tunables in ({"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}):
        assert place("keep", **tunables) == ["False", "False", "False", "False"]


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutMallopt:
        pass

    def load(_name: Any) -> WithoutMallopt:
        return WithoutMallopt()

    for name in ("GLIBC_TUNABLES", *allocator._VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", load)
    assert allocator.keep_freed_memory() is False
    allocator.give_back_freed_memory()
