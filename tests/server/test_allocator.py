"""Freed blocks leave the server's process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Blocks of 16 MiB, freed and asked for again, raise glibc's threshold. Blocks below it then lie in
# the heap, and a smaller one that is still used above each keeps it there when it is freed.
CHURN = """
import sys, torch
from eagle3_server.allocator import return_large_blocks
if sys.argv[1] == "fixed":
    assert return_large_blocks()
for _ in range(4):
    torch.ones(4 << 20)
blocks = [(torch.ones(2 << 20), torch.ones(1 << 17)) for _ in range(16)]
pins = [pin for _, pin in blocks]
blocks.clear()
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * 4096)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; glibc is what it is about")
def test_large_freed_blocks_leave_the_process() -> None:
    def resident(how: str) -> int:
        command = [sys.executable, "-c", CHURN, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert resident("default") - resident("fixed") > 64 << 20
