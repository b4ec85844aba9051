"""Bodies come bit for bit over every link, and connections are kept for the next request."""

from __future__ import annotations

import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from eagle3_client import InvalidRequest, TransportError
from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.transport import HttpTransport
from eagle3_schemas.frame import encode
from eagle3_schemas.protocol import EMBEDDINGS_PATH, READY_PATH

SIZES = [0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 20 << 20]


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed * 1000003 + size).randbytes(size)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """`GET /size/seed` brings that content; `POST /echo` what was sent; else a problem."""
    if scope["type"] != "http":
        return
    sent, more = b"", True
    while more:
        message = await receive()
        sent, more = sent + message.get("body", b""), message.get("more_body", False)
    status, body = 200, sent
    if scope["path"] == EMBEDDINGS_PATH:
        body = encode({}, {"weight": torch.arange(5.0)}).to_bytes()
    elif scope["path"] == READY_PATH:
        status, body = 422, b'{"code": "invalid_request", "detail": "so it says"}'
    elif scope["path"] != "/echo":
        size, seed = map(int, scope["path"].split("/")[1:])
        body = content(size, seed)
    headers = [
        (b"content-length", str(len(body)).encode()),
        (b"host", dict(scope["headers"])[b"host"]),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("size", SIZES)
def test_a_body_fills_the_buffer_and_not_a_byte_more(
    uvicorn_server: Any, link: str, size: int
) -> None:
    expected, buffer = content(size), bytearray(b"\xee" * (size + 100))
    with uvicorn_server(link, app, lifespan="off").client() as client:
        with client.stream("GET", f"/{size}/0") as response:
            readinto = response.extensions["readinto"]
            received = 0
            while count := readinto(memoryview(buffer)[received:]):
                received += count
        assert received == size
    assert buffer == expected + b"\xee" * 100


@pytest.mark.parametrize("size", SIZES)
def test_a_body_reads_as_an_ordinary_httpx_response(
    uvicorn_server: Any, link: str, kind: str, size: int
) -> None:
    with uvicorn_server(link, app, lifespan="off").client(kind) as client:
        assert client.get(f"/{size}/0").content == content(size)
        assert client.post("/echo", content=content(size)).content == content(size)
        pieces = iter([content(size), b"", b"end"])
        response = client.post("/echo", content=pieces)
        assert response.content == content(size) + b"end"
        assert (response.status_code, response.reason_phrase) == (200, "OK")


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 5 << 20])
def test_a_frame_is_received_whole_by_either_transport(
    peer: Any, link: str, kind: str, size: int
) -> None:
    weight = torch.arange(size, dtype=torch.int32) * 7
    body = encode({"fingerprint": "f"}, {"weight": weight}).to_bytes()

    def script(far_end: Any) -> None:
        while far_end.read_request():
            far_end.answer(body)

    server = peer(link, script)
    connection = server.connection(kind)
    for _ in range(3):
        frame = connection.input_embeddings()
        assert torch.equal(frame.tensors["weight"], weight)
    connection.close()
    assert connection.bytes_received == 3 * len(body)
    assert len(server.opened) == 1


def test_a_transport_may_fill_a_view_in_part() -> None:
    """As `readinto` of sockets does."""
    body = io.BytesIO(encode({}, {"weight": torch.arange(5.0)}).to_bytes())

    def answer(_request: httpx.Request) -> httpx.Response:
        headers = {"content-length": str(len(body.getbuffer()))}
        extensions = {"readinto": lambda view: body.readinto(view[:7])}
        return httpx.Response(200, headers=headers, extensions=extensions)

    connection = Connection(
        "http://a", token=None, timeout_s=1,
        transport=httpx.MockTransport(answer),
    )  # fmt: skip
    assert torch.equal(connection.input_embeddings().tensors["weight"], torch.arange(5.0))


def test_threads_at_once_each_get_their_own(uvicorn_server: Any, link: str, kind: str) -> None:
    """Compared at the end, with all bodies still held: no buffer is used twice."""
    sizes = [0, 1000, 70_000, 3 << 20]
    with uvicorn_server(link, app, lifespan="off").client(kind) as client:

        def fetch(seed: int) -> list[bytes]:
            return [client.get(f"/{size}/{seed}").content for size in sizes for _ in range(4)]

        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(fetch, range(8)))
    for seed, bodies in enumerate(got):
        assert bodies == [content(size, seed) for size in sizes for _ in range(4)]


def test_requests_share_one_connection_also_after_errors(
    uvicorn_server: Any, link: str, kind: str
) -> None:
    server = uvicorn_server(link, app, lifespan="off")
    connection = server.connection(kind)
    for _ in range(10):
        connection.input_embeddings()
        with pytest.raises(InvalidRequest, match="so it says"):
            connection.check_ready(60)
    connection.close()
    server.wait_until_lost()
    assert len(server.opened) == 1


