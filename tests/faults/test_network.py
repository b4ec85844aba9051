"""Networks that delay, cut, reset, swallow and flip: the losses must not show it."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.faults.proxy import FaultProxy, Faults, random_faults
from tests.faults.trainer import remote, train
from tests.fuzz.mutations import how_many, seed_of

pytestmark = pytest.mark.slow

ANSWER = 14_500  # an answer's bytes, head included, of these tests' batches


@pytest.fixture
def proxy() -> Iterator[Callable[..., FaultProxy]]:
    with ExitStack() as stack:

        def build(server: Any, faults_of: Callable[[int], Faults]) -> FaultProxy:
            built = FaultProxy(("127.0.0.1", server.told["port"]), faults_of)
            stack.callback(built.close)
            return built

        yield build


def test_every_fault_at_random(
    server: Any, proxy: Any, connect: Any, draft_ids: Any, undisturbed: Any
) -> None:
    seed = seed_of("EAGLE3TEST_SEED")
    generator = random.Random(seed)
    steps = how_many(200, "EAGLE3TEST_NETWORK_STEPS")
    is_armed = False
    between = proxy(
        server(), lambda _: random_faults(generator, 4 * ANSWER) if is_armed else Faults()
    )
    backend = connect(None, draft_ids, urls=between.url, exact=True)
    is_armed = True
    between.drop()
    inputs, expected = undisturbed(steps)
    assert train(remote(backend, inputs)) == expected
    print(f"{between.connections} connections in {steps} steps, seed {seed}")
    assert between.connections > steps / 20


@pytest.mark.parametrize("at", [0, 100, 400, 1000, ANSWER // 2, ANSWER - 300])
@pytest.mark.parametrize("fault", ["cut_after", "reset_after", "flip_at"])
def test_each_fault_at_each_place(
    server_once: Any, proxy: Any, connect: Any, draft_ids: Any, undisturbed: Any, fault: str,
    at: int,
) -> None:  # fmt: skip
    """Three connections suffer it, in the first answer they carry."""
    is_armed = False
    between = proxy(
        server_once, lambda n: Faults(**{fault: at}) if is_armed and n < 3 else Faults()
    )
    backend = connect(None, draft_ids, urls=between.url, exact=True, max_in_flight=4)
    is_armed = True
    between.drop()
    inputs, expected = undisturbed(8)
    assert train(remote(backend, inputs, depth=4)) == expected
    assert between.connections > 3


@pytest.fixture(scope="module")
def server_once(zygote: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.faults.conftest import Server

    built = Server(zygote, tmp_path_factory.mktemp("server") / "log")
    built.log.touch()
    built.start()
    try:
        built.wait_until_ready()
        yield built
    finally:
        built.kill()


def test_a_black_hole_is_left_for_another_server(
    server: Any, proxy: Any, connect: Any, draft_ids: Any, undisturbed: Any, caplog: Any
) -> None:
    """Long before the timeout of a request: its health checks are not answered either."""
    hole = Faults()
    servers = [server(), server()]
    between = proxy(servers[0], lambda _: hole)
    backend = connect(None, draft_ids, urls=[between.url, servers[1].url], exact=True)
    inputs, expected = undisturbed(40)
    stamps: list[float] = []

    def step_done(step: int) -> None:
        stamps.append(time.monotonic())
        hole.is_black_hole = 10 <= step < 30

    assert train(remote(backend, inputs), step_done) == expected
    stall = max(b - a for a, b in itertools.pairwise(stamps))
    print(f"longest step {stall:.1f} s")
    assert stall < 60  # of the 120 s that a request may take
    assert f"{between.url} is out" in caplog.text


def test_short_requests_with_resets_leave_nothing_behind(
    server: Any, proxy: Any, connect: Any, draft_ids: Any, undisturbed: Any, matches: Any,
    batch_of: Any,
) -> None:  # fmt: skip
    """Neither memory, threads nor sockets, on both sides."""
    count = how_many(1000, "EAGLE3TEST_RESETS")
    generator = random.Random(3)
    one = server()
    between = proxy(one, lambda _: Faults(reset_after=1000 + generator.randrange(20 * ANSWER)))
    backend = connect(None, draft_ids, urls=between.url, exact=True)
    inputs = batch_of(131)
    first = backend.generate_batch(*inputs)

    def held(pid: int) -> tuple[int, int, int]:
        threads = len(os.listdir(f"/proc/{pid}/task"))
        files = len(os.listdir(f"/proc/{pid}/fd"))
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return threads, files, pages * 4096

    def run(number: int) -> None:
        for _ in range(number):
            again = backend.generate_batch(*inputs)
            assert again.target_probs.equal(first.target_probs)
            assert again.aux_hidden_states.equal(first.aux_hidden_states)

    run(count // 5)
    gc.collect()
    before = {pid: held(pid) for pid in (os.getpid(), one.pid)}
    run(count)
    gc.collect()
    assert between.connections > count / 40
    for pid, (threads, files, memory) in before.items():
        now = held(pid)
        assert now[0] <= threads + 2
        assert now[1] <= files + 8
        assert now[2] - memory < 16 << 20
    print(f"{count} requests, {between.connections} connections; before {before}")
    assert threading.active_count() < 40
