"""How a group of two processes ends: as told, or when one of them is gone or late."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.parallel.conftest import PATIENCE_S, GroupServer, V, run_ranks
from tests.ports import free_port

from eagle3_client import RemoteEagle3Backend, RemoteEagle3Error

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_it_starts_and_stops_five_times_in_a_row(
    serve_group: Any, backend: Any, batch_of: Any
) -> None:
    for number in range(int(os.environ.get("EAGLE3TEST_GROUPS", "5"))):
        server: GroupServer = serve_group(("--tp", "--cp")[number % 2])
        backend(server.url).generate_batch(*batch_of(V))
        server.process.terminate()
        assert server.ended() == 0, server.said
        # The others were sent home: none took the leader for dead, or had to be killed.
        assert "CRITICAL" not in server.said
        assert "WARNING" not in server.said


class Load(threading.Thread):
    """Asks for batches until one fails or it is told to stop."""

    def __init__(self, client: RemoteEagle3Backend, inputs: Any) -> None:
        super().__init__()
        self.client, self.inputs = client, inputs
        self.served, self.errors = 0, []  # type: ignore[var-annotated]
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.is_over.is_set():
            try:
                self.client.generate_batch(*self.inputs)
                self.served += 1
            except RemoteEagle3Error as exc:
                self.errors.append(exc)
                return

    def wait_until_served(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.served < count:
            assert time.monotonic() < deadline
            assert self.is_alive(), self.errors
            time.sleep(0.005)


@pytest.mark.parametrize(
    ("how", "rank", "loaded"),
    [
        ("--tp", 0, True),
        ("--tp", 1, True),
        ("--cp", 0, True),
        ("--cp", 1, False),
    ],
    ids=["tp-leader", "tp-follower", "cp-leader", "cp-follower-idle"],
)
def test_a_rank_that_is_killed_ends_the_group(
    serve_group: Any, backend: Any, batch_of: Any, how: str, rank: int, loaded: bool
) -> None:
    """With its number and a non-zero exit code, so that a supervisor starts all of it again."""
    server: GroupServer = serve_group(how)
    client, inputs = backend(server.url, retry_for_s=1.0), batch_of(V, (70, 40))
    client.generate_batch(*inputs)
    load = Load(client, inputs) if loaded else None
    if load is not None:
        load.wait_until_served(3)
    server.kill_rank(rank)
    started = time.monotonic()
    assert server.ended() == 1, server.said
    assert time.monotonic() - started < 30
    if load is not None:
        load.join(PATIENCE_S)
        assert len(load.errors) == 1
    if rank == 1:
        assert "rank 1 (process" in server.said or "a process of the group is gone" in server.said
        assert "has to start it again" in server.said


@pytest.mark.parametrize("how", ["--tp", "--cp"])
def test_sigterm_under_load_loses_nothing_that_was_admitted(
    serve_group: Any, backend: Any, batch_of: Any, how: str
) -> None:
    server: GroupServer = serve_group(how)
    clients = [backend(server.url, retry_for_s=0.0) for _ in range(3)]
    loads = [Load(client, batch_of(V, (70, 40))) for client in clients]
    for load in loads:
        load.wait_until_served(3)
    server.process.terminate()
    assert server.ended() == 0, server.said
    for load in loads:
        load.join(PATIENCE_S)
        (error,) = load.errors
        assert type(error).__name__ in ("NotReady", "TransportError"), error


def test_a_launcher_that_is_killed_takes_its_ranks_with_it(serve_group: Any) -> None:
    server: GroupServer = serve_group()
    server.process.kill()
    server.process.wait(PATIENCE_S)
    server.wait_until_gone()


def test_an_interrupt_is_a_clean_end(serve_group: Any) -> None:
    server: GroupServer = serve_group()
    server.process.send_signal(signal.SIGINT)
    assert server.ended() == 0, server.said


def test_a_sigterm_before_it_serves_is_a_clean_end(checkpoint: Path) -> None:
    process = subprocess.Popen(
        [*GroupServer.command(), str(checkpoint), "--tp", "2", "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "are processes" in line:
            break
    process.terminate()
    said += process.stderr.read()
    assert process.wait(PATIENCE_S) == 0, said
    process.stderr.close()


COMPARED = [
    "the same: same",
    "ranks [1] have other texts than rank 0, which has rank 0",
]


def test_an_error_of_the_model_leaves_the_group_whole() -> None:
    calls = ["target_head", "input_embeddings", "input_embeddings"]
    said = run_ranks(free_port(), "ranks", 0, 60, *calls).splitlines()
    assert said == [*COMPARED, "target_head: RuntimeError: of the model",
                    *["input_embeddings: done"] * 2]  # fmt: skip


def test_a_rank_that_ends_a_computation_otherwise_breaks_the_group() -> None:
    """At once, whichever of them it was: the next collectives would not meet."""
    said = run_ranks(free_port(), "ranks", 0, 20, "draft_head", "input_embeddings").splitlines()
    assert said[:2] == COMPARED
    (last,) = said[2:]
    assert last.startswith("draft_head: GroupBroken: a computation ended with success on rank 0")
    assert "in another way on ranks [1]" in last


def test_a_rank_that_stalls_beyond_the_timeout_breaks_the_group() -> None:
    """Its collective fails on both, as a forward would, and so would every one after it."""
    said = run_ranks(
        free_port(), "ranks", 9, 6, "input_embeddings", "input_embeddings"
    ).splitlines()
    assert said[:2] == COMPARED
    assert said[2].startswith("input_embeddings: GroupBroken: ")
    assert len(said) == 3
