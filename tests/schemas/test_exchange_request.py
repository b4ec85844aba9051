"""A request through a real frame: padding left out, everything put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.frame import Frame, decode
from eagle3_schemas.messages import SupervisionRequest, parse
from eagle3_schemas.tokens import TokenBatch, check_batch_shapes, unpack_tokens

PROPERTY = settings()  # the profile of tests/conftest.py
DIGEST = "ab" * 32
FIELDS: dict[str, Any] = {"request_id": "req-1", "draft_vocab_digest": DIGEST}
H, D = 4, 3
CPU = torch.device("cpu")


def bits(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


@st.composite
def token_batches(draw: st.DrawFn) -> TokenBatch:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    ids = draw(st.sampled_from([st.integers(-(2**31), 2**31 - 1), st.integers(0, 1)]))

    def grid(values: st.SearchStrategy[Any]) -> torch.Tensor:
        flat = draw(st.lists(values, min_size=batch * length, max_size=batch * length))
        return torch.tensor(flat).reshape(batch, length)

    return TokenBatch(grid(ids).long(), grid(st.booleans()), grid(st.booleans()))


@PROPERTY
@given(token_batches())
def test_any_batch_comes_back_as_it_was(batch: TokenBatch) -> None:
    request, frame = pack_request(batch, **FIELDS)
    received = decode(frame.to_bytes())
    assert parse(SupervisionRequest, received.fields) == request
    back = unpack_tokens(request, received)
    for name in ("input_ids", "attention_mask", "loss_mask"):
        sent, got = getattr(batch, name), getattr(back, name)
        assert got.dtype is sent.dtype
        assert torch.equal(got, sent)


PADDED = TokenBatch(
    input_ids=torch.tensor([[9, 9, 5, 6], [7, 8, 2, 9]]),
    attention_mask=bits([[0, 0, 1, 1], [1, 1, 0, 0]]),
    loss_mask=bits([[0, 0, 0, 1], [0, 0, 1, 0]]),
)


def test_ids_travel_only_where_a_mask_is_set_if_the_others_are_one_pad_id() -> None:
    request, frame = pack_request(PADDED, **FIELDS)
    sent = decode(frame.to_bytes()).tensors
    assert request.pad_token_id == 9
    assert (request.batch_size, request.sequence_length) == (2, 4)
    assert sent["input_ids"].dtype is torch.int32
    assert sent["input_ids"].tolist() == [5, 6, 7, 8, 2]
    assert sent["attention_mask"].tolist() == [0b00111100]
    assert sent["loss_mask"].tolist() == [0b01001000]


@pytest.mark.parametrize(
    "batch",
    [
        TokenBatch(torch.tensor([[1, 2, 3]]), bits([[0, 0, 1]]), bits([[0, 0, 1]])),
        TokenBatch(torch.tensor([[1, 2, 3]]), bits([[1, 1, 1]]), bits([[0, 0, 0]])),
    ],
    ids=["two pad ids", "no padding"],
)
def test_without_one_pad_id_every_id_travels(batch: TokenBatch) -> None:
    request, frame = pack_request(batch, **FIELDS)
    assert request.pad_token_id is None
    assert decode(frame.to_bytes()).tensors["input_ids"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
def test_an_id_that_does_not_fit_int32_is_never_wrapped(token: int) -> None:
    batch = TokenBatch(torch.tensor([[token]]), bits([[1]]), bits([[1]]))
    with pytest.raises(InvalidRequest, match="input_ids must fit int32"):
        pack_request(batch, **FIELDS)


def test_a_field_the_request_refuses_is_named_before_anything_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="rows: "):
        pack_request(PADDED, **FIELDS, rows="some")


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            (torch.ones(6).long(), ONES, ONES),
            r"input_ids must be \[B, T\] with B, T >= 1; got shap",
        ),
        ((torch.ones(2, 0).long(), ONES, ONES), r"got shape \[2, 0\]"),
        ((torch.ones(0, 3).long(), ONES, ONES), r"got shape \[0, 3\]"),
        ((ONES, ONES, ONES), "input_ids must be integers; got torch.float32"),
        ((ONES.bool(), ONES, ONES), "input_ids must be integers; got torch.bool"),
        ((ONES.cfloat(), ONES, ONES), "input_ids must be integers; got torch.complex64"),
        (
            (ONES.long(), ONES.T, ONES),
            r"attention_mask must have the shape .*\[2, 3\]; got \[3, 2\]",
        ),
        ((ONES.long(), ONES, ONES[:1]), r"loss_mask must have the shape .*\[2, 3\]; got \[1, 3\]"),
    ],
)
def test_a_batch_of_wrong_shapes_is_refused(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_batch_shapes(*tensors)


REQUEST_TENSORS = {
    "input_ids": torch.tensor([5, 6, 7, 8, 2], dtype=torch.int32),
    "attention_mask": torch.tensor([0b00111100], dtype=torch.uint8),
    "loss_mask": torch.tensor([0b01001000], dtype=torch.uint8),
}
IDS = "input_ids int32, loss_mask uint8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_mask": None}, f"expected tensors attention_mask uint8, {IDS}; got attention_mask"),
        ({"extra": torch.zeros(1)}, "got attention_mask uint8, extra float32, input_ids"),
        ({"input_ids": torch.arange(5)}, "got attention_mask uint8, input_ids int64"),
        ({"loss_mask": torch.ones(8, dtype=torch.bool)}, "loss_mask bool"),
        (
            {"loss_mask": torch.zeros(2, dtype=torch.uint8)},
            r"must be \[1\] bytes of bits; got \[2\]",
        ),
        ({"attention_mask": torch.zeros(1, 1, dtype=torch.uint8)}, r"of bits; got \[1, 1\]"),
        (
            {"input_ids": torch.zeros(4, dtype=torch.int32)},
            r"must be \[5\] for a \[2, 4\] batch.*\[4\]",
        ),
        ({"input_ids": torch.zeros(8, dtype=torch.int32)}, r"pad_token_id=9; got \[8\]"),
    ],
)
def test_a_request_whose_tensors_do_not_fit_its_fields_is_refused(
    changes: dict[str, torch.Tensor | None], message: str
) -> None:
    request, _ = pack_request(PADDED, **FIELDS)
    tensors = {k: v for k, v in {**REQUEST_TENSORS, **changes}.items() if v is not None}
    with pytest.raises(InvalidRequest, match=message):
        unpack_tokens(request, Frame({}, tensors))


def test_a_batch_size_beyond_the_tensors_is_refused_before_it_is_built() -> None:
    lie = parse(SupervisionRequest, {**FIELDS, "batch_size": 1 << 20, "sequence_length": 1 << 24})
    with pytest.raises(InvalidRequest, match=r"must be \[2199023255552\] bytes of bits; got \[1\]"):
        unpack_tokens(lie, Frame({}, REQUEST_TENSORS))
