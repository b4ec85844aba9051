"""A server process whose target computes nothing: its answers are known by their seeds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.server.sharing.conftest import PATIENCE_S

SERVER = """
import sys
import eagle3_server.serve as module
from eagle3_server import ServerSettings
from tests.seeded_target import SeededTarget

def before(job):
    if job.rows == "loss_mask":  # the warm-up
        return
    seed = int(job.input_ids[0, 0])
    if seed == 13:
        raise RuntimeError("CUDA error: device-side assert triggered")
    print("computing", flush=True)
    if seed == 7:
        sys.stdin.readline()

module.load_target = lambda settings: SeededTarget(before)
sys.exit(module.serve(ServerSettings(model="seeded", port=0)))
"""


class Process:
    """A server whose forward of seed 7 waits for `go_on`."""

    def __init__(self, **variables: str) -> None:
        ambient = {name: value for name, value in os.environ.items() if "EAGLE3_" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ambient, **variables},
            cwd=Path(__file__).parents[3],
        )
        assert self.process.stderr is not None
        self.said = ""
        for line in self.process.stderr:
            self.said += line
            if "trainers use" in line:
                break
        self.url = self.said.split()[-1].rstrip('"}')  # JSON, if so asked
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.said += line

    def wait_until_computing(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "computing\n"

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ended(self) -> int:
        """Wait for the exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE_S)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
