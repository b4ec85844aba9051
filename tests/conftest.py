"""What all suites share: tiny real targets, a bridge to the app, a live server, the oracles."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# Before torch loads it: threads that spin while they wait make a busy machine five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import httpx
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import Eagle3TargetBatch

torch.set_num_threads(2)  # equal bits need equal thread counts

# `make test` is the same every time; `make soak` looks elsewhere each time, for longer.
settings.register_profile("every-time", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("soak", max_examples=50_000, derandomize=False, deadline=None)
settings.load_profile("every-time")

PATIENCE_S = 60.0
"""How long a test waits for what must happen; only a failing test ever waits this long."""

# Every dimension of a family differs from its others and from B and T of `batch_of`: a transposed
# axis fails. V is no multiple of 8, so a mask over it does not fill its last byte.
BATCH_SIZE, SEQUENCE_LENGTH = 3, 10
COMMON = {"initializer_range": 0.2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 7,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 131,
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 9,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 157,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 7, "n_head": 6, "n_inner": 80, "vocab_size": 131}
        | {"n_positions": 16},
    ),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 6, "ffn_dim": 80}
        | {"word_embed_proj_dim": 48, "vocab_size": 131, "max_position_embeddings": 16},
    ),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 6, "vocab_size": 131},
    ),
    "mpt": ("MptForCausalLM", {"d_model": 48, "n_layers": 7, "n_heads": 6, "vocab_size": 131}),
}
# What families do to their head's output, strong enough to show.
FAMILIES["gemma2"] = (
    "Gemma2ForCausalLM",
    FAMILIES["llama"][1] | {"final_logit_softcapping": 2.0, "sliding_window": 8},
)
FAMILIES["cohere"] = (
    "CohereForCausalLM",
    {name: value for name, value in FAMILIES["llama"][1].items() if name != "head_dim"}
    | {"logit_scale": 0.3, "tie_word_embeddings": False},
)
FAMILIES["granite"] = ("GraniteForCausalLM", FAMILIES["llama"][1] | {"logits_scaling": 3.0})


def _build_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    class_name, dimensions = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model: nn.Module = model_class(model_class.config_class(**COMMON | dimensions))
    return model.to(dtype).eval()


_shared_model = lru_cache(_build_model)


@pytest.fixture(autouse=True)
def _no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the developer's shell must not reach a test."""
    for name in list(os.environ):
        if name.startswith("EAGLE3_"):
            monkeypatch.delenv(name)


@pytest.fixture
def build_model() -> Callable[..., nn.Module]:
    """`build_model(family, dtype, seed)`: a model of the test's own, to change as it likes."""
    return _build_model


