"""Server processes that are killed and started again, and a trainer that must not notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.faults.trainer import train
from tests.ports import free_port
from tests.processes import is_alive

from eagle3_schemas import project_to_draft_vocab
from eagle3_server import HFEagle3TargetModel

PATIENCE_S = 120.0
DRAFT_VOCAB_SIZE = 53


class Server:
    """One server at a fixed port, with as many lives as it is given."""

    def __init__(self, start: Callable[[dict[str, Any]], int], log: Path, **told: Any) -> None:
        self._start, self.log = start, log
        self.told: dict[str, Any] = {"port": free_port(), "log": str(log), **told}
        self.url = f"http://127.0.0.1:{self.told['port']}"
        self.pid = 0
        self.lives = 0

    def start(self, **told: Any) -> None:
        """Fork it; `told` holds for this life alone."""
        self.pid = self._start({**self.told, **told})
        self.lives += 1

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            assert is_alive(self.pid), self.log.read_text()[-3000:]
            time.sleep(0.02)
        raise AssertionError("it never became ready")

    def kill(self, number: int = signal.SIGKILL) -> None:
        pid = self.pid  # a supervisor may start the next life while this one is waited for
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        self.wait_until_dead(pid)

    def wait_until_dead(self, pid: int | None = None) -> None:
        pid, deadline = pid or self.pid, time.monotonic() + PATIENCE_S
        while is_alive(pid):
            assert time.monotonic() < deadline, "it did not end"
            time.sleep(0.005)


class Supervisor(threading.Thread):
    """Starts a server again whenever it has ended, as systemd or Kubernetes would."""

    def __init__(self, server: Server, after_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self._server, self._after_s = server, after_s
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.is_over.wait(0.01):
            if not is_alive(self._server.pid) and not self.is_over.wait(self._after_s):
                self._server.start()

    def stop(self) -> None:
        self.is_over.set()
        self.join()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Callable[[dict[str, Any]], int]]:
    ambient = {name: value for name, value in os.environ.items() if "EAGLE3_" not in name}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**ambient, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout, lock = process.stdin, process.stdout, threading.Lock()
    assert stdout.readline() == "ready\n"

    def start(told: dict[str, Any]) -> int:
        with lock:
            stdin.write(json.dumps(told) + "\n")
            stdin.flush()
            return int(stdout.readline())

    yield start
    stdin.close()
    process.wait(60)
    stdout.close()


@pytest.fixture
def server(zygote: Any, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`server(**told)`: one that is ready; see `zygote.py`."""
    with ExitStack() as stack:

        def build(**told: Any) -> Server:
            number = len(list(tmp_path.glob("*.log")))
            built = Server(zygote, tmp_path / f"server-{number}.log", **told)
            built.log.touch()
            stack.callback(built.kill)
            built.start()
            built.wait_until_ready()
            return built

        yield build


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervisor]]:
    with ExitStack() as stack:

        def begin(server: Server, after_s: float = 0.0) -> Supervisor:
            supervisor = Supervisor(server, after_s)
            stack.callback(supervisor.stop)
            return supervisor

        yield begin


# --- the trainer ---


@pytest.fixture(scope="session")
def draft_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randperm(131, generator=generator)[:DRAFT_VOCAB_SIZE]


@pytest.fixture
def undisturbed(
    build_model: Any, batch_of: Any, draft_ids: torch.Tensor, mapping: Any
) -> Callable[..., tuple[list[Any], list[float]]]:
    """`undisturbed(steps)`: batches, and the losses of a run whose target is in this process."""

    def build(steps: int, seed: int = 0) -> tuple[list[Any], list[float]]:
        inputs = [batch_of(131, seed=1000 * seed + step) for step in range(steps)]
        target = HFEagle3TargetModel(build_model("llama"))
        ids, mask = mapping(draft_ids, 131)

        def supervision() -> Iterator[Any]:
            for each in inputs:
                batch = target.generate_batch(*each)
                probs, position_mask = project_to_draft_vocab(
                    batch.logits, ids, mask, batch.loss_mask
                )
                attended = each.attention_mask[..., None] != 0
                batch.aux_hidden_states = batch.aux_hidden_states * attended
                batch.logits, batch.target_probs, batch.position_mask = None, probs, position_mask
                yield batch

        return inputs, train(supervision())

    return build
