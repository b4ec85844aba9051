"""The thread that watches a fleet: whom it asks, how often, and when it ends."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from eagle3_client import health
from eagle3_client.health import HealthWatch


class WatchedFleet:
    """Counts what it is asked; a check of a member that `hangs` waits."""

    def __init__(self, *members: Any) -> None:
        self.members = SimpleNamespace(all=list(members))
        self.resolved = 0
        self.checks: list[str] = []
        self.may_go_on = threading.Event()

    def resolve(self) -> None:
        self.resolved += 1

    def check_health(self, member: Any, _timeout_s: float) -> None:
        self.checks.append(member.name)
        if member.hangs:
            self.may_go_on.wait(60)


class Watched:
    def __init__(self, name: str, *, is_out: bool = False, hangs: bool = False) -> None:
        self.name, self.is_out, self.hangs, self.good = name, is_out, hangs, 0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TICK_S", "_CHECK_EVERY_S", "_FIRST_WAIT_S", "_LONGEST_WAIT_S"):
        monkeypatch.setattr(health, name, getattr(health, name) / 20)


@pytest.fixture
def watch() -> Iterator[Callable[..., HealthWatch]]:
    watches: list[HealthWatch] = []

    def start(fleet: Any) -> HealthWatch:
        watches.append(HealthWatch(fleet))
        watches[-1].start()
        return watches[-1]

    yield start
    for each in watches:
        each.stop()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "eagle3-health"}


def test_all_are_checked_and_names_looked_up_again_and_again(watch: Any) -> None:
    fleet = WatchedFleet(Watched("a"), Watched("b"))
    watch(fleet).start()  # a second start begins nothing
    wait_for(lambda: fleet.checks.count("a") > 2 and fleet.checks.count("b") > 2)
    wait_for(lambda: fleet.resolved > 2)


def test_one_that_is_out_is_asked_sooner(watch: Any) -> None:
    fleet = WatchedFleet(Watched("well"), Watched("out", is_out=True))
    watch(fleet)
    wait_for(lambda: fleet.checks.count("out") >= 6)
    assert fleet.checks.count("well") <= fleet.checks.count("out")


def test_a_check_that_hangs_delays_no_other_and_is_not_repeated(watch: Any) -> None:
    fleet = WatchedFleet(Watched("hangs", hangs=True), Watched("b"))
    watch(fleet)
    wait_for(lambda: fleet.checks.count("b") > 3)
    assert fleet.checks.count("hangs") == 1
    fleet.may_go_on.set()
    wait_for(lambda: fleet.checks.count("hangs") > 1)


def test_it_ends_when_told(watch: Any) -> None:
    before = watchers()
    fleet = WatchedFleet(Watched("a"))
    one = watch(fleet)
    (thread,) = watchers() - before
    one.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_it_ends_with_its_fleet(watch: Any) -> None:
    before = watchers()
    fleet = WatchedFleet()
    dead = weakref.ref(fleet)
    watch(fleet)
    (thread,) = watchers() - before
    del fleet
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert dead() is None
