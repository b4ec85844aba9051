"""`preflight`: what it finds of a target, and what it hides of nothing else."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch
from tests.client.preflight.conftest import (
    Vocab,
    every_failure_has_a_remedy,
    only,
    statuses,
)
from tests.servers import GatedTarget, router

from eagle3_client import InvalidRequest
from eagle3_client.preflight_report import FLEET_CHECKS, SERVER_CHECKS
from eagle3_schemas import tokenizer_digest
from eagle3_schemas.errors import QueueFull, TargetFailed
from eagle3_schemas.protocol import SERVER_TIMING_HEADER, SUPERVISION_PATH
from eagle3_server import TransformersTarget

pytestmark = pytest.mark.slow

# --- all is well ---


def test_a_right_set_up_passes_and_every_number_is_there(
    build_model: Any, live_server: Any, connect: Any
) -> None:
    digest = tokenizer_digest(Vocab(131))
    target = TransformersTarget(build_model("llama"), model_id="tiny", tokenizer_digest=digest)
    backend = connect(urls=live_server(target, token="s3cret"), token="s3cret")
    report = backend.preflight(Vocab(131), (1, 2, 3), draft_vocab_size=50, supervised_share=0.5)
    checks = only(report)
    assert report.has_passed
    assert checks["bandwidth"].status in ("ok", "unknown")  # loopback may be too fast to measure
    assert statuses(checks)["ok"] | {"bandwidth"} == set(SERVER_CHECKS)
    assert checks["fingerprint"].values["fingerprint"] == backend.fingerprint
    assert checks["supervision"].values["compute_ms"] > 0
    assert checks["throughput"].values["tokens_per_s"] > 0
    # aux 3 x 48 x 4 bytes, and half of 50 x 4.
    assert checks["encoding"].values == {
        "encoding": "probs",
        "aux_bytes_per_token": 576,
        "row_bytes": 200,
        "supervised_share": 0.5,
        "draft_vocab_size": 50,
        "bytes_per_token": 676.0,
    }
    for name, check in checks.items():
        assert set(check.values) <= set(SERVER_CHECKS[name])
    assert statuses(report.fleet) == {"skipped": set(FLEET_CHECKS)}
    assert "s3cret" not in str(report) + str(report.to_dict())


def test_the_backend_can_be_used_before_and_after_with_its_own_transport(
    bridge: Any, connect: Any, inputs: Any, draft_ids: torch.Tensor
) -> None:
    closed: list[bool] = []

    class Own(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            assert not closed
            return bridge.handle_request(request)

        def close(self) -> None:
            closed.append(True)

    backend = connect(Own(), draft_ids)
    first = backend.generate_batch(*inputs)
    checks = only(backend.preflight())
    assert checks["encoding"].values["draft_vocab_size"] == len(draft_ids)
    assert not closed
    assert torch.equal(backend.generate_batch(*inputs).target_probs, first.target_probs)


@pytest.mark.parametrize(
    ("options", "encoding", "aux_bytes", "row_bytes"),
    [
        ({"encoding": "hidden"}, "hidden", 576, 192),
        ({"encoding": "logits"}, "logits", 576, 524),
        ({"aux_dtype": "float8_e4m3"}, "probs", 144 + 3 * 4, 524),
    ],
)
def test_bytes_follow_the_encoding(
    bridge: Any, connect: Any, options: Any, encoding: str, aux_bytes: int, row_bytes: int
) -> None:
    values = only(connect(bridge, **options).preflight())["encoding"].values
    assert values["encoding"] == encoding
    assert (values["aux_bytes_per_token"], values["row_bytes"]) == (aux_bytes, row_bytes)


def test_two_servers_of_one_target_are_found_to_be_the_same(
    build_model: Any, serve: Any, connect: Any
) -> None:
    bridges = {name: serve(build_model("llama")) for name in "ab"}
    report = connect(router(**bridges), urls=["http://a", "http://b"]).preflight()
    assert report.has_passed
    assert statuses(report.fleet) == {"ok": set(FLEET_CHECKS)}
    assert report.fleet["same_target"].values == {"servers": 2, "compared": 2}


# --- a target that is not the expected one ---


def test_two_models_are_told_apart(build_model: Any, live_server: Any, connect: Any) -> None:
    urls = [live_server(build_model(family)) for family in ("llama", "qwen3")]
    report = connect(urls=urls).preflight()
    assert statuses(report.fleet) == {"failed": {"same_target"}, "skipped": {"same_numbers"}}
    detail = report.fleet["same_target"].detail
    assert urls[0] in detail
    assert urls[1] in detail
    assert "one model" in str(report.fleet["same_target"].remedy)
    assert all("failed" not in statuses(server.checks) for server in report.servers)


def test_other_default_layers_are_told_unless_the_client_names_its_own(
    build_model: Any, serve: Any, connect: Any
) -> None:
    layers = {"a": (1, 2, 3), "b": (0, 2, 4)}
    bridges = {name: serve(build_model("llama"), aux_layer_ids=ids) for name, ids in layers.items()}
    urls = ["http://a", "http://b"]
    report = connect(router(**bridges), urls=urls).preflight()
    check = report.fleet["same_target"]
    assert (check.status, check.detail, check.remedy) == (
        "failed",
        "servers' default aux layers differ: [1, 2, 3] at http://a, [0, 2, 4] at http://b",
        "pass aux_layer_ids, or serve all with the same --aux-layer-ids",
    )
    assert connect(router(**bridges), urls=urls, aux_layer_ids=(4, 0, 2)).preflight().has_passed


def test_equal_words_and_other_numbers_are_told(build_model: Any, serve: Any, connect: Any) -> None:
    model = build_model("llama")
    other = TransformersTarget(model, model_id="tiny")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3.0)
    bridges = {"a": serve(build_model("llama")), "b": serve(other)}
    report = connect(router(**bridges), urls=["http://a", "http://b"]).preflight()
    assert statuses(report.fleet) == {"ok": {"same_target"}, "failed": {"same_numbers"}}
    assert "http://b does not compute what http://a does" in report.fleet["same_numbers"].detail


def test_a_dead_server_of_three_leaves_the_rest_compared(
    build_model: Any, live_server: Any, connect: Any, nothing_listens: str
) -> None:
    urls = [live_server(build_model("llama")), nothing_listens, live_server(build_model("llama"))]
    report = connect(urls=urls).preflight()
    assert len(report.failed) == 1
    assert report.fleet["same_numbers"].status == "ok"
    assert report.fleet["same_target"].values == {"servers": 3, "compared": 2}
    assert "2 of 3 servers" in report.fleet["same_target"].detail


def test_another_fingerprint_than_expected(bridge: Any, connect: Any) -> None:
    report = connect(bridge, expect_fingerprint="0" * 32).preflight()
    assert statuses(only(report))["failed"] == {"fingerprint"}
    assert only(report)["fingerprint"].values["expected"] == "0" * 32
    assert "expected 00000" in only(report)["fingerprint"].detail


def test_another_tokenizer(build_model: Any, serve: Any, connect: Any) -> None:
    digest = tokenizer_digest(Vocab(131))
    target = TransformersTarget(build_model("llama"), model_id="tiny", tokenizer_digest=digest)
    checks = only(connect(serve(target)).preflight(Vocab(130)))
    assert statuses(checks)["failed"] == {"tokenizer"}
    assert digest in checks["tokenizer"].detail
    assert "tokenizer of tiny" in str(checks["tokenizer"].remedy)


def test_a_checkpoint_without_a_tokenizer_is_no_failure(bridge: Any, connect: Any) -> None:
    report = connect(bridge).preflight(Vocab(131))
    assert report.has_passed
    assert only(report)["tokenizer"].status == "unknown"


@pytest.mark.parametrize(
    ("expected", "client", "words"),
    [
        ((4, 5, 6), None, "expects 4, 5, 6; the server's default gives 1, 2, 3"),
        ((2, 3, 4), None, "--draft-config"),
        ((3, 2, 1), None, "another order"),
        ((1, 2, 7), None, r"in [0, 7)"),
        ((1, 2), None, "3 distinct ids"),
        ((1, 2, 3), (4, 5, 6), "as passed they are 4, 5, 6"),
        (None, (1, 2, 9), r"in [0, 7)"),
    ],
)
def test_other_layers_than_the_draft_expects(
    bridge: Any, connect: Any, expected: Any, client: Any, words: str
) -> None:
    report = connect(bridge, aux_layer_ids=client).preflight(expect_aux_layer_ids=expected)
    failures = statuses(only(report))["failed"]
    assert "aux_layer_ids" in failures
    assert words in only(report)["aux_layer_ids"].detail
    assert every_failure_has_a_remedy(report)


def test_layers_that_match_those_of_the_client_pass(bridge: Any, connect: Any) -> None:
    backend = connect(bridge, aux_layer_ids=(4, 0, 2))
    assert backend.preflight(expect_aux_layer_ids=[4, 0, 2]).has_passed


# --- a target that does not work, and what cannot be measured ---


class Raising(GatedTarget):
    """A target whose forward fails."""

    def __init__(self, inner: Any, error: Exception) -> None:
        super().__init__(inner)
        self.error = error

    def supervise(self, job: Any) -> Any:
        raise self.error


def test_a_forward_that_fails(build_model: Any, serve: Any, connect: Any) -> None:
    inner = TransformersTarget(build_model("llama"), model_id="tiny")
    error = TargetFailed("layer 3 gave non-finite states")
    checks = only(connect(serve(Raising(inner, error))).preflight())
    assert statuses(checks)["failed"] == {"supervision"}
    assert "layer 3 gave non-finite states (request id" in checks["supervision"].detail
    assert checks["encoding"].values["bytes_per_token"] > 0  # it needs no forward
    assert statuses(checks)["skipped"] == {"tokenizer", "bandwidth", "throughput"}


def test_a_busy_server_is_no_failure(build_model: Any, serve: Any, connect: Any) -> None:
    inner = TransformersTarget(build_model("llama"), model_id="tiny")
    report = connect(serve(Raising(inner, QueueFull("64 requests wait")))).preflight()
    assert report.has_passed
    assert only(report)["supervision"].status == "unknown"
    assert "64 requests wait" in only(report)["supervision"].detail


def test_without_server_timing_nothing_is_invented(bridge: Any, connect: Any) -> None:
    def strip(request: httpx.Request) -> httpx.Response:
        response = bridge.handle_request(request)
        response.headers.pop(SERVER_TIMING_HEADER, None)
        return response

    checks = only(connect(httpx.MockTransport(strip)).preflight())
    assert "could not be measured" in checks["bandwidth"].detail
    assert checks["bandwidth"].values.get("bytes_per_s") is None
    assert statuses(checks)["unknown"] == {"bandwidth", "throughput"}


def test_limits_of_the_server_are_honoured(build_model: Any, serve: Any, connect: Any) -> None:
    """Positions, tokens a request, and bytes in flight, which it cannot know beforehand."""
    asked: list[int] = []
    for family, limits in (
        ("gpt2", {}),
        ("llama", {"max_tokens_per_request": 5}),
        ("llama", {"max_bytes_in_flight": 300_000}),
    ):
        bridge = serve(build_model(family), **limits)

        def watch(request: httpx.Request, bridge: Any = bridge) -> httpx.Response:
            response: httpx.Response = bridge.handle_request(request)
            if request.url.path == SUPERVISION_PATH:
                asked.append(response.status_code)
            return response

        report = connect(httpx.MockTransport(watch)).preflight()
        assert report.has_passed, str(report)
        assert only(report)["supervision"].status == "ok"
    assert asked.count(413) == 1  # the last one's larger request, after which the small one counts


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"supervised_share": 0}, "supervised_share"),
        ({"supervised_share": 1.1}, "supervised_share"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"time_limit_s": float("nan")}, "time_limit_s"),
        ({"draft_vocab_size": 0}, "draft_vocab_size"),
        ({"tokenizer": "gpt2"}, "get_vocab"),
    ],
)
def test_slips_are_refused(connect: Any, bridge: Any, arguments: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        connect(bridge).preflight(**arguments)