def test_a_body_read_to_its_end_gives_its_connection_back_at_once(
    uvicorn_server: Any, link: str
) -> None:
    """Though its response is still open."""
    server = uvicorn_server(link, app, lifespan="off")
    with server.client() as client, client.stream("GET", "/9/0") as response:
        assert response.extensions["readinto"](memoryview(bytearray(9))) == 9
        assert client.get("/9/4").content == content(9, 4)
    assert len(server.opened) == 1


def test_a_connection_that_the_server_closed_while_idle_is_replaced(
    uvicorn_server: Any, link: str, kind: str
) -> None:
    server = uvicorn_server(link, app, lifespan="off", timeout_keep_alive=1)
    connection = server.connection(kind)
    for _ in range(2):
        connection.input_embeddings()
        server.wait_until_lost()
    connection.input_embeddings()
    connection.close()
    assert len(server.opened) == 3


def test_a_body_given_up_costs_its_connection(uvicorn_server: Any, link: str, kind: str) -> None:
    server = uvicorn_server(link, app, lifespan="off")
    with server.client(kind) as client:
        with client.stream("GET", f"/{20 << 20}/0") as response:
            assert next(response.iter_raw()) == content(20 << 20)[: 1 << 16] or kind == "stock"
        server.wait_until_lost()
        assert client.get("/9/4").content == content(9, 4)
    assert len(server.opened) == 2


def test_idle_connections_beyond_the_limit_are_closed(peer: Any, link: str) -> None:
    barrier = threading.Barrier(3)

    def script(far_end: Any) -> None:
        while far_end.read_request():
            barrier.wait(60)
            far_end.answer(b"body")

    server = peer(link, script)
    transport = server.transport(max_keepalive_connections=1)
    with httpx.Client(transport=transport, base_url=server.http_url) as client:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: client.get("/"), range(3)))
        server.wait_until_lost(2)
        assert not server.lost.acquire(blocking=False)
        assert len(transport._open) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("link", ["tls", "unix"])
def test_a_batch_over_the_link_is_what_the_definition_says(
    uvicorn_server: Any, link: str, model: Any, connect: Any, inputs: Any, draft_ids: Any,
    expect: Any, matches: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the URL alone; the certificate's authority by SSL_CERT_FILE; proxy variables unread."""
    from eagle3_server import ServerSettings, TransformersTarget, create_app

    target = TransformersTarget(model, model_id="tiny")
    server = uvicorn_server(link, create_app(target, ServerSettings()))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    if server.ca_file is not None:
        monkeypatch.setenv("SSL_CERT_FILE", server.ca_file)
    backend = connect(None, draft_ids, urls=server.url, exact=True)
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))


def test_a_proxy_is_reached_with_httpx_own_transport(
    uvicorn_server: Any, model: Any, connect: Any, inputs: Any, draft_ids: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    """The host does not exist: the requests, with the whole URL in them, reach the proxy."""
    from eagle3_server import ServerSettings, TransformersTarget, create_app

    proxied = create_app(TransformersTarget(model, model_id="tiny"), ServerSettings())
    hosts: set[bytes] = set()

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        hosts.update(value for name, value in scope.get("headers", ()) if name == b"host")
        await proxied(scope, receive, send)

    server = uvicorn_server("tcp", proxy)
    transport = httpx.HTTPTransport(proxy=server.url)
    backend = connect(transport, draft_ids, urls="http://target.invalid:81", exact=True)
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))
    assert hosts == {b"target.invalid:81"}


def test_the_host_of_a_unix_socket_is_localhost(uvicorn_server: Any) -> None:
    server = uvicorn_server("unix", app, lifespan="off")
    with server.client() as client:
        assert client.get("/0/0").headers["host"] == "localhost"


@pytest.mark.parametrize(
    "url",
    ["unix://run/eagle3.sock", "unix://", "unix:///" + "x" * 107, "unix:///a\0b", "unix:/run/a",
     "http://a:99999", "http://a:0", "http://a:b", "http://[::1", "http://a?b", "http://a/#b",
     "ftp://a", "http:///a", "http://a/v1"],
)  # fmt: skip
def test_a_url_that_cannot_work_is_refused_with_one_that_does(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"unix:///(path|run).*; got "):
        ClientSettings(urls=(url,), device=torch.device("cpu"))


@pytest.mark.parametrize("url", ["unix:///" + "x" * 106, "http://[::1]:80", "https://a.b/prefix"])
def test_a_url_that_may_work_is_taken(url: str) -> None:
    assert ClientSettings(urls=(url,), device=torch.device("cpu")).urls == (url,)


def test_a_unix_url_and_a_transport_contradict_each_other(connect: Any) -> None:
    with pytest.raises(InvalidRequest, match="brings its own transport"):
        connect(HttpTransport(), urls="unix:///run/eagle3.sock")


def test_nobody_at_the_socket_says_so(connect: Any) -> None:
    with pytest.raises(TransportError, match=r"ConnectError.*url=unix:///no/such.sock"):
        connect(urls="unix:///no/such.sock", max_retries=0).model_info()