@pytest.fixture(params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dtype() -> torch.dtype:
    return torch.float32


@pytest.fixture
def model(family: str, dtype: torch.dtype) -> nn.Module:
    """A tiny random model of `family` in `dtype`; shared, so only read it."""
    return _shared_model(family, dtype)


# --- inputs ---


@dataclass(frozen=True)
class Inputs:
    """One batch as a trainer has it."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.input_ids, self.attention_mask, self.loss_mask))


@pytest.fixture
def batch_of() -> Callable[..., Inputs]:
    """`batch_of(vocab_size, lengths, left=..., seed=...)`: random ids, padded with id 0."""

    def build(
        vocab_size: int,
        lengths: tuple[int, ...] = (10, 7, 4),
        *,
        left: bool = False,
        seed: int = 0,
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        width = max(lengths)
        columns = torch.arange(width).expand(len(lengths), width)
        columns = columns.flip(1) if left else columns
        attention_mask = (columns < torch.tensor(lengths)[:, None]).long()
        input_ids = torch.randint(1, vocab_size, attention_mask.shape, generator=generator)
        prompt = torch.rand(attention_mask.shape, generator=generator) < 0.2
        return Inputs(input_ids * attention_mask, attention_mask, attention_mask * ~prompt)

    return build


@pytest.fixture
def mapping() -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """`mapping(ids, vocab_size)`: the arguments of `set_vocab_mapping`."""

    def build(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[ids] = True
        return ids, mask

    return build


@pytest.fixture
def frequency_ordered() -> Callable[..., Tensor]:
    """`frequency_ordered(vocab_size, size, seed)`: distinct ids in no numeric order."""

    def build(vocab_size: int, size: int, seed: int = 5) -> Tensor:
        return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:size]

    return build


# --- servers ---


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

    def supervise(self, job: Any) -> Any:
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
            config = uvicorn.Config(
                create_app(served, ServerSettings(**settings)),
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


# --- oracles: the definition, written without the code under test ---


@dataclass(frozen=True)
class Expected:
    """What the definition says of one batch."""

    aux_hidden_states: Tensor  # [B, T, 3H], attended positions only, zeros elsewhere
    target_probs: Tensor  # [B, T, D], rows asked for, zeros elsewhere
    position_mask: Tensor  # [B, T, 1]


def _expected_aux(model: Any, inputs: Inputs, aux_layer_ids: tuple[int, ...]) -> Tensor:
    """Layer i is `output_hidden_states[i + 1]`, the last layer what the final norm is fed."""
    before_norm: list[Tensor] = []
    norm = next(
        module
        for name in ("norm", "ln_f", "norm_f", "final_layer_norm")
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == name and ".layers." not in path
    )
    handle = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    try:
        with torch.no_grad():
            states = model(
                input_ids=inputs.input_ids,
                attention_mask=(inputs.attention_mask != 0).long(),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
    finally:
        handle.remove()
    last = len(states) - 2
    return torch.cat([before_norm[0] if i == last else states[i + 1] for i in aux_layer_ids], -1)


def _expected_supervision(
    logits: Tensor, loss_mask: Tensor, draft_ids: Tensor, rows: str
) -> tuple[Tensor, Tensor]:
    """The definition, one position after another."""
    batch_size, length, vocab_size = logits.shape
    target_probs = torch.zeros(batch_size, length, len(draft_ids))
    position_mask = torch.zeros(batch_size, length, 1, dtype=torch.bool)
    selected = set(draft_ids.tolist())
    for row in range(batch_size):
        for position in range(length):
            is_last = position + 1 == length
            z = torch.zeros(vocab_size) if is_last else logits[row, position + 1]
            is_supervised = not is_last and bool(loss_mask[row, position + 1] != 0)
            values = z.tolist()
            is_trained = is_supervised and values.index(max(values)) in selected  # lowest id
            position_mask[row, position, 0] = is_trained
            if {"position_mask": is_trained, "loss_mask": is_supervised, "all": True}[rows]:
                chosen = torch.stack([z[i] for i in draft_ids.tolist()])
                target_probs[row, position] = torch.softmax(chosen.float(), dim=0)
    return target_probs, position_mask


@pytest.fixture
def expect() -> Callable[..., Expected]:
    """`expect(model, inputs, draft_ids, aux_layer_ids, rows)`: the oracle for one batch."""

    def compute(
        model: Any,
        inputs: Inputs,
        draft_ids: Tensor,
        aux_layer_ids: tuple[int, ...] | None = None,
        rows: str = "position_mask",
    ) -> Expected:
        if aux_layer_ids is None:
            depth = model.config.num_hidden_layers
            aux_layer_ids = (1, depth // 2 - 1, depth - 4)
        attended = inputs.attention_mask != 0
        aux = _expected_aux(model, inputs, aux_layer_ids)
        with torch.no_grad():
            logits = model(
                input_ids=inputs.input_ids, attention_mask=attended.long(), use_cache=False
            ).logits
        supervision = _expected_supervision(logits, inputs.loss_mask, draft_ids, rows)
        return Expected(torch.where(attended[..., None], aux, aux.new_zeros(())), *supervision)

    return compute


def _same(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def same() -> Callable[[Tensor | None, Tensor], None]:
    """Assert equal values, shapes and dtypes, without any tolerance."""
    return _same


@pytest.fixture
def matches() -> Callable[[Eagle3TargetBatch, Expected], None]:
    """Assert that a remote batch's supervision is exactly what the oracle says."""

    def check(batch: Eagle3TargetBatch, expected: Expected) -> None:
        _same(batch.aux_hidden_states, expected.aux_hidden_states)
        _same(batch.position_mask, expected.position_mask)
        _same(batch.target_probs, expected.target_probs)

    return check
