"""`Losses`: which servers ended while they held a request, which may be what ends them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from eagle3_client.connection import Connection
from eagle3_schemas.errors import PoisonRequest, TransportError

MAX_ENDED = 3
"""Servers that may end while they hold a request, before it is sent no more."""

_PATIENCE_S = 5.0
_LOOK_EVERY_S = 0.05


class Losses:
    """The connections one request was lost on. Of one thread at a time.

    A connection that breaks says nothing of the server: only if its process is found to be gone
    afterwards, or another answers in its place, did it end.

    Args:
        request_id: for the message.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._lost: list[tuple[Connection, str | None]] = []
        self._ended: list[str] = []

    @contextmanager
    def noted(self, connection: Connection) -> Iterator[None]:
        """Note if the request is lost inside the block."""
        instance = connection.instances.last
        try:
            yield
        except TransportError as exc:
            if exc.was_sent:
                self._lost.append((connection, instance))
            raise

    def check(self) -> None:
        """Look what became of the servers it was lost at; call before the next attempt.

        Where nobody can tell, the next look may: a process that was killed keeps its sockets for a
        moment, and one that took its place answers late. That is waited for, 5 s at most, if it
        could be what makes three.

        Raises:
            PoisonRequest: three ended.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            self._look()
            could_be = len(self._ended) + len(self._lost)
            if could_be < MAX_ENDED or time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_EVERY_S)

    def _look(self) -> None:
        unknown = []
        for connection, instance in self._lost:
            has_ended = connection.has_ended(instance)
            if has_ended:
                self._ended.append(connection.url)
            elif has_ended is None:
                unknown.append((connection, instance))
        self._lost = unknown
        if len(self._ended) >= MAX_ENDED:
            raise PoisonRequest(
                f"{len(self._ended)} servers ended while they held this request: "
                f"{', '.join(self._ended)}. It may be what ends them (or another trainer's, held "
                "at the same time), so it is sent no more: "
                "look at this batch, and at the servers' logs under the request id",
                request_id=self._request_id,
            )
