"""One HTTP/1.1 exchange on a connected socket: the request out, the answer in, typed errors."""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import httpx

_MAX_LINE_BYTES = 1 << 18  # of one head, interim ones included; of the chunk sizes of one read
_CHUNK_BYTES = 1 << 16
SLOWEST_BYTES_PER_S = 1 << 18
"""Slower than this, and for longer than the timeout on top, a body counts as not coming."""
# What OpenSSL calls a peer that speaks no TLS, or none that both sides have: no repeat changes it.
_LASTING_TLS_FAILURES = frozenset(
    {
        "HTTP_REQUEST",
        "NO_PROTOCOLS_AVAILABLE",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "UNSUPPORTED_PROTOCOL",
        "WRONG_VERSION_NUMBER",
    }
)


class Unanswered(httpx.ReadError):
    """The connection died before the first byte of an answer."""


@contextmanager
def typed(
    request: httpx.Request,
    timeout: type[httpx.TimeoutException],
    failure: type[httpx.NetworkError],
) -> Iterator[None]:
    """Raise what sockets, ssl and http.client raise as httpx's exceptions."""
    try:
        yield
    except TimeoutError as exc:
        raise timeout(str(exc) or "timed out", request=request) from exc
    except OSError as exc:
        raise failure(str(exc) or type(exc).__name__, request=request) from exc
    except http.client.HTTPException as exc:
        raise httpx.RemoteProtocolError(
            f"not a valid HTTP/1.1 answer: {exc!r:.300}", request=request
        ) from exc


def send(sock: socket.socket, request: httpx.Request) -> None:
    """Send a request. The socket's timeout starts anew whenever the peer took some bytes."""
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    if any(re.search(rb"[\r\n\0]", line) for line in lines):
        raise httpx.LocalProtocolError("a header must have no line break", request=request)
    assert isinstance(request.stream, httpx.SyncByteStream)
    parts: Iterator[bytes] = (part for part in request.stream if part)
    if "transfer-encoding" in request.headers:
        parts = (b"%x\r\n%s\r\n" % (len(part), part) for part in chain(parts, [b""]))
    for part in chain([b"\r\n".join([*lines, b"", b""])], parts):
        view = memoryview(part)
        while view:
            view = view[sock.send(view) :]  # sendall's timeout would be one for all bytes


class _Reader(io.BufferedReader):
    """Bounds the lines that http.client reads, and refuses one that the stream's end cuts off."""

    line_bytes = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self.line_bytes += len(line)
        if self.line_bytes > _MAX_LINE_BYTES:
            raise http.client.LineTooLong(f"head of more than {_MAX_LINE_BYTES} bytes")
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.HTTPException(f"the answer ends within a line: {line[:100]!r}")
        return line


