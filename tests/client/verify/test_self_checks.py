"""`eagle3-remote verify` has the server repeat its checks, and tells each in a line of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.self_check.planting import (
    add_noise,
    forget_transform,
    hook_layers,
    leak,
    one_back,
)
from tests.tiny_tokenizer import VOCAB_SIZE, save_with_tokenizer
from typer.testing import CliRunner

from eagle3_client import RemoteEagle3Backend
from eagle3_client.cli import app
from eagle3_client.verify_server import self_checks
from eagle3_schemas.errors import (
    FingerprintMismatch,
    ProtocolMismatch,
    QueueFull,
    TargetFailed,
    Unauthorized,
)
from eagle3_schemas.protocol import SELF_CHECK_PATH
from eagle3_schemas.self_check import SELF_CHECKS
from eagle3_server import ServerSettings, TransformersTarget
from eagle3_server.loading import load_target

CLI_TEXT = "the cat sat on my mat, which is big; a dog ran up. " * 12

Plant = Callable[[Any, TransformersTarget, pytest.MonkeyPatch], object]


@pytest.fixture
def model(build_model: Any) -> Any:
    return build_model("gemma2")


@pytest.fixture
def ask(serve: Any) -> Any:
    """`ask(target)`: what `verify` reports of the server's own checks."""

    def checks(target: Any, **how: Any) -> Any:
        with RemoteEagle3Backend("http://target", transport=serve(target), **how) as backend:
            return self_checks(backend)

    return checks


def test_each_check_has_a_line(ask: Any, model: Any) -> None:
    found = ask(TransformersTarget(model, model_id="tiny"))
    assert tuple(found) == SELF_CHECKS
    assert {each.status for each in found.values()} == {"ok"}
    assert all(each.remedy is None for each in found.values())
    assert found["head"].values == {"largest_difference": 0.0}


PLANTED: dict[str, Plant] = {
    "hooks": lambda _model, _target, patch: hook_layers(patch, one_back),
    "head": lambda _model, target, _patch: forget_transform(target),
    "packing": lambda _model, _target, patch: leak(patch),
    "bits_repeat": lambda model, _target, _patch: add_noise(model, 1e-4),
}
REMEDIES = {
    "hooks": "aux states are of other layers than they are named: do not train on them",
    "head": "supervision is not of the target's logits: do not train on it",
    "packing": "send one document a row",
    "bits_repeat": "do not rely on exact=True",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_named_with_a_remedy(
    ask: Any, model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    target = TransformersTarget(model, model_id="tiny")
    PLANTED[name](model, target, monkeypatch)
    found = ask(target)
    assert {n for n, each in found.items() if each.status == "failed"} == {name}
    assert REMEDIES[name] in found[name].remedy


def test_what_does_not_apply_is_skipped_with_its_reason(ask: Any, model: Any) -> None:
    model.get_output_embeddings = lambda: None
    found = ask(TransformersTarget(model, model_id="tiny"))
    assert found["head"].status == "skipped"
    assert "runs for every position" in found["head"].detail


class Altered(httpx.BaseTransport):
    """A server whose answers to a self-check are others."""

    def __init__(self, inner: httpx.BaseTransport, answer: Callable[[], httpx.Response]) -> None:
        self._inner, self._answer, self.asked = inner, answer, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == SELF_CHECK_PATH:
            self.asked += 1
            answer = self._answer()
            answer.read()
            stream = httpx.ByteStream(answer.content)  # as of a network: read once, raw
            return httpx.Response(answer.status_code, headers=answer.headers, stream=stream)
        return self._inner.handle_request(request)


def problem(status: int, code: str, detail: str) -> httpx.Response:
    document = {"title": "", "status": status, "code": code, "detail": detail}
    return httpx.Response(status, json=document)


def test_an_older_server_tells_what_it_proved_at_load(serve: Any, model: Any) -> None:
    def too_old() -> httpx.Response:
        words = f"Not Found: POST {SELF_CHECK_PATH} is not a path of this server"
        return problem(404, "protocol_mismatch", words)

    transport = Altered(serve(TransformersTarget(model, model_id="tiny")), too_old)
    with RemoteEagle3Backend("http://target", transport=transport) as backend:
        assert backend.self_check() is None
        (name, check), *more = self_checks(backend).items()
    assert (name, check.status, more) == ("load_time", "skipped", [])
    assert check.detail == (
        "this server cannot repeat its checks; at load it proved: head: rows; packing: masked; "
        "bits repeat: None"
    )


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda: problem(500, "target_failed", "broke"), TargetFailed, "broke"),
        (lambda: httpx.Response(200, json={"checks": 7}), ProtocolMismatch, "Check both sides"),
        (
            lambda: httpx.Response(
                200, json={"request_id": "a", "fingerprint": "other", "checks": []}
            ),
            FingerprintMismatch,
            "from other",
        ),
    ],
    ids=["failed", "no such answer", "another target"],
)
def test_what_is_no_answer_is_an_error(
    serve: Any, model: Any, answer: Any, error: Any, words: str
) -> None:
    transport = Altered(serve(TransformersTarget(model, model_id="tiny")), answer)
    with (
        RemoteEagle3Backend("http://target", transport=transport, retry_for_s=0.1) as backend,
        pytest.raises(error, match=words),
    ):
        backend.self_check()


