"""What the routes need of HTTP: bodies in, frames and problem documents out, bearer tokens."""

from __future__ import annotations

import hmac
import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from eagle3_schemas.errors import (
    InvalidRequest,
    LimitExceeded,
    MalformedPayload,
    RemoteEagle3Error,
    TargetFailed,
    Unauthorized,
    kind_of,
)
from eagle3_schemas.frame import EncodedFrame
from eagle3_schemas.protocol import (
    FRAME_MEDIA_TYPE,
    JSON_MEDIA_TYPE,
    OPEN_PATHS,
    PROBLEM_MEDIA_TYPE,
)
from eagle3_server.budget import Budget
from eagle3_server.record import record_of

logger = logging.getLogger(__name__)

_MESSAGE_BYTES = 1 << 20  # the transport may hold one message back: small ones bound that memory


async def read_frame_body(request: Request, max_body_bytes: int, budget: Budget) -> bytearray:
    """Receive a frame into one buffer of the announced size, taken from the budget first.

    Raises:
        MalformedPayload: another media type, a compressed body, or one that ended early.
        LimitExceeded: larger than `max_body_bytes`.
        QueueFull: the budget has no room for it now.
        ClientDisconnect: the client went away while sending.
    """
    remedy = "Send smaller batches, or raise the limit on the server (EAGLE3_MAX_BODY_BYTES)"
    return await _read_body(
        request, FRAME_MEDIA_TYPE, max_body_bytes, f"(max_body_bytes); got {{}}. {remedy}", budget
    )


async def read_json_body(request: Request, max_body_bytes: int, budget: Budget) -> bytearray:
    """Receive a JSON text; as `read_frame_body`."""
    return await _read_body(
        request, JSON_MEDIA_TYPE, max_body_bytes, "here; got {}. Send less text", budget
    )


async def _read_body(
    request: Request, expected: str, max_body_bytes: int, words: str, budget: Budget
) -> bytearray:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if media_type != expected:
        raise MalformedPayload(f"expected content-type {expected}; got {media_type!r}")
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise MalformedPayload(f"expected an uncompressed body; got content-encoding {coding!r}")
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise MalformedPayload("expected a content-length; send the body in one piece")
    if int(length) > max_body_bytes:
        raise LimitExceeded(
            f"a request body may have {max_body_bytes} bytes {words.format(length)}"
        )
    record = record_of(request)
    record.held.enter_context(budget.reserve(record.client, int(length)))
    record.body_bytes = int(length)
    body = bytearray(int(length))
    received = 0
    async for chunk in request.stream():
        if received + len(chunk) > len(body):
            raise MalformedPayload(f"the body is longer than its content-length {length}")
        body[received : received + len(chunk)] = chunk
        received += len(chunk)
    if received != len(body):
        raise MalformedPayload(f"expected {length} bytes; the body ended after {received}")
    return body


class FrameResponse(Response):
    """Sends a frame's views one after another, without joining them."""

    def __init__(self, frame: EncodedFrame) -> None:
        self._frame = frame
        super().__init__(headers={"content-length": str(frame.nbytes)}, media_type=FRAME_MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, then messages of at most 1 MiB."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        for part in self._frame.parts:
            for start in range(0, part.nbytes, _MESSAGE_BYTES):
                body = part[start : start + _MESSAGE_BYTES]
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def problem_response(request: Request, exc: Exception) -> Response:
    """Turn any error into `application/problem+json` with code, detail and request id."""
    record = record_of(request)
    if isinstance(exc, ClientDisconnect):
        record.code = "client_gone"
        return Response(status_code=499)  # nobody reads it
    headers: dict[str, str] = {}
    if isinstance(exc, HTTPException):
        # A path or method the framework does not know: most likely another protocol version.
        detail = f"{exc.detail}: {request.method} {request.url.path} is not a path of this server"
        record.code, status = "protocol_mismatch", exc.status_code
        record.detail = detail
        headers.update(exc.headers or {})
        content = _problem(record.code, status, detail, record.request_id)
    else:
        if isinstance(exc, RequestValidationError):
            exc = InvalidRequest(f"the request is not valid: {exc.errors()}")
        elif not isinstance(exc, RemoteEagle3Error):
            logger.error("request %s failed", record.request_id, exc_info=exc)
            exc = TargetFailed(
                f"the server failed with {type(exc).__name__}; its log has the traceback under "
                f"request id {record.request_id}"
            )
        record.code, status, headers = _status_and_headers(exc)
        record.detail = exc.detail
        content = _problem(record.code, status, exc.detail, record.request_id)
    return JSONResponse(content, status, headers, PROBLEM_MEDIA_TYPE)


def problem_bytes(error: RemoteEagle3Error) -> bytes:
    """Return a whole HTTP answer for a connection that is refused before any request."""
    code, status, headers = _status_and_headers(error)
    body = json.dumps(_problem(code, status, error.detail, None)).encode()
    headers |= {"content-type": PROBLEM_MEDIA_TYPE, "content-length": str(len(body))}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _status_and_headers(error: RemoteEagle3Error) -> tuple[str, int, dict[str, str]]:
    kind = kind_of(error)
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if kind.status == 401:
        headers["www-authenticate"] = "Bearer"
    return kind.code, kind.status, headers


def _problem(code: str, status: int, detail: str, request_id: str | None) -> dict[str, Any]:
    title = HTTPStatus(status).phrase
    return {
        "title": title,
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": request_id,
    }


class TokenGuard:
    """ASGI middleware: every path but `OPEN_PATHS` needs a bearer token, if any is set."""

    def __init__(self, app: ASGIApp, tokens: tuple[str, ...]) -> None:
        self._app = app
        self._tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if (
            scope["type"] == "http"
            and self._tokens
            and scope["path"] not in OPEN_PATHS
            and not self._is_known(Headers(scope=scope).get("authorization", ""))
        ):
            words = "the bearer token is none of the server's"
            if "authorization" not in Headers(scope=scope):
                words = "no bearer token came"
            error = Unauthorized(
                f"{words}; pass a token that the server knows as token= to RemoteEagle3Backend "
                "(from_env() reads it from EAGLE3_TOKEN)"
            )
            await problem_response(Request(scope), error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, authorization: str) -> bool:
        scheme, _, sent = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return False
        # Compare with all of them, so that the time taken says nothing.
        return any([hmac.compare_digest(sent.encode(), token) for token in self._tokens])
