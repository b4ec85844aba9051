"""`HttpTransport`: HTTP/1.1 over TCP, TLS or a Unix socket, for bodies of hundreds of MiB."""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
from contextlib import suppress
from functools import cached_property
from typing import Any

import httpx

from eagle3_client.http1 import Answer, Body, Unanswered, send, typed

_Origin = tuple[str, bytes, int]


class HttpTransport(httpx.BaseTransport):
    """An httpx transport whose bodies can be read straight into a buffer. Thread-safe.

    `response.extensions["readinto"](view)` fills a memoryview of bytes and returns how many came:
    fewer than it holds only at the body's end. Timeouts are the httpx request's, errors httpx's.
    It speaks to no proxy and reads no proxy variables: `httpx.HTTPTransport(proxy=...)` does.

    A request whose kept connection dies before the answer's first byte is repeated once on a fresh
    one: a server may close an idle connection at any time. Not with the request's extension
    `may_repeat` False: it may be the request that ended the server.

    Args:
        uds: path of a Unix socket to connect to, whatever host the URL names.
        address: IP address to connect to, whatever the host resolves to; a certificate is still
            the host's.
        ssl_context: for https; None is `ssl.create_default_context()`, which trusts the system's
            certificates, or those that SSL_CERT_FILE and SSL_CERT_DIR name.
        max_keepalive_connections: idle connections kept to one host and port.
    """

    def __init__(
        self,
        *,
        uds: str | None = None,
        address: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        max_keepalive_connections: int = 64,
    ) -> None:
        self._uds, self._address, self._given_ssl_context = uds, address, ssl_context
        self._max_idle = max_keepalive_connections
        self._lock = threading.Lock()  # never held while a socket may block
        self._is_closed = False
        self._idle: dict[_Origin, list[socket.socket]] = {}  # whoever ever answered stays a key
        self._open: set[socket.socket] = set()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its response, the body not yet read.

        Raises:
            httpx.UnsupportedProtocol: an http URL whose server speaks TLS.
            httpx.TransportError: of the subclass that says what failed: connect, write or read.
        """
        url = request.url
        origin = (url.scheme, url.raw_host, url.port or (443 if url.scheme == "https" else 80))
        if (sock := self._reuse(origin)) is not None:
            try:
                return self._exchange(sock, origin, request)
            except Unanswered:
                is_spent = not isinstance(request.stream, httpx.ByteStream)
                if is_spent or not request.extensions.get("may_repeat", True):
                    raise
        timeout_s = request.extensions.get("timeout", {}).get("connect")
        with typed(request, httpx.ConnectTimeout, httpx.ConnectError):
            sock = self._connect(origin, timeout_s)
        try:
            return self._exchange(sock, origin, request)
        except Unanswered as exc:
            if self._speaks_tls(origin, timeout_s):
                raise httpx.UnsupportedProtocol("the server speaks TLS", request=request) from exc
            raise

    def close(self) -> None:
        """Close idle connections and fail requests under way on whichever thread; repeatable.

        A call that waits in a connect, a write or a read is woken; one that looks up a name is not.
        """
        self._is_closed = True
        self.interrupt()

    def interrupt(self) -> None:
        """Do once what `close` does: later requests open connections anew."""
        with self._lock:
            # Under the lock, or a socket closed meanwhile may have passed its number to another.
            for sock in self._open:
                with suppress(OSError):
                    # Not SSLSocket's, after which a reader goes on in plain text.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            idle = [sock for socks in self._idle.values() for sock in socks]
            self._idle.clear()
        for sock in idle:
            self._discard(sock)

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return self._given_ssl_context or ssl.create_default_context()

    def _exchange(
        self, sock: socket.socket, origin: _Origin, request: httpx.Request
    ) -> httpx.Response:
        timeout = request.extensions.get("timeout", {})
        try:
            # A server may refuse a body, with an answer, before all of it was sent.
            with suppress(httpx.WriteError), typed(request, httpx.WriteTimeout, httpx.WriteError):
                sock.settimeout(timeout.get("write"))
                send(sock, request)
            with typed(request, httpx.ReadTimeout, httpx.ReadError):
                sock.settimeout(timeout.get("read"))
                answer = Answer(sock, request)
        except BaseException:
            self._discard(sock)
            raise
        body = Body(answer, lambda is_reusable: self._release(sock, origin, is_reusable))
        return httpx.Response(
            answer.status,
            headers=[(k.encode("latin-1"), v.encode("latin-1")) for k, v in answer.getheaders()],
            stream=body,
            extensions={
                "readinto": body.readinto,
                "reason_phrase": answer.reason.encode("latin-1"),
                "http_version": b"HTTP/1.0" if answer.version == 10 else b"HTTP/1.1",
            },
        )

    def _connect(self, origin: _Origin, timeout_s: float | None) -> socket.socket:
        scheme, host, port = origin
        addresses: list[tuple[int, Any]]
        if self._uds is not None:
            addresses = [(socket.AF_UNIX, self._uds)]
        else:
            found = socket.getaddrinfo(self._address or host, port, type=socket.SOCK_STREAM)
            addresses = [(family, address) for family, _, _, _, address in found]
        failure = OSError(f"{host!r} has no address")
        for family, address in addresses:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout_s)
                if self._uds is None:
                    # Head and body are two writes: the second must not wait for the first's ACK.
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if scheme == "https":
                    sock = self._ssl_context.wrap_socket(sock, server_hostname=host.decode())
                with self._lock:
                    if self._is_closed:
                        raise ConnectionAbortedError("the transport was closed")
                    self._open.add(sock)
                sock.connect(address)  # an SSLSocket's does the handshake too
                return sock
            except OSError as exc:
                self._discard(sock)
                failure = exc
            except BaseException:
                self._discard(sock)
                raise
        raise failure

    def _speaks_tls(self, origin: _Origin, timeout_s: float | None) -> bool:
        """Tell whether a server that closed an http connection without a word waits for TLS."""
        scheme, host, port = origin
        if scheme == "https" or origin in self._idle or self._uds is not None:
            return False
        try:
            self._discard(self._connect(("https", host, port), min(timeout_s or 1.0, 1.0)))
        except OSError as exc:
            return isinstance(exc, ssl.SSLCertVerificationError)
        return True

    def _reuse(self, origin: _Origin) -> socket.socket | None:
        """Take the connection used last that is still silent; drop others met on the way."""
        while True:
            with self._lock:
                if not (idle := self._idle.get(origin)):
                    return None
                sock = idle.pop()
            with selectors.DefaultSelector() as selector:
                selector.register(sock, selectors.EVENT_READ)
                if not selector.select(0):
                    return sock
            self._discard(sock)

    def _release(self, sock: socket.socket, origin: _Origin, is_reusable: bool) -> None:
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            if is_reusable and not self._is_closed and len(idle) < self._max_idle:
                idle.append(sock)
                return
        self._discard(sock)

    def _discard(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)
        sock.close()