class Answer(http.client.HTTPResponse):
    """The answer to a request that was sent; its head is read, interim ones are passed over.

    Raises:
        Unanswered: not one byte came.
        OSError, http.client.HTTPException: the head did not come, or is not one.
    """

    def __init__(self, sock: socket.socket, request: httpx.Request) -> None:
        super().__init__(sock, method=request.method)
        self.sock, self.request = sock, request
        self.lines = self.fp = _Reader(self.fp.detach())
        try:
            self._read_head()
        except BaseException:
            self.close()
            raise

    def _read_head(self) -> None:
        try:
            first = self.fp.peek(1)
        except TimeoutError:
            raise
        except OSError as exc:
            raise Unanswered(str(exc), request=self.request) from exc
        if not first:
            raise Unanswered("the server closed without an answer", request=self.request)
        self.begin()
        while 101 < self.status < 200:
            self.headers = None  # type: ignore[assignment]  # http.client's "not begun"
            self.begin()
        lengths = self.headers.get_all("content-length", [])
        codings = self.headers.get_all("transfer-encoding", [])
        if len({*lengths}) > 1 or not all(re.fullmatch(r"[0-9]{1,19}\s*", x) for x in lengths):
            raise http.client.HTTPException(f"expected one content-length; got {lengths}")
        if codings and (len(codings) > 1 or not self.chunked):
            raise http.client.HTTPException(f"expected no other coding than chunked; got {codings}")

    def is_drained(self) -> bool:
        """Tell whether nothing came behind the body, as far as one can see."""
        self.sock.settimeout(0)
        try:
            return not self.fp.peek(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False


class Body(httpx.SyncByteStream):
    """The body of an answer. Of one thread at a time.

    Args:
        answer: whose body it is.
        release: called once, when the body was read to its end or given up, with whether the
            connection can carry another request.
    """

    def __init__(self, answer: Answer, release: Callable[[bool], None]) -> None:
        self._answer, self._release, self._is_open = answer, release, True
        self._left = None if answer.chunked else answer.length
        self._pace = Pace(answer.request, self._left or 0)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body in pieces of 64 KiB."""
        view = memoryview(bytearray(_CHUNK_BYTES))
        while count := self.readinto(view):
            yield bytes(view[:count])

    def readinto(self, view: memoryview) -> int:
        """Fill a view of bytes; return how many came, fewer than it holds only at the end.

        Raises:
            httpx.TransportError: the body did not come whole.
        """
        if not self._is_open or not view.nbytes:
            return 0
        answer = self._answer
        answer.lines.line_bytes = 0
        try:
            with typed(answer.request, httpx.ReadTimeout, httpx.ReadError):
                if self._left is None:
                    count = answer.readinto(view)
                else:
                    # Not the answer's own, which lets go of what came behind the body.
                    view, count = view[: self._left], 0
                    while count < view.nbytes and (more := answer.fp.readinto1(view[count:])):
                        count += more
                        self._pace.check(count < view.nbytes)
                    self._left -= count
                    if count < view.nbytes:
                        raise http.client.IncompleteRead(b"", self._left)
        except BaseException:
            self.close()
            raise
        if count < view.nbytes or self._left == 0:
            self.close()
        return count

    def close(self) -> None:
        """Let go of the connection: it is kept only if the whole body was read, and no more."""
        if not self._is_open:
            return
        self._is_open = False
        answer = self._answer
        is_whole = self._left == 0 and not answer.will_close and answer.status >= 200
        is_reusable = is_whole and answer.is_drained()
        answer.close()
        self._release(is_reusable)


class Pace:
    """Tells when a body that comes byte by byte, each in time, will not come.

    Args:
        request: whose read timeout it is.
        nbytes: of the body.
    """

    def __init__(self, request: httpx.Request, nbytes: int) -> None:
        timeout_s = request.extensions.get("timeout", {}).get("read")
        self._ends = None
        if timeout_s is not None:
            self._ends = time.monotonic() + timeout_s + nbytes / SLOWEST_BYTES_PER_S

    def check(self, is_missing: bool) -> None:
        """Raise TimeoutError if some of it `is_missing` and its time is over."""
        if is_missing and self._ends is not None and time.monotonic() > self._ends:
            raise TimeoutError(
                f"the body comes slower than {SLOWEST_BYTES_PER_S >> 10} KiB/s, and the timeout is "
                "over"
            )


def remedy_of_lasting(exc: httpx.TransportError) -> str | None:
    """Say what to do about a failure that no repeat mends; None for one that may pass."""
    is_alert = re.search(r"\\x15\\+x03", str(exc))  # TLS's, in place of a status line
    if isinstance(exc, httpx.UnsupportedProtocol) or is_alert:
        return "write https:// in the URL"
    if not isinstance(exc, httpx.ConnectError):
        return None
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                "the server's certificate is not trusted, or is for another name: name its "
                "authority's certificate in SSL_CERT_FILE, or use the name it was issued for"
            )
        if isinstance(cause, ssl.SSLError) and cause.reason in _LASTING_TLS_FAILURES:
            return "the server speaks no TLS here, or no version of this side: try http://"
        cause = cause.__cause__ or cause.__context__
    return None
