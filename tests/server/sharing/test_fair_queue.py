"""Clients take turns, none fills the queue, and what is given up leaves it."""

from __future__ import annotations

import queue
import threading

import pytest

from eagle3_schemas.errors import NotReady, QueueFull
from eagle3_server.fair_queue import FairQueue
from eagle3_server.stage import StageThread


def drained(fair: FairQueue[str]) -> list[str | None]:
    fair.close()
    return [fair.get() for _ in range(len(fair) + 1)]


def test_clients_take_turns_and_each_ones_order_is_kept() -> None:
    fair: FairQueue[str] = FairQueue(20)
    for item in ("a1", "a2", "a3", "a4", "b1", "c1", "c2"):
        fair.put(item[0], item)
    assert drained(fair) == ["a1", "b1", "c1", "a2", "c2", "a3", "a4", None]


def test_a_client_that_comes_later_waits_for_one_turn_of_each_at_most() -> None:
    fair: FairQueue[str] = FairQueue(20)
    for item in ("a1", "a2", "a3"):
        fair.put("a", item)
    assert fair.get() == "a1"
    fair.put("b", "b1")
    fair.put("a", "a4")
    assert drained(fair) == ["a2", "b1", "a3", "a4", None]


def test_a_client_takes_half_of_the_places_and_leaves_some_for_the_next() -> None:
    fair: FairQueue[str] = FairQueue(16)
    for client, share in {"a": 8, "b": 4, "c": 2, "d": 1}.items():
        for _ in range(share):
            fair.put(client, client)
        with pytest.raises(queue.Full):
            fair.put(client, client)
    fair.get()
    for client in "ef":
        fair.put(client, client)
    with pytest.raises(queue.Full):
        fair.put("g", "g")


def test_what_is_removed_leaves_its_place_and_its_turn() -> None:
    fair: FairQueue[str] = FairQueue(4)
    for item in ("a1", "a2", "b1"):
        fair.put(item[0], item)
    fair.remove("a", "a1")
    fair.remove("a", "a1")
    fair.remove("c", "c1")
    assert len(fair) == 2
    fair.put("a", "a3")
    assert drained(fair) == ["a2", "b1", "a3", None]


def test_many_threads_lose_nothing() -> None:
    fair: FairQueue[tuple[str, int]] = FairQueue(64)
    got: list[tuple[str, int]] = []

    def put(client: str) -> None:
        for number in range(500):
            while True:
                try:
                    fair.put(client, (client, number))
                    break
                except queue.Full:
                    continue

    def take() -> None:
        while (item := fair.get()) is not None:
            got.append(item)

    threads = [threading.Thread(target=put, args=(client,)) for client in "abc"]
    taker = threading.Thread(target=take)
    for thread in (*threads, taker):
        thread.start()
    for thread in threads:
        thread.join()
    fair.close()
    taker.join()
    for client in "abc":
        assert [number for name, number in got if name == client] == list(range(500))


def test_work_that_is_cancelled_while_it_waits_is_never_done_and_frees_its_place() -> None:
    stage = StageThread("test", 4)
    entered, gate = threading.Event(), threading.Event()

    def blocks() -> None:
        entered.set()
        assert gate.wait(60)

    done: list[str] = []
    blocking = stage.submit(blocks)
    assert entered.wait(60)
    given_up = [stage.submit(lambda: done.append("never"), client="a") for _ in range(2)]
    with pytest.raises(QueueFull, match=r"of 4 \(max_queued_requests\)"):
        stage.submit(lambda: None, client="a")
    assert all(future.cancel() for future in given_up)
    assert len(stage) == 0
    kept = stage.submit(lambda: done.append("kept"), client="a")
    gate.set()
    kept.result(60)
    blocking.result(60)
    stage.close()
    assert done == ["kept"]
    with pytest.raises(NotReady):
        stage.submit(lambda: None)
