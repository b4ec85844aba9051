"""When a request is taken for what ends the servers it meets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eagle3_client import poison
from eagle3_client.instances import Instances
from eagle3_client.poison import Losses
from eagle3_schemas.errors import NotReady, PoisonRequest, TransportError


class Mortal:
    """A connection; `fates` are what is found of the process, at each look."""

    instances = SimpleNamespace(last="life")

    def __init__(self, url: str, *fates: bool | None) -> None:
        self.url, self.fates = url, list(fates)

    def has_ended(self, instance: str | None) -> bool | None:
        assert instance == "life"
        return self.fates.pop(0)


def lose(losses: Losses, connection: Any, error: Exception | None = None) -> None:
    with pytest.raises((TransportError, NotReady)), losses.noted(connection):
        raise error or TransportError("lost")


def test_three_servers_that_ended_are_enough() -> None:
    losses = Losses("id-1")
    for url in ("a", "b"):
        lose(losses, Mortal(url, True))
        losses.check()
    lose(losses, Mortal("c", True))
    with pytest.raises(PoisonRequest, match=r"3 servers ended .*: a, b, c.*request_id=id-1"):
        losses.check()


def test_a_server_that_lives_is_no_loss() -> None:
    losses = Losses("id-1")
    for _ in range(9):
        lose(losses, Mortal("a", False))
        losses.check()


def test_a_server_nobody_can_tell_of_is_looked_at_again_before_it_could_be_the_fourth() -> None:
    losses = Losses("id-1")
    for url in ("a", "b", "c"):
        lose(losses, Mortal(url, None, None, True))
    with pytest.raises(PoisonRequest):
        losses.check()


def test_nobody_can_tell_for_long_and_the_request_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "_PATIENCE_S", 0.1)
    losses = Losses("id-1")
    connections = [Mortal(url, *[None] * 99) for url in ("a", "b", "c")]
    for each in connections[:2]:
        lose(losses, each)
    losses.check()
    assert [len(each.fates) for each in connections] == [98, 98, 99]  # two: no need to wait
    lose(losses, connections[2])
    losses.check()
    assert len(connections[0].fates) < 97


def test_an_answer_that_its_process_did_not_outlive_is_no_load_balancer() -> None:
    instances = Instances()
    instances.note("first", None)
    instances.note("second", "first")
    instances.note("first", "first")  # sent before the second was heard of
    assert (instances.last, instances.is_balanced) == ("second", False)
    instances.note("first", "second")
    assert (instances.last, instances.is_balanced) == ("first", True)


def test_what_was_not_sent_or_was_answered_is_no_loss() -> None:
    losses = Losses("id-1")
    unsent = TransportError("nothing listens")
    unsent.was_sent = False
    for _ in range(3):
        lose(losses, Mortal("a"), unsent)
        lose(losses, Mortal("a"), NotReady("loads"))
    losses.check()
