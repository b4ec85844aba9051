"""`Accounting`: ASGI middleware that follows every request to its last byte, and tells of it."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagle3_schemas.errors import NotReady
from eagle3_schemas.protocol import REQUEST_ID_HEADER
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

        async def receive_counted() -> Message:
            message = await receive()
            record.bytes_received += len(message.get("body", b""))
            return message

        async def send_counted(message: Message) -> None:
            nonlocal status, sending_since
            if message["type"] == "http.response.start":
                status, sending_since = message["status"], time.monotonic()
                identity = (REQUEST_ID_HEADER.encode(), record.request_id.encode())
                message["headers"] = [*message.get("headers", ()), identity]
            else:
                record.bytes_sent += len(message.get("body", b""))
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
            record.held.close()
            # Not what the client made up: each path becomes a metric of its own.
            path = getattr(scope.get("route"), "path", "unknown")
            telemetry.end(record, path)
            is_routine = status == 200 and not path.startswith("/v1")  # probes, every few seconds
            logger.log(
                logging.DEBUG if is_routine else logging.INFO,
                "request",
                extra={"fields": record.summary(path, status)},
            )
