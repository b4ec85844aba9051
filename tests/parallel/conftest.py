"""`eagle3-remote serve --tp 2` or `--cp 2` as users run it: a launcher, and what its ranks say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.processes import is_alive

from eagle3_client import RemoteEagle3Backend

PATIENCE_S = 90.0
V, D = 131, 53  # of the checkpoint, and of its draft vocab
TIMEOUT_S = 10  # of the shared group: a rank may wait so long for the other


class GroupServer:
    """A launcher with its ranks; ready when it has been built."""

    def __init__(self, *arguments: object, cwd: Path | None = None, **variables: str) -> None:
        ambient = {name: value for name, value in os.environ.items() if "EAGLE3_" not in name}
        self.process = subprocess.Popen(
            [*self.command(), *map(str, arguments)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env={**ambient, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables},
        )
        self.said, self.url, self.ranks = "", "", ()
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"are processes ([\d, ]+)", line):
                self.ranks = tuple(int(pid) for pid in found[1].split(", "))
            if found := re.search(r"trainers use (http://\S+)", line):
                self.url = found[1]
                break
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    ranks: tuple[int, ...]

    @staticmethod
    def command() -> list[str]:
        return [sys.executable, "-m", "eagle3_client.cli", "serve"]

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.said += line

    def kill_rank(self, rank: int) -> None:
        os.kill(self.ranks[rank], signal.SIGKILL)

    def ended(self) -> int:
        """Wait for the launcher's exit code, and for its ranks to be gone."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        self.wait_until_gone()
        return code

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while any(map(is_alive, self.ranks)):
            assert time.monotonic() < deadline, f"ranks {self.ranks} outlive their launcher"
            time.sleep(0.01)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE_S)
        for pid in filter(is_alive, self.ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.stderr is not None:
            self.process.stderr.close()


@pytest.fixture(scope="module", params=["--tp", "--cp"])
def group_server(request: Any, checkpoint: Path) -> Iterator[GroupServer]:
    """One that tests only ask."""
    server = GroupServer(
        checkpoint,
        request.param,
        2,
        "--port",
        0,
        "--device",
        "cpu",
        EAGLE3_GROUP_TIMEOUT_S=str(TIMEOUT_S),
    )
    try:
        assert server.url, server.said
        yield server
    finally:
        server.close()


def run_ranks(port: int, module: str, *arguments: object) -> str:
    """What rank 0 of a program printed that runs as two ranks."""
    here = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    here["MASTER_PORT"] = str(port)
    command = [sys.executable, "-m", f"tests.parallel.{module}", *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**here, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    return said[0]


@pytest.fixture
def serve_group(checkpoint: Path) -> Iterator[Callable[..., GroupServer]]:
    """`serve_group("--cp")`: the checkpoint served by two ranks on the CPU, `--tp` by default."""
    with ExitStack() as stack:

        def start(how: str = "--tp") -> GroupServer:
            server = GroupServer(checkpoint, how, 2, "--port", 0, "--device", "cpu")
            stack.callback(server.close)
            assert server.url, server.said
            return server

        yield start


@pytest.fixture
def backend(mapping: Any, frequency_ordered: Any) -> Any:
    """`backend(url)`: a client with a draft vocab."""
    made: list[RemoteEagle3Backend] = []

    def build(url: str, **kwargs: Any) -> RemoteEagle3Backend:
        client = RemoteEagle3Backend(url, **kwargs)
        made.append(client)
        client.set_vocab_mapping(*mapping(frequency_ordered(V, D), V))
        return client

    yield build
    for client in made:
        client.close()


@pytest.fixture
def model(checkpoint: Path) -> Any:
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
