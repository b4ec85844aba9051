"""Messages: what they carry, what a reader may leave out, and an error that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.schemas.messages import SMALLEST, refused

from eagle3_schemas import PROTOCOL_VERSION
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.inspection import ExpectedToken, InspectedToken, InspectResponse
from eagle3_schemas.messages import (
    Description,
    Message,
    ModelInfo,
    Problem,
    SupervisionRequest,
    parse,
)
from eagle3_schemas.self_check import SelfCheckResponse

PROTOCOL_PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
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
