"""uvicorn's HTTP protocol with bounds: nobody's connection costs more than itself, or for ever."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from eagle3_schemas.errors import MalformedPayload, NotReady
from eagle3_server.asgi import problem_bytes
from eagle3_server.config import ServerSettings

_MAX_HEADER_BYTES = 32 * 1024
_MIN_BYTES_PER_S = 16 * 1024
_REFUSED_S = 1.0

logger = logging.getLogger(__name__)


class BoundedProtocol(HttpToolsProtocol):
    """One connection, with limits to what it may hold and how long it may take.

    - The head of a request comes within `header_timeout_s` of its first byte, of a new connection
      within that of the connect, and has 32 KiB at most. A body has a content-length: chunked ones,
      which end in a second head, are refused.
    - One request may come before the former's answer is complete, which a client that read all of
      it can not know; a second closes the connection.
    - A body that is being sent, in either direction, moves 16 KiB/s on average over every
      `stall_timeout_s`; else the connection is aborted, which frees what it holds.
    - There are `max_connections` at most. One more takes the place of that which has been without a
      request for longest; only if all have one is it refused.
    """

    settings: ServerSettings  # set by `bounded`, like the next
    on_refused: Callable[[], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None  # for the head, then for the body
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._head_bytes = 0
        self._body_bytes = 0
        self._idle_since: float | None = time.monotonic()
        self._cycles: list[Any] = []  # uvicorn's, of the request under way and perhaps the next
        self.was_lost = False
        """Whether the connection ended before the answer did."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it if there are too many."""
        super().connection_made(transport)
        # Writing is paused until the socket took everything: when the last `send` of a response
        # returns, nothing holds on to its buffer.
        # (With 0 uvloop's TLS pauses for ever: there `high` is reached when it is equalled.)
        transport.set_write_buffer_limits(high=1, low=0)
        if len(self.connections) > self.settings.max_connections and not self._take_a_place():
            self._refuse(
                NotReady(
                    f"{self.settings.max_connections} connections have a request already "
                    "(max_connections); close some, or raise the limit on the server "
                    "(EAGLE3_MAX_CONNECTIONS)",
                    retry_after_s=1.0,
                )
            )
            return
        self._expect_head()

    def _take_a_place(self) -> bool:
        """Close the connection that has been idle for longest, if one is."""
        idle = [
            (each._idle_since, number, each)
            for number, each in enumerate(self.connections)
            if isinstance(each, BoundedProtocol) and each is not self
            if each._idle_since is not None and not each.transport.is_closing()
        ]
        if not idle:
            return False
        min(idle)[2].transport.abort()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers, and let every request under way know."""
        self._stop_timers()
        for cycle in self._cycles:
            if not cycle.response_complete:
                self.was_lost = cycle.disconnected = True
                cycle.message_event.set()  # uvicorn wakes the newest alone
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, if the head is not too long."""
        if self.transport.is_closing():
            return
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > _MAX_HEADER_BYTES:
            self._abort(f"its head has more than {_MAX_HEADER_BYTES} bytes")
        elif self._idle_since is not None and self._timer is None and self._head_bytes:
            self._expect_head()  # bytes without a request, which ended uvicorn's keep-alive timer

    def _head_is_too_long(self) -> bool:
        # It may have come whole, with some of the body, in one piece.
        return len(self.url) + sum(len(k) + len(v) + 4 for k, v in self.headers) > _MAX_HEADER_BYTES

    def on_message_begin(self) -> None:
        """Limit the time of a head; a connection's first is limited from the connect."""
        if self.pipeline:
            self._abort("it sends requests without waiting for their answers")
            return
        if self._timer is None:
            self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Hand the request to the app; from now on its body has to keep coming."""
        if self.transport.is_closing():
            return
        self._is_in_head = False
        self._idle_since = None
        self._set_timer(None)
        if self._head_is_too_long():
            self._abort(f"its head has more than {_MAX_HEADER_BYTES} bytes")
            return
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            error = MalformedPayload("expected a content-length; got a transfer-encoding")
            self.transport.write(problem_bytes(error))
            self.transport.close()
            return
        self.scope["state"]["connection"] = self
        super().on_headers_complete()
        self._cycles = [each for each in self._cycles if not each.response_complete]
        self._cycles.append(self.cycle)
        if self.pipeline:
            self.flow.resume_reading()  # else nobody would see that the client has gone
        if self.parser is not None and not self.transport.is_closing():
            self._expect_body()

    def on_body(self, body: bytes) -> None:
        """Count a piece of the body."""
        if self.transport.is_closing():
            return
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request, without a limit but the keep-alive's."""
        if self.transport.is_closing():
            return
        self._is_in_head = True
        self._head_bytes = self._body_bytes = 0
        self._set_timer(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Be idle until the next request."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Watch that the other end takes what was written."""
        super().pause_writing()
        self._watch_writing(self._untaken())

    def resume_writing(self) -> None:
        """Stop watching."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle for long."""
        self._stop_timers()
        super().timeout_keep_alive_handler()

    def _expect_head(self) -> None:
        timeout_s = self.settings.header_timeout_s
        self._set_timer(
            self.loop.call_later(
                timeout_s,
                self._abort,
                f"its head did not come within {timeout_s:g} s (EAGLE3_HEADER_TIMEOUT_S)",
            )
        )

    def _expect_body(self) -> None:
        timeout_s, before = self.settings.stall_timeout_s, self._body_bytes

        def check() -> None:
            # While reading is paused it is the server that is slow.
            if not self.flow.read_paused:
                came = self._body_bytes - before
                if came < timeout_s * _MIN_BYTES_PER_S:
                    self._abort(f"{came} bytes of its body came in {timeout_s:g} s", stalled=True)
                    return
            self._expect_body()

        self._set_timer(self.loop.call_later(timeout_s, check))

    def _watch_writing(self, before: int) -> None:
        timeout_s = self.settings.stall_timeout_s

        def check() -> None:
            # Nothing is written while writing is paused, so this only shrinks.
            now = self._untaken()
            if before - now < min(before, timeout_s * _MIN_BYTES_PER_S):
                self._abort(f"it took {before - now} bytes in {timeout_s:g} s", stalled=True)
            else:
                self._watch_writing(now)

        self._write_timer = self.loop.call_later(timeout_s, check)

    def _untaken(self) -> int:
        """Return the bytes the other end has not acknowledged.

        The kernel's buffer counts: it takes megabytes at a time, so without it a slow reader would
        look like one that stalls.
        """
        count = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        with suppress(OSError, AttributeError):
            queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))  # SIOCOUTQ of Linux
            count += int.from_bytes(queued, sys.byteorder)
        return count

    def _abort(self, why: str, *, stalled: bool = False) -> None:
        if stalled:
            record = self.scope.get("state", {}).get("record")
            why += " (EAGLE3_STALL_TIMEOUT_S)"
            why += f", request_id={record.request_id}" if record is not None else ""
        logger.warning("connection of %s aborted: %s", self.client or "a Unix socket", why)
        self._stop_timers()
        self.transport.abort()

    def _refuse(self, error: NotReady) -> None:
        self.on_refused()
        self.transport.write(problem_bytes(error))
        self.transport.close()
        # Over TLS a close waits for the other end's word.
        self.loop.call_later(_REFUSED_S, self.transport.abort)

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    def _stop_timers(self) -> None:
        self._set_timer(None)
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def bounded(
    settings: ServerSettings, on_refused: Callable[[], None] = lambda: None
) -> type[BoundedProtocol]:
    """Return the protocol class for uvicorn's `http=`; `on_refused` counts refused connections."""
    members = {"settings": settings, "on_refused": staticmethod(on_refused)}
    return type("BoundedProtocol", (BoundedProtocol,), members)
