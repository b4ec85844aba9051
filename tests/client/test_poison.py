"""When a request is taken for what ends the servers it meets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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


def test_a_server_nobody_can_tell_of_is_looked_at_again() -> None:
    losses = Losses("id-1")
    for url in ("a", "b", "c"):
        lose(losses, Mortal(url, None, True))
    losses.check()
    with pytest.raises(PoisonRequest):
        losses.check()


def test_what_was_not_sent_or_was_answered_is_no_loss() -> None:
    losses = Losses("id-1")
    unsent = TransportError("nothing listens")
    unsent.was_sent = False
    for _ in range(3):
        lose(losses, Mortal("a"), unsent)
        lose(losses, Mortal("a"), NotReady("loads"))
    losses.check()
