"""A real Chromium, and servers for it to look at."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from tests.from_apt import program
from tests.servers import PATIENCE_S
from tests.tiny_tokenizer import VOCAB_SIZE, save_with_tokenizer

from eagle3_client import RemoteEagle3Backend
from eagle3_server import ServerSettings, create_app
from eagle3_server.http_protocol import bounded
from eagle3_server.loading import load_target

TOKEN = "right-token"
HOSTILE = ("<script>window.ran = 1</script>", "<img src=x onerror=window.ran=2>")
DRAFT_IDS = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(4))[:150]
WATCH = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


class Server:
    """A uvicorn on a port of its own, which it keeps when it is stopped and started again."""

    def __init__(self, target: Any, **settings: Any) -> None:
        self._settings = ServerSettings(**settings)
        self._target = target
        self._port = 0
        self.service: Any = None
        self.url = ""

    def start(self) -> None:
        """Listen; requests may come at once."""
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        app = create_app(self._target, self._settings)
        self.service = app.state.service
        http = bounded(self._settings, self.service.telemetry.refused_connection)
        config = uvicorn.Config(app, http=http, log_config=None, ws="none", proxy_headers=False)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, kwargs={"sockets": [listener]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End it; nobody listens then."""
        self._uvicorn.should_exit = True
        self._thread.join()

    def get(self, path: str) -> Any:
        """Ask as the page does."""
        headers = {"authorization": f"Bearer {TOKEN}"}
        return httpx.get(f"{self.url}{path}", headers=headers).json()

    def inspect(self, **fields: Any) -> Any:
        """Ask what the probe asks."""
        headers = {"authorization": f"Bearer {TOKEN}"}
        return httpx.post(f"{self.url}/v1/inspect", headers=headers, json=fields).json()

    def backend(self) -> RemoteEagle3Backend:
        """Return a trainer's side of it, with a draft vocab."""
        backend = RemoteEagle3Backend(self.url, token=TOKEN)
        mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        mask[DRAFT_IDS] = True
        backend.set_vocab_mapping(DRAFT_IDS, mask)
        return backend


def train(server: Server) -> None:
    """Have a trainer served: padded batches, and a request that is refused."""
    generator = torch.Generator().manual_seed(1)
    with server.backend() as backend:
        for length in (9, 14, 11):
            ids = torch.randint(VOCAB_SIZE, (2, 16), generator=generator)
            mask = (torch.arange(16) < length).expand(2, 16).long()
            backend.generate_batch(ids, mask, mask)
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "text/<img src=x onerror=1>"}
    httpx.post(f"{server.url}/v1/supervision", headers=headers, content=b"x")


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has tokens that would be markup."""
    return save_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny", HOSTILE)


@pytest.fixture(scope="package")
def target(checkpoint: Path) -> Any:
    """Its name would be markup too."""
    name = f"a{HOSTILE[0]}{HOSTILE[1]}b"
    return load_target(ServerSettings(model=str(checkpoint), model_name=name, device="cpu"))


@pytest.fixture
def start(target: Any, checkpoint: Path) -> Iterator[Callable[..., Server]]:
    """`start(**settings)`: a server that asks for TOKEN unless told otherwise."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> Server:
            server = Server(target, **{"token": TOKEN, "model": str(checkpoint), **settings})
            server.start()
            stack.callback(server.stop)
            return server

        yield begin


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """A Chromium, headless."""
    executable = program("chromium", "chromium fonts-dejavu-core")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.fail("playwright drives Chromium: `make test-all` installs it (group `page`)")
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox to give; the page is our own.
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(url, **options)`: a page in a context of its own, watched, with `page.heard`."""
    with ExitStack() as stack:

        def go(
            url: str, *, before: Callable[[Any], None] = lambda _page: None, **options: Any
        ) -> Any:
            context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
            stack.callback(context.close)
            context.set_default_timeout(PATIENCE_S * 1000)
            context.add_init_script(WATCH)
            page = context.new_page()
            page.heard, page.asked = [], []
            page.on("pageerror", lambda error: page.heard.append(f"error: {error}"))
            page.on("console", lambda said: page.heard.append(f"{said.type}: {said.text}"))
            page.on("request", lambda request: page.asked.append(request))
            before(page)
            page.goto(url)
            return page

        yield go


def unlock(page: Any, token: str = TOKEN) -> None:
    """Give the token as a user does, and wait for the numbers."""
    page.locator("#token").fill(token)
    page.keyboard.press("Enter")
    page.locator("#cards").wait_for()
