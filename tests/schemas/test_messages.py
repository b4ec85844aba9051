"""Messages: every field checked, and an error that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from eagle3_schemas import PROTOCOL_VERSION
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.inspection import ExpectedToken, InspectedToken, InspectRequest, InspectResponse
from eagle3_schemas.messages import (
    Description,
    DraftHeadFields,
    DraftVocabInfo,
    Limits,
    Message,
    ModelInfo,
    Problem,
    SupervisionRequest,
    SupervisionResponse,
    parse,
)
from eagle3_schemas.self_check import SelfCheck, SelfCheckResponse

PROTOCOL_PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
DIGEST = "0123456789abcdef" * 4

LIMITS = {"max_tokens_per_request": 65536, "max_sequence_length": None, "max_body_bytes": 1 << 30}
SMALLEST: dict[type[Message], dict[str, Any]] = {
    SupervisionRequest: {
        "request_id": "req-1",
        "batch_size": 2,
        "sequence_length": 7,
        "draft_vocab_digest": DIGEST,
    },
    SupervisionResponse: {
        "request_id": "req-1",
        "fingerprint": "f" * 32,
        "draft_vocab_digest": DIGEST,
        "aux_layer_ids": [1, 2, 4],
        "encoding": "probs",
        "rows": "all",
        "aux_dtype": "model",
    },
    DraftHeadFields: {
        "fingerprint": "f" * 32,
        "draft_vocab_digest": DIGEST,
        "upcast": True,
        "multiply": 0.0625,
        "divide": None,
        "softcap": 30.0,
    },
    Limits: LIMITS,
    DraftVocabInfo: {"digest": DIGEST, "draft_vocab_size": 11},
    ModelInfo: {
        "protocol_version": 1,
        "server_version": "0.1.0",
        "model_id": "Qwen/Qwen3-8B",
        "revision": None,
        "architecture": "Qwen3ForCausalLM",
        "fingerprint": "f" * 32,
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "vocab_size": 151936,
        "input_vocab_size": 151936,
        "dtype": "bfloat16",
        "device": "cuda:0",
        "device_name": "a GPU",
        "attn_implementation": "sdpa",
        "torch_version": "2.13.0",
        "num_threads": 2,
        "aux_layer_ids": [1, 17, 32],
        "aux_layer_convention": "layer_output",
        "head": "full",
        "head_reason": "no output embeddings",
        "encodings": ["probs", "logits"],
        "limits": LIMITS,
    },
    InspectRequest: {"text": "tea"},
    SelfCheck: {"name": "hooks", "status": "not_applicable", "words": "not comparable"},
}
WHOLE_REQUEST = {
    **SMALLEST[SupervisionRequest],
    "pad_token_id": -1,
    "aux_layer_ids": [0, 3, 1],
    "encoding": "hidden",
    "rows": "loss_mask",
    "aux_dtype": "float8_e4m3",
    "exact": True,
}
# A server of this version sends these; a reader of this version does without.
HAVE_A_DEFAULT = {(ModelInfo, "protocol_version"), (ModelInfo, "head_reason")}


def refused(kind: type[Message], **changes: Any) -> str:
    """Return the error's text for a message whose fields are changed; None drops nothing."""
    with pytest.raises(InvalidRequest) as caught:
        parse(kind, {**SMALLEST[kind], **changes})
    return caught.value.detail


@pytest.mark.parametrize("kind", SMALLEST, ids=lambda kind: kind.__name__)
def test_a_message_survives_json_and_a_frame(kind: type[Message]) -> None:
    message = parse(kind, SMALLEST[kind])
    assert parse(kind, json.loads(message.model_dump_json())) == message
    assert parse(kind, decode(encode(message.model_dump(), {}).to_bytes()).fields) == message


def test_a_request_with_every_field_set_survives_a_frame() -> None:
    message = parse(SupervisionRequest, WHOLE_REQUEST)
    assert message.aux_layer_ids == (0, 3, 1)
    assert {name: getattr(message, name) for name in WHOLE_REQUEST if name != "aux_layer_ids"} == {
        name: value for name, value in WHOLE_REQUEST.items() if name != "aux_layer_ids"
    }
    for dumped in (message.model_dump(), message.model_dump(exclude_defaults=True)):
        frame = decode(encode(dumped, {"input_ids": torch.arange(3)}).to_bytes())
        assert parse(SupervisionRequest, frame.fields) == message


def test_a_request_of_today_needs_only_four_fields() -> None:
    message = parse(SupervisionRequest, SMALLEST[SupervisionRequest])
    assert (message.pad_token_id, message.aux_layer_ids) == (None, None)
    assert (message.encoding, message.rows, message.exact) == ("probs", "position_mask", False)
    assert message.aux_dtype == "model"


def test_model_info_states_the_protocol_version_by_itself() -> None:
    fields = dict(SMALLEST[ModelInfo])
    del fields["protocol_version"]
    assert parse(ModelInfo, fields).protocol_version == PROTOCOL_VERSION


@pytest.mark.parametrize(
    "kind",
    [*SMALLEST, InspectResponse, InspectedToken, ExpectedToken, SelfCheckResponse],
    ids=lambda kind: kind.__name__,
)
def test_the_protocol_page_describes_every_field(kind: type[Message]) -> None:
    page = PROTOCOL_PAGE.read_text("utf-8")
    for name in kind.model_fields:
        assert f"`{name}`" in page or f'"{name}"' in page, name


@pytest.mark.parametrize("kind", SMALLEST, ids=lambda kind: kind.__name__)
def test_an_unknown_field_is_named_but_in_what_describes(kind: type[Message]) -> None:
    """A newer server may tell more of itself; an option or a number must not be passed over."""
    if issubclass(kind, Description):
        assert parse(kind, {**SMALLEST[kind], "rowz": "all"}) == parse(kind, SMALLEST[kind])
    else:
        assert f"{kind.__name__} is not valid: rowz: " in refused(kind, rowz="all")


def test_many_and_long_unknown_fields_are_told_in_few_words() -> None:
    """They are logged, and the request is the sender's."""
    kind = next(iter(SMALLEST))
    words = refused(kind, **{f"{number}{'x' * 9000}": 1 for number in range(50)})
    assert words.endswith("; and 42 more")
    assert len(words) < 1500


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, fields in SMALLEST.items()
        for name in fields
        if (kind, name) not in HAVE_A_DEFAULT
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_missing_field_is_named(kind: type[Message], name: str) -> None:
    fields = dict(SMALLEST[kind])
    del fields[name]
    with pytest.raises(InvalidRequest, match=f"{kind.__name__} is not valid: {name}: Field requir"):
        parse(kind, fields)


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


@pytest.mark.parametrize("value", [[], None, "text", 3, [["batch_size", 2]], ["x"] * 10_000])
def test_a_body_that_is_no_map_is_an_invalid_request(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="ModelInfo must be a map of fields; got ") as caught:
        parse(ModelInfo, value)
    assert len(caught.value.detail) < 200


def test_messages_are_frozen() -> None:
    message = parse(SupervisionRequest, SMALLEST[SupervisionRequest])
    with pytest.raises(ValidationError, match="frozen"):
        message.batch_size = 3  # type: ignore[misc]


def test_a_problem_of_tomorrow_or_of_someone_else_is_read_as_far_as_known() -> None:
    """RFC 9457 lets a document carry more members and leave any out."""
    assert Problem.model_validate({"code": "queue_full", "instance": "/x"}).code == "queue_full"
    empty = Problem.model_validate({})
    assert (empty.code, empty.detail, empty.status, empty.request_id) == (None, "", 0, None)
