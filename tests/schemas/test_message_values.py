"""Messages: every field's type and range, and an error that names the field."""

from __future__ import annotations

from typing import Any

import pytest
from tests.schemas.messages import DIGEST, LIMITS, SMALLEST, refused

from eagle3_schemas.messages import (
    DraftHeadFields,
    DraftVocabInfo,
    Limits,
    Message,
    ModelInfo,
    SupervisionRequest,
    SupervisionResponse,
    parse,
)
from eagle3_schemas.self_check import SelfCheck

WRONG_TYPES = [
    (SupervisionRequest, "request_id", 7),
    (SupervisionRequest, "request_id", b"req-1"),
    (SupervisionRequest, "request_id", None),
    (SupervisionRequest, "batch_size", "2"),
    (SupervisionRequest, "batch_size", 2.0),
    (SupervisionRequest, "batch_size", True),
    (SupervisionRequest, "batch_size", None),
    (SupervisionRequest, "sequence_length", True),
    (SupervisionRequest, "sequence_length", 7.0),
    (SupervisionRequest, "sequence_length", [7]),
    (SupervisionRequest, "pad_token_id", False),
    (SupervisionRequest, "pad_token_id", "0"),
    (SupervisionRequest, "draft_vocab_digest", bytes(32)),
    (SupervisionRequest, "aux_layer_ids", 1),
    (SupervisionRequest, "aux_layer_ids", "123"),
    (SupervisionRequest, "aux_layer_ids", {"0": 1}),
    (SupervisionRequest, "aux_layer_ids", [1, True, 3]),
    (SupervisionRequest, "aux_layer_ids", [1, 2.0, 3]),
    (SupervisionRequest, "aux_layer_ids", [1, "2", 3]),
    (SupervisionRequest, "aux_layer_ids", [1, None, 3]),
    (SupervisionRequest, "aux_layer_ids", [[1, 2, 3]]),
    (SupervisionRequest, "encoding", None),
    (SupervisionRequest, "encoding", 0),
    (SupervisionRequest, "rows", None),
    (SupervisionRequest, "aux_dtype", None),
    (SupervisionRequest, "aux_dtype", 8),
    (SupervisionRequest, "exact", 1),
    (SupervisionRequest, "exact", "true"),
    (SupervisionRequest, "exact", None),
    (SupervisionResponse, "aux_layer_ids", None),
    (SupervisionResponse, "fingerprint", 1),
    (SupervisionResponse, "aux_dtype", None),
    (DraftHeadFields, "fingerprint", None),
    (DraftHeadFields, "upcast", 1),
    (DraftHeadFields, "upcast", None),
    (DraftHeadFields, "multiply", "0.0625"),
    (DraftHeadFields, "divide", True),
    (DraftHeadFields, "softcap", [30.0]),
    (DraftVocabInfo, "draft_vocab_size", True),
    (ModelInfo, "protocol_version", "1"),
    (ModelInfo, "hidden_size", True),
    (ModelInfo, "encodings", "probs"),
    (ModelInfo, "head_reason", False),
    (ModelInfo, "hooks", True),
    (SelfCheck, "status", "ok"),
    (SelfCheck, "largest_difference", "0.1"),
    (ModelInfo, "limits", None),
    (ModelInfo, "limits", [1, 2, 3]),
]


@pytest.mark.parametrize(("kind", "name", "value"), WRONG_TYPES)
def test_a_field_of_another_type_is_named(kind: type[Message], name: str, value: Any) -> None:
    """Bools are no integers, and nothing is converted: "2" is not 2."""
    detail = refused(kind, **{name: value})
    assert detail.startswith(f"{kind.__name__} is not valid: {name}")


OUT_OF_RANGE = [
    (SupervisionRequest, "request_id", ""),
    (SupervisionRequest, "request_id", "x" * 65),
    (SupervisionRequest, "request_id", "two words"),
    (SupervisionRequest, "request_id", "line\n"),
    (SupervisionRequest, "request_id", "naïve"),
    (SupervisionRequest, "batch_size", 0),
    (SupervisionRequest, "batch_size", -1),
    (SupervisionRequest, "batch_size", (1 << 20) + 1),
    (SupervisionRequest, "sequence_length", 0),
    (SupervisionRequest, "sequence_length", (1 << 24) + 1),
    (SupervisionRequest, "pad_token_id", 1 << 31),
    (SupervisionRequest, "pad_token_id", -(1 << 31) - 1),
    (SupervisionRequest, "draft_vocab_digest", ""),
    (SupervisionRequest, "draft_vocab_digest", DIGEST[:-1]),
    (SupervisionRequest, "draft_vocab_digest", DIGEST + "0"),
    (SupervisionRequest, "draft_vocab_digest", DIGEST.upper()),
    (SupervisionRequest, "draft_vocab_digest", DIGEST[:-1] + "\n"),
    (SupervisionRequest, "aux_layer_ids", [0] * 257),
    (SupervisionRequest, "encoding", "topk"),
    (SupervisionRequest, "rows", "some"),
    (SupervisionRequest, "aux_dtype", "float8"),
    (SupervisionRequest, "aux_dtype", "bfloat16"),
    (SupervisionResponse, "encoding", "PROBS"),
    (SupervisionResponse, "aux_dtype", ""),
    (DraftHeadFields, "draft_vocab_digest", DIGEST[1:]),
    (DraftVocabInfo, "draft_vocab_size", -1),
    (Limits, "max_body_bytes", -1),
    (Limits, "max_body_bytes", (1 << 40) + 1),
    (ModelInfo, "head", "half"),
]


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE)
def test_a_field_out_of_range_is_named(kind: type[Message], name: str, value: Any) -> None:
    detail = refused(kind, **{name: value})
    assert detail.startswith(f"{kind.__name__} is not valid: {name}: ")


EDGES = [
    ("request_id", "A-z_0.9"),
    ("request_id", "x" * 64),
    ("batch_size", 1 << 20),
    ("sequence_length", 1 << 24),
    ("pad_token_id", -(1 << 31)),
    ("pad_token_id", (1 << 31) - 1),
    ("aux_layer_ids", []),
    ("rows", "loss_mask"),
    ("encoding", "logits"),
    ("encoding", "hidden"),
    ("aux_dtype", "float8_e4m3"),
]


@pytest.mark.parametrize(("name", "value"), EDGES)
def test_the_last_values_in_range_are_let_through(name: str, value: Any) -> None:
    message = parse(SupervisionRequest, {**SMALLEST[SupervisionRequest], name: value})
    assert getattr(message, name) == (tuple(value) if isinstance(value, list) else value)


def test_every_wrong_field_is_named_at_once_and_the_place_inside_it() -> None:
    detail = refused(SupervisionRequest, batch_size=0, aux_layer_ids=[1, "x", 3], rows="some")
    assert "batch_size: " in detail
    assert "aux_layer_ids.1: " in detail
    assert "rows: " in detail
    assert "limits.max_body_bytes: " in refused(ModelInfo, limits={**LIMITS, "max_body_bytes": -1})


def test_an_error_repeats_no_hostile_input() -> None:
    assert len(refused(SupervisionRequest, request_id="x" * 60_000)) < 500
