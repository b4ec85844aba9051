"""Runs the pages' commands as a reader would: in a shell, with the environment's programs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 240.0


def environment(**variables: str) -> dict[str, str]:
    """Return the ambient environment without settings, the tests' interpreter's programs first."""
    ambient = {name: value for name, value in os.environ.items() if "EAGLE3_" not in name}
    path = f"{Path(sys.executable).parent}{os.pathsep}{ambient['PATH']}"
    shared = {"PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "OMP_NUM_THREADS": "2"}
    return {**ambient, **shared, **variables}


def run(script: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines to their end."""
    return subprocess.run(
        ["bash", "-c", f"set -e\n{script}"], cwd=cwd, env=environment(**variables),
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


class Served:
    """A shell whose last command serves.

    Attributes:
        said: what it printed so far, both streams.
        urls: where trainers reach it.
    """

    def __init__(self, process: subprocess.Popen[str], announced: str) -> None:
        self.process, self.said, self.urls = process, "", ""
        self._announced = announced
        self._is_there = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.said += line
            if found := re.search(rf"{self._announced}(http://\S+)", line):
                self.urls = found[1]
                self._is_there.set()
        self._is_there.set()

    def wait(self) -> None:
        """Wait until it serves."""
        assert self._is_there.wait(PATIENCE_S), self.said
        assert self.urls, f"it ended without serving:\n{self.said}"

    def stop(self) -> int:
        """Send the shell's one child what a terminal's Ctrl-C sends; return its exit code."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


@contextmanager
def serving(
    script: str, cwd: Path, *, announced: str = "ready: trainers use ", **variables: str
) -> Iterator[Served]:
    """Run lines of which the last serves; yields when it does, and stops it in the end."""
    process = subprocess.Popen(
        ["bash", "-c", f"set -e\n{script}"], cwd=cwd, env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    served = Served(process, announced)
    try:
        served.wait()
        yield served
    finally:
        try:
            served.stop()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
