"""What is wrong with a batch is said by type and in words, and the server serves on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.server.bad_requests.frames import DRAFT_IDS, VOCAB_SIZE

from eagle3_client import (
    InvalidRequest,
    LimitExceeded,
    ProtocolMismatch,
    Unauthorized,
    VocabMappingMissing,
)

# --- what the client refuses before it sends anything ---


@pytest.mark.parametrize(
    ("break_it", "error", "words"),
    [
        (lambda x: replace(x, loss_mask=x.loss_mask[:, 1:]), InvalidRequest, "loss_mask"),
        (lambda x: replace(x, attention_mask=x.attention_mask[1:]), InvalidRequest, "attention_ma"),
        (lambda x: replace(x, input_ids=x.input_ids[0]), InvalidRequest, r"\[B, T\]"),
        (lambda x: replace(x, input_ids=x.input_ids.float()), InvalidRequest, "integers"),
        (lambda x: replace(x, input_ids=x.input_ids + (1 << 40)), InvalidRequest, "int32"),
        (lambda x: replace(x, input_ids=x.input_ids[:0]), InvalidRequest, ">= 1"),
    ],
    ids=["short-loss-mask", "fewer-rows", "one-dimension", "float-ids", "huge-ids", "empty"],
)
def test_shapes_and_dtypes_are_refused_where_they_are_passed(
    bridge: Any, connect: Any, batch_of: Any, serves_on: Any, break_it: Any, error: Any, words: str
) -> None:
    backend = connect(bridge, DRAFT_IDS)
    inputs = break_it(batch_of(VOCAB_SIZE))
    for call in (backend.generate_batch, backend.generate_batch_async):
        with pytest.raises(error, match=words):
            call(*inputs)
    serves_on()


@pytest.mark.parametrize("name", ["position_ids", "seq_lens", "doc_remaining"])
def test_one_of_the_packing_tensors_alone_is_refused(
    bridge: Any, connect: Any, batch_of: Any, name: str
) -> None:
    inputs = batch_of(VOCAB_SIZE)
    with pytest.raises(InvalidRequest, match=r"seq_lens.*got none"):
        connect(bridge, DRAFT_IDS).generate_batch(*inputs, **{name: inputs.input_ids})


def test_a_batch_before_any_mapping_is_refused(bridge: Any, connect: Any, batch_of: Any) -> None:
    backend = connect(bridge)
    for call in (backend.generate_batch, backend.generate_batch_async):
        with pytest.raises(VocabMappingMissing, match="call set_vocab_mapping first"):
            call(*batch_of(VOCAB_SIZE))


# --- what only the server can know, seen through the client ---


@pytest.mark.parametrize("bad_id", [-1, VOCAB_SIZE, 2_000_000_000])
@pytest.mark.parametrize("where", ["token", "padding"])
def test_token_ids_out_of_range_are_refused(
    bridge: Any, connect: Any, batch_of: Any, serves_on: Any, bad_id: int, where: str
) -> None:
    inputs = batch_of(VOCAB_SIZE)
    inputs.input_ids[inputs.attention_mask == (where == "token")] = bad_id
    with pytest.raises(InvalidRequest, match=rf"\[0, {VOCAB_SIZE}\).*{bad_id}"):
        connect(bridge, DRAFT_IDS).generate_batch(*inputs)
    serves_on()


@pytest.mark.parametrize(
    "bad", [(0, 1), (0, 1, 1), (0, 1, 7), (-1, 0, 1), (0, 1, 2, 3), ()], ids=str
)
def test_bad_aux_layer_ids_are_refused(
    bridge: Any, connect: Any, batch_of: Any, serves_on: Any, bad: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidRequest, match=r"3 distinct ids in \[0, 7\)"):
        connect(bridge, DRAFT_IDS, aux_layer_ids=bad).generate_batch(*batch_of(VOCAB_SIZE))
    serves_on()


def test_a_batch_over_the_token_limit_is_refused(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    backend = connect(serve(build_model("llama"), max_tokens_per_request=29), DRAFT_IDS)
    with pytest.raises(LimitExceeded, match=r"29 tokens.*3 x 10 = 30") as caught:
        backend.generate_batch(*batch_of(VOCAB_SIZE))
    assert caught.value.attempts == 1
    backend.generate_batch(*batch_of(VOCAB_SIZE, (9, 4)))


def test_a_body_over_the_byte_limit_is_refused(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    backend = connect(serve(build_model("llama"), max_body_bytes=1024), DRAFT_IDS)
    with pytest.raises(LimitExceeded, match=r"1024 bytes \(max_body_bytes\)"):
        backend.generate_batch(*batch_of(VOCAB_SIZE, (300,)))
    backend.generate_batch(*batch_of(VOCAB_SIZE))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_sequence_longer_than_the_learned_positions_is_refused(
    family: str, build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    backend = connect(serve(build_model(family)), DRAFT_IDS)
    assert backend.model_info().limits.max_sequence_length == 16
    with pytest.raises(LimitExceeded, match="16 learned positions; got sequences of 17"):
        backend.generate_batch(*batch_of(VOCAB_SIZE, (17, 3)))
    backend.generate_batch(*batch_of(VOCAB_SIZE, (16, 3)))


def test_rotary_models_have_no_such_limit(bridge: Any, connect: Any) -> None:
    assert connect(bridge).model_info().limits.max_sequence_length is None


def test_a_shallow_target_needs_its_layers_named(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    model = build_model("llama")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    bridge = serve(model)
    with pytest.raises(InvalidRequest, match=r"only 4 decoder layers.*name three aux_layer_ids"):
        connect(bridge, DRAFT_IDS).generate_batch(*batch_of(VOCAB_SIZE))
    named = connect(bridge, DRAFT_IDS, aux_layer_ids=(0, 3, 1))
    assert named.generate_batch(*batch_of(VOCAB_SIZE)).aux_hidden_states.shape == (3, 10, 144)


@pytest.mark.parametrize("token", [None, "wrong", ""], ids=["none", "wrong", "empty"])
def test_a_wrong_token_is_refused(
    build_model: Any, serve: Any, connect: Any, token: str | None
) -> None:
    bridge = serve(build_model("llama"), token="right, also-right")
    with pytest.raises(Unauthorized, match="EAGLE3_TOKEN"):
        connect(bridge, token=token).model_info()
    for good in ("right", "also-right"):
        connect(bridge, token=good).model_info()
    connect(bridge, token=token).wait_until_ready(0)  # health and readiness need none


def test_a_path_the_server_does_not_have_is_another_protocol(bridge: Any, connect: Any) -> None:
    with pytest.raises(ProtocolMismatch, match="/elsewhere/v1/model is not a path"):
        connect(bridge, urls="http://target/elsewhere").model_info()
