"""Servers that are killed under a trainer: the losses must not show it."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from typing import Any

import pytest
from tests.faults.conftest import PATIENCE_S
from tests.faults.trainer import remote, train
from tests.fuzz.mutations import how_many, seed_of
from tests.processes import is_alive

import eagle3_client.connection as connection_module
import eagle3_client.wire as wire_module
from eagle3_client import FingerprintMismatch, TransportError
from eagle3_client.receiving import fresh
from eagle3_schemas.errors import PoisonRequest

pytestmark = pytest.mark.slow


@pytest.fixture
def trainer(connect: Any, draft_ids: Any) -> Any:
    """`trainer(urls, **kwargs)`: an exact backend that waits a minute at most."""

    def build(urls: Any, **kwargs: Any) -> Any:
        return connect(None, draft_ids, urls=urls, exact=True, **{"retry_for_s": 60.0} | kwargs)

    return build


def test_one_of_two_is_killed_and_comes_back(
    server: Any, trainer: Any, undisturbed: Any, caplog: Any
) -> None:
    """The run goes on with the other at once, and uses both again later."""
    caplog.set_level(logging.WARNING)
    servers = [server(), server()]
    backend = trainer([each.url for each in servers])
    inputs, expected = undisturbed(200)
    stamps: list[float] = []
    back_at = [0]

    def step_done(step: int) -> None:
        stamps.append(time.monotonic())
        if step == 60:
            servers[0].kill()
        if step == 100:
            servers[0].start()
            servers[0].wait_until_ready()
        if step >= 100 and not back_at[0]:
            if " is back after " in caplog.text:
                back_at[0] = step
            else:
                time.sleep(0.1)  # a real step takes longer than the target

    assert train(remote(backend, inputs), step_done) == expected
    stall = max(b - a for a, b in itertools.pairwise(stamps[60:100]))
    print(f"longest step after the kill {stall:.2f} s; back after step {back_at[0]}")
    assert stall < 20  # also on a busy machine; not for as long as a request may take
    assert f"{servers[0].url} is out, 1 of 2 servers are left" in caplog.text
    assert 100 <= back_at[0] < 200
    second_life = servers[0].log.read_text().split("loading tiny")[2]
    assert second_life.count("path=/v1/supervision status=200") > 1  # the first compares numbers


def test_the_only_server_is_killed_and_comes_back_after_10_s(
    server: Any, trainer: Any, undisturbed: Any, supervise: Any, caplog: Any
) -> None:
    caplog.set_level(logging.WARNING)
    one = server()
    supervise(one, after_s=10.0)
    backend = trainer(one.url)
    inputs, expected = undisturbed(60)
    started = time.monotonic()
    losses = train(remote(backend, inputs), lambda step: one.kill() if step == 20 else None)
    assert losses == expected
    assert one.lives == 2
    assert time.monotonic() - started > 10
    said = [record.getMessage() for record in caplog.records]
    assert any("still retrying after" in each and one.url in each for each in said)
    assert any("done after 1" in each for each in said)  # 10 s and more


@pytest.mark.parametrize("stage", ["queue", "compute", "copy", "send"])
def test_a_server_that_is_killed_in_a_stage(
    server: Any, trainer: Any, undisturbed: Any, supervise: Any, stage: str
) -> None:
    one = server()
    one.kill()
    one.start(die=[stage, 10])
    one.wait_until_ready()
    supervise(one)
    inputs, expected = undisturbed(30)
    assert train(remote(trainer(one.url), inputs)) == expected
    assert one.lives == 3


@pytest.mark.parametrize("stage", ["receive", "decode"])
def test_a_server_that_is_killed_while_its_answer_is_taken(
    server: Any, trainer: Any, undisturbed: Any, supervise: Any, stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    one = server()
    supervise(one)
    backend = trainer(one.url)
    inputs, expected = undisturbed(30)
    receive, decode = wire_module.receive, connection_module.decode
    tenth = itertools.count(-9)

    def receiving(response: Any, take: Any, url: str) -> Any:
        # The health checks receive too; only a batch's answer is taken into a lent buffer.
        if take is not fresh and not next(tenth):
            one.kill()
        return receive(response, take, url)

    def decoding(body: Any) -> Any:
        if not next(tenth):
            one.kill()
        return decode(body)

    if stage == "receive":
        monkeypatch.setattr(wire_module, "receive", receiving)
    else:
        monkeypatch.setattr(connection_module, "decode", decoding)
    assert train(remote(backend, inputs)) == expected
    assert one.lives == 2


def test_kills_at_random_moments(
    server: Any, trainer: Any, undisturbed: Any, supervise: Any
) -> None:
    """A hundred in 2,000 steps by `make soak`."""
    kills = how_many(4, "EAGLE3TEST_KILLS")
    seed = seed_of("EAGLE3TEST_SEED")
    moments = random.Random(seed)
    one = server()
    supervise(one)
    backend = trainer(one.url, retry_for_s=120.0)
    inputs, expected = undisturbed(20 * kills)
    # Not near the end, so that one that found nobody alive has steps left to come again.
    at = set(moments.sample(range(1, 20 * kills - 15), kills))
    again: list[int] = []
    one_by_one = threading.Lock()  # two moments can be so near that both meet the same life

    def kill_soon() -> None:
        with one_by_one:
            if is_alive(one.pid):
                one.kill()
            else:
                again.append(1)

    def step_done(step: int) -> None:
        if step in at or (again and again.pop()):
            threading.Timer(moments.uniform(0, 0.05), kill_soon).start()

    assert train(remote(backend, inputs), step_done) == expected
    print(f"{one.lives - 1} kills in {20 * kills} steps, seed {seed}")
    assert one.lives - 1 >= kills


def test_a_rolling_restart_under_load(
    server: Any, trainer: Any, undisturbed: Any, supervise: Any
) -> None:
    """Each in turn is told to end, drains, and comes back, before the next is."""
    servers = [server(settings={"drain_delay_s": 0.5}) for _ in range(3)]
    for each in servers:
        supervise(each)
    backend = trainer([each.url for each in servers])
    inputs, expected = undisturbed(400)
    is_over = threading.Event()

    def roll() -> None:
        for each in servers:
            os.kill(each.pid, 15)
            while each.lives == 1 and not is_over.wait(0.01):
                pass
            each.wait_until_ready()
            time.sleep(1.0)  # as an operator waits, so that trainers have taken it in again

    rolling = threading.Thread(target=roll)
    rolling.start()
    losses = train(remote(backend, inputs), lambda _: time.sleep(0.02))
    rolling.join()
    is_over.set()
    assert losses == expected
    assert [each.lives for each in servers] == [2, 2, 2]


def test_a_server_that_comes_back_with_another_model_is_refused(
    server: Any, trainer: Any, undisturbed: Any, caplog: Any
) -> None:
    servers = [server(), server()]
    backend = trainer([each.url for each in servers])
    inputs, expected = undisturbed(120)

    def step_done(step: int) -> None:
        if step == 10:
            servers[1].kill()
            servers[1].start(seed=1)
            servers[1].wait_until_ready()
        if step > 10 and "stays out" not in caplog.text:
            time.sleep(0.05)

    assert train(remote(backend, inputs), step_done) == expected
    refusal = next(r.getMessage() for r in caplog.records if "stays out" in r.getMessage())
    assert f"{servers[1].url} stays out" in refusal
    assert "weights_digest" in refusal
    assert servers[0].url in refusal
    # And with only such left, the run ends with that.
    servers[0].kill()
    servers[0].start(seed=1)
    servers[0].wait_until_ready()
    with pytest.raises(FingerprintMismatch, match=servers[0].url):
        backend.generate_batch(*inputs[0])


@pytest.mark.parametrize("count", [1, 2])
def test_all_servers_gone_is_an_error_after_the_configured_time(
    server: Any, trainer: Any, undisturbed: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    servers = [server() for _ in range(count)]
    backend = trainer([each.url for each in servers], retry_for_s=3.0)
    inputs, _ = undisturbed(5)
    backend.generate_batch(*inputs[0])
    for each in servers:
        each.kill()
    started = time.monotonic()
    with pytest.raises(TransportError) as caught:
        backend.generate_batch(*inputs[1])
    waited = time.monotonic() - started
    assert waited < 3 + 3
    for each in servers:
        assert each.url in str(caught.value)
    assert "rank=3" in str(caught.value)
    assert caught.value.attempts is not None


@pytest.mark.parametrize("count", [1, 2])
def test_a_request_that_kills_every_server_it_meets_is_raised_after_three(
    server: Any, trainer: Any, undisturbed: Any, supervise: Any, batch_of: Any, count: int
) -> None:
    servers = [server(die_of=7) for _ in range(count)]
    for each in servers:
        supervise(each)
    backend = trainer([each.url for each in servers])
    inputs, _ = undisturbed(3)
    good = next(each for each in inputs if not bool((each.input_ids == 7).any()))
    backend.generate_batch(*good)
    deadly = batch_of(131)
    deadly.input_ids[0, 0] = 7
    with pytest.raises(PoisonRequest, match="3 servers ended while they held this request"):
        backend.generate_batch(*deadly)
    deadline = time.monotonic() + PATIENCE_S  # the last life may not have begun yet
    while sum(each.lives for each in servers) < count + 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for each in servers:
        each.wait_until_ready()
    backend.generate_batch(*good)  # others go on
    assert sum(each.lives for each in servers) == count + 3
    assert all(is_alive(each.pid) for each in servers)
