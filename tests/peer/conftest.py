"""The peer, NeMo AutoModel 0.7.0, and the four targets its trainer is run on."""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import uvicorn
from transformers import PreTrainedModel

from eagle3_client import RemoteEagle3Backend
from eagle3_server import HFEagle3TargetModel, ServerSettings, TransformersTarget, create_app

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 30


@pytest.fixture(scope="session")
def peer() -> SimpleNamespace:
    """The peer's classes; without them nothing is compared, so their absence is a failure.

    Not imported with this module, which runs without the peer collect as well. The one warning of
    its import (torch.jit's, through transformers) is ignored by the project's configuration.
    """
    try:
        from nemo_automodel.components.datasets.llm import eagle3
        from nemo_automodel.components.speculative.eagle import core, draft_llama, remote, target
        from nemo_automodel.components.speculative.eagle.remote import server
    except ImportError as exc:
        pytest.fail(
            f"the peer cannot be imported ({exc}); `make test-all` installs it, as do `pip install "
            "--group peer` and `pip install --no-deps nemo-automodel==0.7.0`",
            pytrace=False,
        )
    return SimpleNamespace(
        build_eagle3_token_mapping=eagle3.build_eagle3_token_mapping,
        Eagle3TrainerModule=core.Eagle3TrainerModule,
        LlamaEagle3DraftModel=draft_llama.LlamaEagle3DraftModel,
        RemoteEagle3TargetModel=remote.RemoteEagle3TargetModel,
        HFEagle3TargetModel=target.HFEagle3TargetModel,
        server=server,
    )


class Targets:
    """One model behind four backends: co-located and remote, the peer's and ours."""

    names = ("peer_colocated", "peer_remote", "our_colocated", "our_remote")

    def __init__(self, peer: SimpleNamespace) -> None:
        self._peer = peer

    @contextmanager
    def connect(self, name: str, model: PreTrainedModel, **kwargs: object) -> Iterator[object]:
        """Give the backend of this name; `kwargs` are our client's."""
        if name == "peer_colocated":
            yield self._peer.HFEagle3TargetModel(model)
        elif name == "our_colocated":
            yield HFEagle3TargetModel(model)
        elif name == "peer_remote":
            without_nccl = mock.patch.dict(os.environ, NEMO_EAGLE_ENABLE_NCCL="0")
            with without_nccl, self._peer_url(model) as url:
                client = self._peer.RemoteEagle3TargetModel.from_urls([url], device="cpu")
                with closing(client) as backend:  # which stops its server as well
                    yield backend
        else:
            with self.our_url(model) as url, RemoteEagle3Backend(url, **kwargs) as backend:
                yield backend

    @contextmanager
    def our_url(self, model: PreTrainedModel) -> Iterator[str]:
        """Serve a model by our app under uvicorn, on a port of the system's choice."""
        app = create_app(TransformersTarget(model, model_id="tiny"), ServerSettings(token=None))
        server = uvicorn.Server(uvicorn.Config(app, host=LOOPBACK, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert time.monotonic() < deadline, "our server did not start"
            time.sleep(0.01)
        try:
            yield f"http://{LOOPBACK}:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(START_TIMEOUT_S)
        assert not thread.is_alive(), "our server did not stop"

    @contextmanager
    def _peer_url(self, model: PreTrainedModel) -> Iterator[str]:
        """Serve a model by the peer's own `serve`, until its client disconnects."""
        ports: queue.SimpleQueue[int] = queue.SimpleQueue()

        class Announcing(ThreadingHTTPServer):
            def server_activate(self) -> None:
                super().server_activate()
                ports.put(self.server_address[1])

        server = self._peer.server
        logic = server.TargetModelServer(self._peer.HFEagle3TargetModel(model), nccl_port=0)
        thread = threading.Thread(target=server.serve, args=(logic, LOOPBACK, 0), daemon=True)
        with mock.patch.object(server, "ThreadingHTTPServer", Announcing):
            thread.start()
            port = ports.get(timeout=START_TIMEOUT_S)
        yield f"http://{LOOPBACK}:{port}"
        thread.join(START_TIMEOUT_S)
        assert not thread.is_alive(), "the peer's client did not stop the peer's server"


@pytest.fixture
def targets(peer: SimpleNamespace) -> Targets:
    return Targets(peer)


@pytest.fixture
def recipe(peer: SimpleNamespace) -> type:
    """The part of the peer's recipe that talks to a remote target, as it stands in its source.

    Importing the recipe would need its whole training stack (torchao, wandb, …), so three methods
    are compiled from the file, with our client under the name of the peer's.
    """
    root = importlib.util.find_spec("nemo_automodel").submodule_search_locations[0]
    tree = ast.parse(Path(root, "recipes", "llm", "train_eagle3.py").read_text(encoding="utf-8"))
    names = {"_setup_remote_target", "_resolve_prefetch_depth", "_prefetched_batches"}
    methods = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    assert {method.name for method in methods} == names
    its_globals = {
        "RemoteEagle3TargetModel": SimpleNamespace(
            from_urls=lambda urls, **kwargs: RemoteEagle3Backend.from_urls(
                urls, exact=True, **kwargs
            )
        ),
        **{"deque": deque, "logger": logging.getLogger(__name__)},
    }
    exec(compile(ast.Module(methods, []), "train_eagle3.py", "exec"), its_globals)
    attributes = {"device": torch.device("cpu"), "dist_env": SimpleNamespace(is_main=True)}
    return type("Recipe", (), {**attributes, **{name: its_globals[name] for name in names}})
