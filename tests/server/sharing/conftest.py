"""Requests by hand to a live server whose answers are known by a seed."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from tests.seeded_target import D, V, answer_of, inputs_of

from eagle3_schemas import DraftVocab
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.protocol import FRAME_MEDIA_TYPE
from eagle3_schemas.supervision import pack_bits
from eagle3_schemas.tokens import TokenBatch

PATIENCE_S = 60.0
VOCAB = DraftVocab.from_ids(torch.arange(D))


def body_of(seed: int, request_id: str) -> bytes:
    """The body of a request for the answer of `seed`."""
    input_ids, attention_mask, loss_mask = inputs_of(seed)
    _, frame = pack_request(
        TokenBatch(input_ids, attention_mask, loss_mask),
        request_id=request_id,
        draft_vocab_digest=VOCAB.digest,
        aux_layer_ids=None,
        encoding="probs",
        rows="position_mask",
        aux_dtype="model",
        exact=False,
    )
    return frame.to_bytes()


class Trainer:
    """One client, a connection a request, nothing repeated."""

    def __init__(self, url: str, name: str, **headers: str) -> None:
        self.url, self.name = url, name
        self.http = httpx.Client(
            base_url=url,
            headers={"x-eagle3-client": name, **headers},
            timeout=PATIENCE_S,
        )

    def register(self) -> None:
        tensors = {
            "selected_token_ids": VOCAB.selected_token_ids.int(),
            "selected_token_mask": pack_bits(VOCAB.mask(V)),
        }
        path = f"/v1/draft-vocabs/{VOCAB.digest}"
        headers = {"content-type": FRAME_MEDIA_TYPE}
        content = encode({}, tensors).to_bytes()
        assert self.http.put(path, content=content, headers=headers).status_code == 200

    def ask(self, seed: int, request_id: str | None = None, **headers: str) -> httpx.Response:
        request_id = request_id or f"{self.name}-{seed}"
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(
            "/v1/supervision",
            content=body_of(seed, request_id),
            headers={"content-type": FRAME_MEDIA_TYPE, "x-request-id": request_id, **names},
        )

    def open(self, seed: int, request_id: str, receive_bytes: int | None = None) -> socket.socket:
        """Send a request on a socket of its own, whose answer nobody reads yet."""
        body = body_of(seed, request_id)
        head = (
            f"POST /v1/supervision HTTP/1.1\r\nhost: x\r\ncontent-type: {FRAME_MEDIA_TYPE}\r\n"
            f"x-request-id: {request_id}\r\nx-eagle3-client: {self.name}\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        sock = self.connect(receive_bytes)
        sock.sendall(head.encode() + body)
        return sock

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(PATIENCE_S)
        parts = urlsplit(self.url)
        sock.connect((parts.hostname, parts.port))
        return sock

    def status(self) -> Any:
        return self.http.get("/v1/status").json()


@pytest.fixture
def trainer() -> Iterator[Callable[..., Trainer]]:
    """`trainer(url, name, **headers)`: a client whose draft vocab is registered."""
    with ExitStack() as stack:

        def build(url: str, name: str = "trainer", **headers: str) -> Trainer:
            built = Trainer(url, name, **headers)
            stack.callback(built.http.close)
            built.register()
            return built

        yield build


@pytest.fixture
def is_right() -> Callable[[int, httpx.Response], bool]:
    """Whether a response is the answer of a seed, byte for byte."""

    def check(seed: int, response: httpx.Response) -> bool:
        assert response.status_code == 200, response.text
        tensors = decode(torch.frombuffer(bytearray(response.content), dtype=torch.uint8)).tensors
        expected = answer_of(seed, inputs_of(seed)[2])
        return sorted(tensors) == sorted(expected) and all(
            torch.equal(tensors[name], expected[name]) for name in expected
        )

    return check


def problem(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and words of an error."""
    document = json.loads(response.content)
    return response.status_code, document["code"], document["detail"]


@pytest.fixture
def serve_app(trainer: Callable[..., Trainer]) -> Iterator[Callable[[Any], Trainer]]:
    """`serve_app(app)`: a client of an app of the test's own."""
    import threading

    import uvicorn

    from eagle3_server import ServerSettings
    from eagle3_server.http_protocol import bounded

    with ExitStack() as stack:

        def start(app: Any) -> Trainer:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            config = uvicorn.Config(app, http=bounded(ServerSettings()), log_config=None, ws="none")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return trainer(f"http://127.0.0.1:{listener.getsockname()[1]}")

        yield start


@pytest.fixture
def started() -> Iterator[Callable[..., Any]]:
    """`started(**variables)`: a server process, see `server_process.Process`."""
    from tests.server.sharing.server_process import Process

    with ExitStack() as stack:

        def start(**variables: str) -> Process:
            process = Process(**variables)
            stack.callback(process.close)
            return process

        yield start
