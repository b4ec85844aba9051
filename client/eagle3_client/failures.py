"""What went wrong with a request, as the project's errors, with the server's words or a remedy."""

from __future__ import annotations

import httpx
from pydantic import ValidationError

from eagle3_client.http1 import remedy_of_lasting
from eagle3_schemas.errors import RemoteEagle3Error, TransportError, error_from_problem
from eagle3_schemas.messages import Problem

_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)
_MAX_PROBLEM_BYTES = 1 << 16


def transport_error(exc: httpx.TransportError, url: str, request_id: str | None) -> TransportError:
    """Build the error of a request that got no usable answer."""
    lasting = remedy_of_lasting(exc)
    remedy = lasting or "check that the server runs, and that the URL is right"
    if isinstance(exc, httpx.ReadTimeout):
        remedy = (
            "no byte came for as long as timeout_s: check that the server runs, and that the URL "
            "is right; if it is slow, or its queue long, raise timeout_s or send smaller batches"
        )
    error = TransportError(
        f"{type(exc).__name__}: {exc or 'no answer'}; {remedy}", url=url, request_id=request_id
    )
    error.is_retryable = lasting is None
    error.was_sent = not isinstance(exc, _UNSENT)
    return error


def problem_error(
    response: httpx.Response, url: str, *, hide: str | None = None
) -> RemoteEagle3Error:
    """Rebuild the server's error, keeping its words but for the token, which a gateway may echo."""
    text = _text(response)
    if hide:
        text = text.replace(hide, "***")
    try:
        problem = Problem.model_validate_json(text)
    except ValidationError:
        problem = Problem(detail=text[:500] or response.reason_phrase)
    error = error_from_problem(
        problem.code, response.status_code, problem.detail, problem.request_id
    )
    error.url = url
    after = response.headers.get("retry-after", "")
    error.retry_after_s = float(after) if after.isascii() and after.isdigit() else None
    return error


def is_refused(exc: BaseException | None) -> bool:
    """Whether nothing listened: the host is there, and the server's process is not."""
    while exc is not None:
        if isinstance(exc, ConnectionRefusedError | FileNotFoundError):
            return True
        exc = exc.__cause__
    return False


def _text(response: httpx.Response) -> str:
    """Return the beginning of a body as text: a gateway's may have any length."""
    body = b""
    try:
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _MAX_PROBLEM_BYTES:
                break
    except httpx.DecodingError:  # a gateway's body, compressed though we asked for identity
        return ""
    return body.decode(errors="replace")
