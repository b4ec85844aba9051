"""`POST /v1/inspect`: what the target expects after each token of a text, told as it is."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server.inspecting.asking import (
    DRAFT_IDS,
    TEXT,
    check,
    inspect,
    oracle,
    problem,
    register,
)
from tests.servers import PATIENCE_S, GatedTarget
from tests.tiny_tokenizer import VOCAB_SIZE, save_tokenizer, save_with_tokenizer

from eagle3_client import RemoteEagle3Backend
from eagle3_server import ServerSettings
from eagle3_server.inspecting import MAX_INSPECT_BODY_BYTES, MAX_INSPECT_TOKENS
from eagle3_server.loading import load_target


def test_each_token_has_what_the_target_expects_after_it(bridge: Any, checkpoint: Path) -> None:
    """Its own row, the last token's included: nothing is shifted into another's place."""
    digest = register(bridge)
    expected = oracle(checkpoint, TEXT, DRAFT_IDS)
    assert {right["in_vocab"] for right in expected} == {True, False}
    assert expected[0]["token"] == "<s>"  # the tokenizer's default, told as it is
    answer = inspect(bridge)
    check(answer, expected, 5)
    document = answer.json()
    assert (document["draft_vocab_digest"], document["draft_vocab_size"]) == (digest, 150)
    assert document["request_id"] == answer.headers["x-request-id"]
    assert document["fingerprint"] == bridge.app_client.get("/v1/model").json()["fingerprint"]
    check(inspect(bridge, top_k=20), expected, 20)
    check(inspect(bridge, "a"), oracle(checkpoint, "a", DRAFT_IDS), 5)


def test_a_text_of_one_token_has_its_row(serve: Any, target: Any, tmp_path: Path) -> None:
    import transformers

    save_tokenizer(tmp_path, begins=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("a")["input_ids"]) == 1
    path = save_with_tokenizer(tmp_path)
    save_tokenizer(path, begins=False)
    bridge = serve(load_target(ServerSettings(model=str(path), device="cpu")), model=str(path))
    register(bridge)
    check(inspect(bridge, "a"), oracle(path, "a", DRAFT_IDS), 5)


def test_the_draft_vocab_used_last_is_meant_unless_one_is_named(
    bridge: Any, checkpoint: Path
) -> None:
    few = torch.tensor([260, 7, 3])
    first, second = register(bridge), register(bridge, few)
    check(inspect(bridge), oracle(checkpoint, TEXT, few), 3)  # has no five
    named = inspect(bridge, draft_vocab_digest=first)
    check(named, oracle(checkpoint, TEXT, DRAFT_IDS), 5)
    assert inspect(bridge).json()["draft_vocab_digest"] == first  # used last, now
    assert second != first


def test_without_a_draft_vocab_there_is_nothing_to_expect_in(bridge: Any) -> None:
    status, words = problem(inspect(bridge))
    assert status == 409
    assert words.startswith("vocab_mapping_missing: no trainer has registered a draft vocab")
    status, words = problem(inspect(bridge, draft_vocab_digest="0" * 64))
    assert status == 409
    assert "000000000000… is not registered" in words


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, f"{MAX_INSPECT_TOKENS} tokens (limit: of this path)"),
        ({"max_tokens_per_request": 9}, "8 tokens (limit: max_tokens_per_request - 1)"),
    ],
)
def test_a_text_may_have_so_many_tokens(
    serve: Any, target: Any, checkpoint: Path, settings: dict[str, int], most: str
) -> None:
    bridge = serve(target, model=str(checkpoint), **settings)
    register(bridge)
    bound = int(most.split()[0])
    answer = inspect(bridge, "a" * (bound - 1), top_k=1)  # and <s>
    assert len(answer.json()["tokens"]) == bound
    status, words = problem(inspect(bridge, "a" * bound))
    assert status == 413
    assert f"a text may have {most}; this one has {bound + 1}" in words


def test_learned_positions_bound_it_too(serve: Any, build_model: Any, checkpoint: Path) -> None:
    model = build_model("gpt2")
    model.resize_token_embeddings(VOCAB_SIZE)
    bridge = serve(model, model=str(checkpoint), aux_layer_ids=(0, 1, 2))
    register(bridge)
    assert len(inspect(bridge, "a" * 15).json()["tokens"]) == 16
    status, words = problem(inspect(bridge, "a" * 16))
    assert status == 413
    assert "16 tokens (limit: the target's learned positions)" in words


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", (400, "malformed_payload: InspectRequest is not valid")),
        (b"{", (400, "malformed_payload: InspectRequest is not valid")),
        (b'{"text": "\\ud800"}', (400, "malformed_payload: InspectRequest is not valid")),
        (b'{"text": "\xff"}', (400, "malformed_payload: InspectRequest is not valid")),
        (b"[1]", (422, "invalid_request: InspectRequest is not valid: message: ")),
        (b'{"text": ""}', (422, "invalid_request: InspectRequest is not valid: text: ")),
        (b'{"text": 1}', (422, "invalid_request: InspectRequest is not valid: text: ")),
        (b'{"text": "a", "top_k": 21}', (422, "invalid_request: InspectRequest is not valid: top")),
        (b'{"text": "a", "top_k": 0}', (422, "invalid_request: InspectRequest is not valid: top")),
        (b'{"text": "a", "more": 1}', (422, "invalid_request: InspectRequest is not valid: more")),
        (
            json.dumps({"text": "a" * MAX_INSPECT_BODY_BYTES}).encode(),
            (413, f"limit_exceeded: a request body may have {MAX_INSPECT_BODY_BYTES} bytes here;"),
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_request_is_refused(bridge: Any, body: bytes, expected: tuple[int, str]) -> None:
    register(bridge)
    headers = {"content-type": "application/json"}
    status, words = problem(bridge.app_client.post("/v1/inspect", content=body, headers=headers))
    assert status == expected[0]
    assert words.startswith(expected[1])


def test_another_media_type_is_refused(bridge: Any) -> None:
    answer = bridge.app_client.post("/v1/inspect", data={"text": "a"})
    assert problem(answer)[0] == 400
    assert "expected content-type application/json" in problem(answer)[1]


def test_it_waits_for_its_turn_and_counts_for_no_trainer(
    serve: Any, target: Any, checkpoint: Path, batch_of: Any
) -> None:
    gated = GatedTarget(target)
    bridge = serve(gated, model=str(checkpoint))
    register(bridge)
    inputs = batch_of(VOCAB_SIZE)

    def status() -> Any:
        return bridge.app_client.get("/v1/status").json()

    with (
        RemoteEagle3Backend("http://target", transport=bridge) as backend,
        ThreadPoolExecutor(1) as pool,
    ):
        mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        mask[DRAFT_IDS] = True
        backend.set_vocab_mapping(DRAFT_IDS, mask)
        pending = backend.generate_batch_async(*inputs)
        gated.wait_until_entered()
        asked = pool.submit(inspect, bridge, "abc")
        while status()["queued_requests"] == 0:
            assert not asked.done()
        # <s>, three bytes, and the document before them.
        assert status()["tokens_in_flight"] == inputs.input_ids.numel() + 5
        gated.gate.set()
        pending.result(PATIENCE_S)
        before = status()
        assert asked.result(PATIENCE_S).status_code == 200
    bridge.wait_until_idle()
    after = status()
    for name in ("tokens", "padding_share", "draft_vocab_coverage", "stages"):
        assert after[name] == before[name] is not None
    assert [client["requests"] for client in after["clients"]] == [1]
    assert after["tokens_in_flight"] == after["bytes_in_flight"] == 0


def test_a_fleets_comparison_is_not_the_draft_vocab_used_last(bridge: Any) -> None:
    digest = register(bridge)
    register(bridge, torch.arange(VOCAB_SIZE))
    assert inspect(bridge).json()["draft_vocab_digest"] == digest


def test_a_position_that_is_not_finite_is_told_in_the_texts_tokens(
    serve: Any, build_model: Any, checkpoint: Path
) -> None:
    model = build_model("llama")
    model.resize_token_embeddings(VOCAB_SIZE)
    bridge = serve(model, model=str(checkpoint))
    register(bridge)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    status, words = problem(inspect(bridge))
    assert status == 500
    assert "a filler is at 0" in words


def test_the_entropy_is_at_most_that_of_the_uniform(bridge: Any) -> None:
    register(bridge)
    for token in inspect(bridge).json()["tokens"]:
        assert 0 < token["next_entropy_nats"] < math.log(150)
