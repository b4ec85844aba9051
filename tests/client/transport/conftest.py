"""Servers reached over TCP, TLS and a Unix socket: uvicorn, and peers that do as a test says."""

from __future__ import annotations

import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from eagle3_client.connection import Connection
from eagle3_client.transport import HttpTransport

PATIENCE_S = 60.0


@dataclass
class Server:
    """Where something listens, and what happened to its connections."""

    link: str
    url: str  # as a backend is given it
    uds: str | None
    ca_file: str | None
    closing: ExitStack  # what a test leaves open: a pool that keeps a socket would leak it
    opened: list[Any] = field(default_factory=list)
    lost: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def transport(self, kind: str = "ours", **kwargs: Any) -> httpx.BaseTransport:
        trusting = ssl.create_default_context(cafile=self.ca_file)
        if kind == "ours":
            return HttpTransport(uds=self.uds, ssl_context=trusting, **kwargs)
        return httpx.HTTPTransport(uds=self.uds, verify=trusting)

    @property
    def http_url(self) -> str:
        return self.url if self.uds is None else "http://localhost"

    def client(self, kind: str = "ours", timeout_s: float = PATIENCE_S) -> httpx.Client:
        return httpx.Client(
            transport=self.transport(kind), base_url=self.http_url, timeout=timeout_s
        )

    def connection(self, kind: str = "ours", timeout_s: float = PATIENCE_S) -> Connection:
        connection = Connection(
            self.http_url,
            token=None,
            timeout_s=timeout_s,
            transport=self.transport(kind),
        )
        self.closing.callback(connection.close)
        return connection

    def wait_until_lost(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.lost.acquire(timeout=PATIENCE_S), "the connection stayed open"


# `make test` has three minutes: TLS, and stock httpx beside ours, are `make test-all`'s.
@pytest.fixture(params=["tcp", pytest.param("tls", marks=pytest.mark.slow), "unix"])
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["ours", pytest.param("stock", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    """HttpTransport, or httpx's own transport, which is the one for proxies."""
    return str(request.param)


@pytest.fixture
def listen(request: pytest.FixtureRequest) -> Iterator[Callable[..., tuple[socket.socket, Server]]]:
    """`listen(link)`: a listening socket, and the server that a test makes of it."""
    with ExitStack() as stack:

        def build(link: str, backlog: int = 100) -> tuple[socket.socket, Server]:
            if link == "unix":
                # A path of its own: pytest's folders are longer than a socket's path may be.
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                path = f"{folder}/eagle3.sock"
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(path)
                listener.listen(backlog)
                return listener, Server(link, f"unix://{path}", path, None, stack)
            listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
            stack.enter_context(listener)
            port = listener.getsockname()[1]
            if link == "tcp":
                return listener, Server(link, f"http://127.0.0.1:{port}", None, None, stack)
            cert, _ = request.getfixturevalue("certificate")
            return listener, Server(link, f"https://localhost:{port}", None, str(cert), stack)

        yield build


@pytest.fixture
def uvicorn_server(listen: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Server]]:
    """`uvicorn_server(link, app, **config)`: a uvicorn that counts its connections."""
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    with ExitStack() as stack:

        def start(link: str, app: Any, **config: Any) -> Server:
            listener, server = listen(link)

            class Counting(HttpToolsProtocol):
                def connection_made(self, transport: Any) -> None:
                    server.opened.append(transport)
                    super().connection_made(transport)

                def timeout_keep_alive_handler(self) -> None:
                    super().timeout_keep_alive_handler()
                    # TLS would wait half a minute for a goodbye that an idle client never says.
                    self.loop.call_later(0.1, self.transport.abort)

                def connection_lost(self, exc: Exception | None) -> None:
                    super().connection_lost(exc)
                    # The socket is closed after this call.
                    self.loop.call_soon(server.lost.release)

            if link == "tls":
                cert, key = request.getfixturevalue("certificate")
                config |= {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
            running = uvicorn.Server(
                uvicorn.Config(app, log_config=None, ws="none", http=Counting, **config)
            )
            thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
            thread.start()

            def stop() -> None:
                running.should_exit = running.force_exit = True
                thread.join()

            stack.callback(stop)
            return server

        yield start


class Peer:
    """The far end of one connection, in the hands of a test."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self.sent = 0

    def read_request(self) -> bytes:
        """Read one head without a body; b"" if the client went away."""
        head = b""
        while b"\r\n\r\n" not in head:
            if not (more := self.sock.recv(65536)):
                return b""
            head += more
        return head

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.sock.sendall(part)
            self.sent += len(part)

    def answer(self, body: bytes, head: bytes = b"HTTP/1.1 200 OK\r\n") -> None:
        self.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)

    def wait_until_left(self) -> None:
        while self.sock.recv(65536):
            pass

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@pytest.fixture
def peer(listen: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Server]]:
    """`peer(link, script)`: runs `script(Peer)` for every connection, then closes it."""
    with ExitStack() as stack:

        def start(link: str, script: Callable[[Peer], object]) -> Server:
            listener, server = listen(link)
            context = None
            if link == "tls":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*request.getfixturevalue("certificate"))

            def run(sock: socket.socket, number: int) -> None:
                with suppress(OSError), sock:
                    sock.settimeout(PATIENCE_S)
                    if context is not None:
                        sock = context.wrap_socket(sock, server_side=True)
                    with sock:
                        server.opened.append(far_end := Peer(sock, number))
                        script(far_end)
                server.lost.release()

            def accept() -> None:
                with suppress(OSError):
                    while True:
                        sock, _ = listener.accept()
                        sockets.append(sock)
                        thread = threading.Thread(target=run, args=(sock, len(threads)))
                        threads.append(thread)
                        thread.start()

            threads: list[threading.Thread] = []
            sockets: list[socket.socket] = []
            accepting = threading.Thread(target=accept)
            accepting.start()

            def stop() -> None:
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                accepting.join()
                for thread in threads:
                    thread.join()

            stack.callback(stop)
            return server

        yield start
