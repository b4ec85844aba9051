"""`Accounting`: ASGI middleware that follows every request to its last byte, and tells of it."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagle3_schemas.errors import NotReady
from eagle3_schemas.protocol import (
    INSTANCE_HEADER,
    METRICS_PATH,
    PROBE_PATHS,
    REQUEST_ID_HEADER,
    SERVER_TIMING_HEADER,
    STATUS_PATH,
)
from eagle3_server.asgi import problem_response
from eagle3_server.record import RequestRecord
from eagle3_server.service import Service

logger = logging.getLogger("eagle3_server.requests")


class Accounting:
    """Gives every request its record; at its end releases what it held, counts and logs it.

    Args:
        app: what answers.
        service: whose metrics are kept.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord.arriving(scope)
        status, sending_since = 0, 0.0
        connection = scope["state"].get("connection")  # none with a test's client

        def was_lost() -> bool:
            return connection is not None and connection.was_lost

        async def receive_counted() -> Message:
            message = await receive()
            record.bytes_received += len(message.get("body", b""))
            return message

        async def send_counted(message: Message) -> None:
            nonlocal status, sending_since
            if message["type"] == "http.response.start":
                status, sending_since = message["status"], time.monotonic()
                message["headers"] = [
                    *message.get("headers", ()),
                    (REQUEST_ID_HEADER.encode(), record.request_id.encode()),
                    (INSTANCE_HEADER.encode(), self._service.instance.encode()),
                ]
                if record.is_service and status == 200:
                    timing = (SERVER_TIMING_HEADER.encode(), record.server_timing().encode())
                    message["headers"].append(timing)
            else:
                await send(message)
                if not was_lost():
                    record.bytes_sent += len(message.get("body", b""))
                return
            await send(message)

        telemetry = self._service.telemetry
        telemetry.begin(record)
        try:
            await self._app(scope, receive_counted, send_counted)
        except asyncio.CancelledError:  # the grace period is over
            if status:
                record.code = "failed"
                raise
            error = NotReady("the server stopped before it had computed this", retry_after_s=1.0)
            await problem_response(Request(scope), error)(scope, receive, send_counted)
        except Exception as exc:
            if status:  # half an answer: uvicorn logs the error and closes the connection
                record.code = "failed"
                raise
            await problem_response(Request(scope), exc)(scope, receive, send_counted)
        finally:
            if status:
                record.spent("send", time.monotonic() - sending_since)
            if was_lost() and record.code == "ok":
                record.code = "client_gone"
            record.held.close()
            # Not what the client made up: each path becomes a metric of its own.
            path = getattr(scope.get("route"), "path", "unknown")
            telemetry.end(record, path)
            is_polled = path in (*PROBE_PATHS, METRICS_PATH, STATUS_PATH)  # every few seconds
            logger.log(
                logging.DEBUG if is_polled else _level(status),
                "request",
                extra={"fields": record.summary(path, status)},
            )


def _level(status: int) -> int:
    """Return the level of a request's line: what nobody need look at is INFO."""
    if status == 500:
        return logging.ERROR
    return logging.WARNING if status >= 400 else logging.INFO
