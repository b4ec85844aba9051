"""Servers that tests talk to: behind a bridge, on a real socket, with forwards that wait."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor, nn

from eagle3_client import RemoteEagle3Backend

PATIENCE_S = 60.0
"""How long a test waits for what must happen; only a failing test ever waits this long."""


class Bridge(httpx.BaseTransport):
    """Hands the backend's requests to an app through Starlette's TestClient.

    `app_client` may be replaced: so a server restarts, empty or with another model.
    """

    def __init__(self, app_client: Any) -> None:
        self.app_client = app_client
        self._under_way = 0
        self._changed = threading.Condition()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        headers = [(key.decode(), value.decode()) for key, value in request.headers.raw]
        path = request.url.raw_path.decode()
        with self._counted():
            answer = self.app_client.request(
                request.method, path, headers=headers, content=request.read()
            )
        body = httpx.ByteStream(answer.content)
        return httpx.Response(answer.status_code, headers=answer.headers.raw, stream=body)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._changed:
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """TestClient hangs if it is left while a request is under way, whoever gave that up."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._under_way == 0, PATIENCE_S)


def is_comparison(target: Any, job: Any) -> bool:
    """Whether a job is a fleet's, which compares what its servers compute."""
    return bool(job.draft_vocab.draft_vocab_size == target.describe().vocab_size)


class GatedTarget:
    """A real target whose `supervise` waits for `gate`, after telling `entered`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def describe(self) -> Any:
        return self.inner.describe()

    def input_embeddings(self) -> Any:
        return self.inner.input_embeddings()

    def draft_head(self, draft_vocab: Any) -> Any:
        return self.inner.draft_head(draft_vocab)

    def capture(self, job: Any) -> Any:
        return self.inner.capture(job)

    def supervise(self, job: Any) -> Any:
        if is_comparison(self, job):  # which no test here waits for
            return self.inner.supervise(job)
        self.entered.release()
        assert self.gate.wait(PATIENCE_S), "nobody opened the gate"
        return self.inner.supervise(job)

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S), "no forward began"


@pytest.fixture
def serve() -> Iterator[Callable[..., Bridge]]:
    """`serve(model_or_target, **settings)`: an app that has started, behind a bridge."""
    from starlette.testclient import TestClient

    from eagle3_server import ServerSettings, TransformersTarget, create_app

    with ExitStack() as stack:

        def start(served: Any, **settings: Any) -> Bridge:
            aux_layer_ids = settings.pop("aux_layer_ids", None)
            if isinstance(served, nn.Module):
                served = TransformersTarget(served, model_id="tiny", aux_layer_ids=aux_layer_ids)
            client = stack.enter_context(TestClient(create_app(served, ServerSettings(**settings))))
            bridge = Bridge(client)
            stack.callback(bridge.wait_until_idle)
            if isinstance(served, GatedTarget):
                stack.callback(served.gate.set)
            return bridge

        yield start


@pytest.fixture
def gated() -> Callable[[nn.Module], GatedTarget]:
    """`gated(model)`: a target whose forwards wait for the test."""
    from eagle3_server import TransformersTarget

    return lambda model: GatedTarget(TransformersTarget(model, model_id="tiny"))


@pytest.fixture
def connect(
    mapping: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> Iterator[Callable[..., RemoteEagle3Backend]]:
    """`connect(transport, draft_ids, **kwargs)`: a backend, its draft vocab set."""
    with ExitStack() as stack:

        def build(
            transport: httpx.BaseTransport | None = None,
            draft_ids: Tensor | None = None,
            *,
            urls: Any = "http://target",
            **kwargs: Any,
        ) -> RemoteEagle3Backend:
            backend = RemoteEagle3Backend(urls, transport=transport, **kwargs)
            stack.callback(backend.close)
            if draft_ids is not None:
                backend.set_vocab_mapping(*mapping(draft_ids, backend.model_info().vocab_size))
            return backend

        yield build


@pytest.fixture
def live_server() -> Iterator[Callable[..., str]]:
    """`live_server(model_or_target, **settings)`: the URL of a uvicorn on a free port.

    `unix=path` listens on a Unix socket instead, `keep_alive_s` sets uvicorn's own.
    """
    import uvicorn

    from eagle3_server import ServerSettings, TransformersTarget, create_app
    from eagle3_server.http_protocol import bounded
    from eagle3_server.listening import listen_unix

    with ExitStack() as stack:

        def start(
            served: Any, *, unix: Path | None = None, keep_alive_s: int = 600, **settings: Any
        ) -> str:
            if isinstance(served, nn.Module):
                served = TransformersTarget(served, model_id="tiny")
            # Bound here, so that a client may connect before uvicorn accepts: no waiting for it.
            listener = stack.enter_context(
                socket.create_server(("127.0.0.1", 0)) if unix is None else listen_unix(unix)
            )
            checked = ServerSettings(**settings)
            app = create_app(served, checked)
            config = uvicorn.Config(
                app,
                http=bounded(checked, app.state.service.telemetry.refused_connection),
                proxy_headers=False,
                log_config=None,
                ws="none",
                timeout_keep_alive=keep_alive_s,
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()

            def stop() -> None:
                server.should_exit = True
                if isinstance(served, GatedTarget):
                    served.gate.set()
                thread.join()

            stack.callback(stop)
            return _url_of(listener)

        yield start


def _url_of(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix://{listener.getsockname()}"
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that two ranks can share, its vocab unevenly."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


def save_tiny_llama(path: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Save a random Llama as `save_pretrained` does; `sizes` are of its config."""
    import torch
    import transformers

    torch.manual_seed(seed)
    tiny = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 131,
        "initializer_range": 0.2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**(tiny | sizes))).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.fail("TLS is tested with a certificate that the openssl command makes: install it")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9999"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*command.split(), "-keyout", str(key), "-out", str(cert), *names],
        check=True,
        capture_output=True,
    )
    return cert, key


def router(**bridges: httpx.BaseTransport) -> httpx.MockTransport:
    """Sends each request to the bridge named as its host."""
    return httpx.MockTransport(lambda request: bridges[request.url.host].handle_request(request))
