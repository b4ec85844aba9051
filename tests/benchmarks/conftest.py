"""One quick run of every benchmark, which all tests read."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the results, and what `run.py --quick` printed.

    Made once, whichever process of the tests needs it first; the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out, printed = shared / "quick-run", shared / "quick-run.txt"
    with (shared / "quick-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--out", str(out)]
            process = subprocess.run(command, capture_output=True, text=True, timeout=1150)
            words = process.stdout if process.returncode == 0 else f"failed\n{process.stderr}"
            printed.write_text(words)
    words = printed.read_text()
    assert not words.startswith("failed"), words
    return out, words
