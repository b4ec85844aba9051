"""A fleet on a Ray that a test plays: actors that do not answer for a moment, or end at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from eagle3_server import ServerSettings, replica_fleet


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class ActorUnavailableError(RayActorError):
    pass


class Reference:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call


class Actor:
    """Its server is process 7 and ready once started; `looks` may raise or end it."""

    def __init__(self, looks: dict[int, Callable[[Actor], None]]) -> None:
        self.pid: int | None = None
        self.code: int | None = None
        self.starts = self.stops = self.looked = 0
        self._looks = looks
        for name in ("look", "start", "stop"):
            call = getattr(self, f"_{name}")
            remote = SimpleNamespace(remote=lambda *a, c=call: Reference(lambda: c(*a)))
            setattr(self, name, remote)

    def _report(self) -> dict[str, Any]:
        url = "" if self.pid is None else "http://127.0.0.1:1"
        return {"node": "n", "pid": self.pid, "url": url, "fingerprint": "f", "code": self.code,
                "lines": [], "dropped": 0}  # fmt: skip

    def _look(self) -> dict[str, Any]:
        self.looked += 1
        self._looks.get(self.looked, lambda _: None)(self)
        return self._report()

    def _start(self, *_: object) -> dict[str, Any]:
        self.starts, self.pid, self.code = self.starts + 1, 7, None
        return self._report()

    def _stop(self) -> None:
        self.stops += 1
        self.code = 0


class Ray:
    exceptions = SimpleNamespace(
        RayError=RayError,
        RayActorError=RayActorError,
        ActorUnavailableError=ActorUnavailableError,
    )

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, reference: Reference) -> Any:
        return reference.call()

    def kill(self, actor: Actor, no_restart: bool) -> None:
        actor.pid = actor.code = None

    def available_resources(self) -> dict[str, float]:
        return {}


def run(actor: Actor, is_over: Callable[[], bool]) -> int:
    """Serve one replica until it is over; then a signal comes."""
    remote = SimpleNamespace(remote=lambda: actor)
    cluster: Any = SimpleNamespace(ray=Ray(), actor=remote, is_local=True, device="cpu")
    # A fake's calls run when their result is asked for, and a stop's result never is.
    actor.stop = SimpleNamespace(remote=actor._stop)  # type: ignore[attr-defined]
    fleet = replica_fleet.Fleet(ServerSettings(model="x", replicas=1), cluster, lambda _: None)
    deadline = time.monotonic() + 30
    return fleet.serve(lambda: int(is_over() or time.monotonic() > deadline))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_fleet, "_LOOK_S", 0.02)
    monkeypatch.setattr(replica_fleet, "_LONGEST_PAUSE_S", 0.02)


def test_an_actor_that_does_not_answer_for_a_moment_is_still_stopped(caplog: Any) -> None:
    def fail(_actor: Actor) -> None:
        raise ActorUnavailableError("for a moment")

    actor = Actor({4: fail})
    assert run(actor, lambda: actor.looked > 8) == 0
    assert (actor.starts, actor.stops) == (1, 1)
    assert "its actor does not answer; asked again" in caplog.text
    assert "is gone" not in caplog.text


def test_an_actor_that_comes_back_without_its_server_starts_another(caplog: Any) -> None:
    def vanish(actor: Actor) -> None:
        actor.pid = None
        raise ActorUnavailableError("for a moment")

    actor = Actor({4: vanish})
    assert run(actor, lambda: actor.starts == 2 and actor.looked > 8) == 0
    assert actor.stops == 1
    assert "its actor is gone, and its server with it; Ray starts it again" in caplog.text


def test_a_server_that_ends_as_soon_as_it_is_ready_is_not_started_for_ever(caplog: Any) -> None:
    def end(actor: Actor) -> None:
        actor.code = -9

    ends = {look: end for look in range(3, 400, 3)}
    actor = Actor(ends)
    assert run(actor, lambda: False) == 1
    assert actor.starts == replica_fleet._FAILURES
    assert "for the 5th time, and no other serves" in caplog.text
