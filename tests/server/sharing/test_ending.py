"""How a server process ends: drained on SIGTERM, at once on the second, non-zero when broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.sharing.conftest import PATIENCE_S, Trainer, problem

SERVER = """
import sys
import eagle3_server.serve as module
from eagle3_server import ServerSettings
from tests.seeded_target import SeededTarget

def before(job):
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
        self.url = self.said.split()[-1]
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


@pytest.fixture
def started() -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def start(**variables: str) -> Process:
            process = Process(**variables)
            stack.callback(process.close)
            return process

        yield start


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to pass")


def test_a_server_drains_on_sigterm(started: Any, trainer: Any, is_right: Any) -> None:
    """Unready at once, still listening, what was admitted is finished, then exit code 0."""
    server = started(EAGLE3_DRAIN_DELAY_S="600", EAGLE3_GRACE_PERIOD_S="60")
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(2) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        waiting = pool.submit(one.ask, 8)
        until(lambda: one.status()["queued_requests"] == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: one.http.get("/readyz").status_code == 503)
        assert one.http.get("/healthz").status_code == 200
        refused = one.ask(9)
        assert problem(refused)[:2] == (503, "not_ready")
        assert "stopping" in problem(refused)[2]
        assert "retry-after" in refused.headers
        server.go_on()
        assert is_right(7, computing.result(PATIENCE_S))
        assert is_right(8, waiting.result(PATIENCE_S))
    assert server.process.poll() is None  # it listens for the drain delay
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    assert "Traceback" not in server.said


def test_without_a_delay_it_ends_when_its_work_is_done(
    started: Any, trainer: Any, is_right: Any
) -> None:
    server = started()
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in server.said)
        server.go_on()
        assert is_right(7, computing.result(PATIENCE_S))
    assert server.ended() == 0
    assert "Traceback" not in server.said


def test_work_that_outlasts_the_grace_period_is_given_up(started: Any, trainer: Any) -> None:
    server = started(EAGLE3_GRACE_PERIOD_S="1")
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        server.process.send_signal(signal.SIGTERM)
        assert problem(computing.result(PATIENCE_S))[:2] == (503, "not_ready")
    assert server.ended() == 0
    assert "stopped without waiting for the model" in server.said
    assert "Traceback" not in server.said


def test_a_second_sigterm_ends_at_once(started: Any, trainer: Any) -> None:
    server = started(EAGLE3_GRACE_PERIOD_S="600", EAGLE3_DRAIN_DELAY_S="600")
    one: Trainer = trainer(server.url)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(one.ask, 7)
        server.wait_until_computing()
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in server.said)
        with suppress(httpx.TransportError):  # it may be told, or not
            assert problem(computing.result(PATIENCE_S))[:2] == (503, "not_ready")
    assert server.ended() == 0
    assert "Traceback" not in server.said


def test_a_lost_device_ends_the_process_with_an_error(started: Any, trainer: Any) -> None:
    server = started()
    one: Trainer = trainer(server.url)
    assert problem(one.ask(13))[:2] == (503, "not_ready")
    assert server.ended() == 1
    assert "the device failed for good" in server.said
    assert "device-side assert" in server.said


@pytest.mark.parametrize("content", ["\n \n", None], ids=["empty", "missing"])
def test_a_token_file_that_cannot_serve_is_refused(tmp_path: Path, content: str | None) -> None:
    from typer.testing import CliRunner

    from eagle3_client.cli import app

    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(app, ["serve", "/no/such/model", "--token-file", str(path)])
    assert result.exit_code == 2
    assert str(path) in result.output
    assert "token" in result.output
