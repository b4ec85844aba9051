"""The exception tree, and the one table of code, class and HTTP status that both sides read.

The server turns an exception into `application/problem+json` by `ERROR_KINDS`; the client turns the
document back into the same class by `error_from_problem`. Branches are named by what the caller can
do about them.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class RemoteEagle3Error(Exception):
    """Root of every error this project raises on purpose.

    Args:
        detail: What was expected, what came, and what to do about it.
        request_id: Id of the request that failed; the server's log has it too.
        url: The server that answered or failed to, filled in by the client.
        attempts: How many times the request was sent, filled in by the client.
        retry_after_s: Seconds the server asks the client to wait before it repeats.

    Attributes:
        rank: of the trainer it ends (the variable RANK), filled in by the client.
        waited_s: seconds since the first of several attempts failed, likewise.
    """

    is_retryable = False
    may_go_elsewhere = False
    """Whether another server can be asked at once, set by the client."""

    def __init__(
        self,
        detail: str,
        *,
        request_id: str | None = None,
        url: str | None = None,
        attempts: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.request_id = request_id
        self.url = url
        self.attempts = attempts
        self.retry_after_s = retry_after_s
        self.rank: str | None = None
        self.waited_s: float | None = None

    def __str__(self) -> str:
        context = [
            f"{name}={value}"
            for name, value in (
                ("rank", self.rank),
                ("url", self.url),
                ("attempts", self.attempts),
                ("waited_s", self.waited_s),
                ("request_id", self.request_id),
            )
            if value is not None
        ]
        return f"{self.detail} ({', '.join(context)})" if context else self.detail


class InvalidRequest(RemoteEagle3Error, ValueError):
    """Well-formed but wrong (shape, range, unknown option). Fix the caller; never retried."""


class MalformedPayload(InvalidRequest):
    """Bytes that are not a valid message. Fix the caller; never retried."""


class ProtocolMismatch(InvalidRequest):
    """The two sides speak different protocol versions. Upgrade the older one."""


class PackingUnsupported(InvalidRequest):
    """Packed sequences were sent to a target that cannot keep documents apart."""


class VocabMappingMissing(RemoteEagle3Error):
    """No draft vocab is set, or the server does not know it. Call `set_vocab_mapping`."""


class Unauthorized(RemoteEagle3Error):
    """No bearer token, or a wrong one. Pass `token=` or set EAGLE3_TOKEN."""


class LimitExceeded(RemoteEagle3Error):
    """Larger than the server admits. Split the batch, or raise the limit the message names."""


class QueueFull(RemoteEagle3Error):
    """Too much is in flight on the server. Retried by the client."""

    is_retryable = True


class NotReady(RemoteEagle3Error):
    """The server is loading, draining or broken. Retried by the client."""

    is_retryable = True


class DeadlineExceeded(RemoteEagle3Error):
    """The caller's deadline passed before the server answered. Retried by the client."""

    is_retryable = True


class TargetFailed(RemoteEagle3Error):
    """The target's forward failed or gave non-finite values. The server's log has the reason."""


class TargetOutOfMemory(RemoteEagle3Error):
    """The device's memory does not suffice for this request. Send smaller batches."""


class FingerprintMismatch(RemoteEagle3Error):
    """Another target than expected answered. Fix the fleet: every server must hold the same."""


class PoisonRequest(RemoteEagle3Error):
    """Servers died holding this request. Look at this batch before sending it again."""


class TransportError(RemoteEagle3Error):
    """No usable answer: connect, read, timeout, truncated or corrupted body. Retried."""

    is_retryable = True
    was_sent = True
    """Whether the server may have had the request; not if no connection came about."""


class ErrorKind(NamedTuple):
    """One row of the table: the code on the wire, the class, and the HTTP status."""

    code: str
    error: type[RemoteEagle3Error]
    status: int


ERROR_KINDS: Final = (
    ErrorKind("malformed_payload", MalformedPayload, 400),
    ErrorKind("protocol_mismatch", ProtocolMismatch, 400),
    ErrorKind("unauthorized", Unauthorized, 401),
    ErrorKind("vocab_mapping_missing", VocabMappingMissing, 409),
    ErrorKind("limit_exceeded", LimitExceeded, 413),
    ErrorKind("packing_unsupported", PackingUnsupported, 422),
    ErrorKind("invalid_request", InvalidRequest, 422),
    ErrorKind("queue_full", QueueFull, 429),
    ErrorKind("target_failed", TargetFailed, 500),
    ErrorKind("not_ready", NotReady, 503),
    ErrorKind("deadline_exceeded", DeadlineExceeded, 504),
    ErrorKind("out_of_memory", TargetOutOfMemory, 503),
)

_BY_CODE: Final = {kind.code: kind for kind in ERROR_KINDS}
_BY_CLASS: Final = {kind.error: kind for kind in ERROR_KINDS}


def kind_of(error: RemoteEagle3Error) -> ErrorKind:
    """Return the table row for an error; an unlisted class is the server's own failure (500)."""
    for candidate in type(error).__mro__:
        if candidate in _BY_CLASS:
            return _BY_CLASS[candidate]
    return _BY_CODE["target_failed"]


def error_from_problem(
    code: str | None, status: int, detail: str, request_id: str | None = None
) -> RemoteEagle3Error:
    """Rebuild the server's exception from its problem document.

    Args:
        code: The document's `code`, or None when the body was not such a document.
        status: The HTTP status of the answer.
        detail: The server's own words, kept whole.
        request_id: The id under which the server logged the failure.
    """
    if code in _BY_CODE:
        return _BY_CODE[code].error(detail, request_id=request_id)
    # Not our document: a proxy in between, or something else listens at this address.
    if status in (429, 502, 503, 504):
        return TransportError(f"HTTP {status} from a gateway: {detail}", request_id=request_id)
    return ProtocolMismatch(
        f"HTTP {status} without an eagle3-remote error document: {detail}. Check that the URL is "
        "an eagle3-remote server and that both sides have the same version",
        request_id=request_id,
    )