def test_another_under_way_is_waited_for(serve: Any, model: Any) -> None:
    bridge = serve(TransformersTarget(model, model_id="tiny"))
    answers = [
        lambda: problem(429, "queue_full", "one at a time"),
        lambda: bridge.handle_request(httpx.Request("POST", f"http://target{SELF_CHECK_PATH}")),
    ]

    transport = Altered(bridge, lambda: answers.pop(0)())
    with RemoteEagle3Backend("http://target", transport=transport) as backend:
        found = backend.self_check()
    assert found is not None
    assert (len(found), transport.asked) == (len(SELF_CHECKS), 2)
    transport = Altered(bridge, lambda: problem(429, "queue_full", "one at a time"))
    with (
        RemoteEagle3Backend("http://target", transport=transport, retry_for_s=0.1) as backend,
        pytest.raises(QueueFull, match="one at a time"),
    ):
        backend.self_check()


def test_it_takes_the_token(serve: Any, model: Any) -> None:
    bridge = serve(TransformersTarget(model, model_id="tiny"), token="right")
    with RemoteEagle3Backend("http://target", transport=bridge, token="right") as backend:
        assert len(backend.self_check() or ()) == len(SELF_CHECKS)
    with (
        RemoteEagle3Backend("http://target", transport=bridge, token="wrong") as backend,
        pytest.raises(Unauthorized),
    ):
        backend.self_check()


def test_the_command_tells_of_a_server_that_serves_other_layers(
    live_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_with_tokenizer(tmp_path / "tiny")
    target = load_target(ServerSettings(model=str(checkpoint), device="cpu"))
    assert target.describe().vocab_size == VOCAB_SIZE
    url = live_server(target)
    text = tmp_path / "text.txt"
    text.write_text(CLI_TEXT)
    command = ["verify", url, "--text", str(text), "--tokenizer", str(checkpoint)]
    hook_layers(monkeypatch, one_back)
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 1
    lines = told.output.splitlines()
    (line,) = [i for i, each in enumerate(lines) if "FAILED   hooks" in each]
    assert "what was caught of layer 1 is layer 0's output" in " ".join(told.output.split())
    assert any(each.lstrip().startswith("-> aux states are of") for each in lines[line:])
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    checks = document["servers"][0]["checks"]
    assert document["passed"] is False
    assert [checks[name]["status"] for name in SELF_CHECKS] == ["failed", "ok", "ok", "ok"]
    assert checks["hooks"]["values"]["largest_difference"] > 0
