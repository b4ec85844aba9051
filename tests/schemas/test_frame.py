"""The frame: what goes in comes out, without copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schemas.frame_oracle import assert_same, raw, reference_checksum

from eagle3_schemas.errors import LimitExceeded, MalformedPayload
from eagle3_schemas.frame import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    decode,
    encode,
)
from eagle3_schemas.tensors import DTYPES

PROPERTY = settings()  # the profile of tests/conftest.py


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.permute(tuple(reversed(range(t.ndim)))),
    "every other": lambda t: t[::2] if t.ndim else t,
    "last axis strided": lambda t: t[..., 1::3] if t.ndim else t,
    "without its start": lambda t: t[1:] if t.ndim else t,  # contiguous, at any byte offset
    "expanded": lambda t: t.expand(3, *t.shape) if t.ndim < MAX_RANK else t,
}


@st.composite
def tensors_of_any_layout(draw: st.DrawFn) -> torch.Tensor:
    name = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = DTYPES[name]
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    data = torch.tensor(list(draw(st.binary(min_size=nbytes, max_size=nbytes))), dtype=torch.uint8)
    if dtype is torch.bool:
        data &= 1
    tensor = data.view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](tensor)


FIELD_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@PROPERTY
@given(
    st.dictionaries(st.text(max_size=6), FIELD_VALUES, max_size=4),
    st.dictionaries(st.text(max_size=6), tensors_of_any_layout(), max_size=4),
)
def test_any_message_comes_back_as_it_was(
    fields: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    encoded = encode(fields, tensors)
    body = encoded.to_bytes()
    frame = decode(body)
    assert frame.fields == fields
    assert_same(frame.tensors, tensors)
    assert encoded.nbytes == len(body) == sum(part.nbytes for part in encoded.parts)
    # There is one byte string for a message: nothing of a tensor's layout reaches the wire.
    assert encode(frame.fields, frame.tensors).to_bytes() == body


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0, 2), (7,), (2, 3, 5), (1,) * 8])
def test_every_dtype_travels_in_every_shape(name: str, shape: tuple[int, ...]) -> None:
    values = torch.arange(torch.Size(shape).numel()).remainder(2).reshape(shape).to(DTYPES[name])
    frame = decode(encode({}, {"x": values}).to_bytes())
    assert_same(frame.tensors, {"x": values})


def test_the_empty_message_is_one_frame() -> None:
    body = encode({}, {}).to_bytes()
    assert len(body) == ALIGNMENT
    frame = decode(body)
    assert (frame.fields, frame.tensors) == ({}, {})


def test_as_many_tensors_as_a_frame_may_hold_come_back_in_order() -> None:
    tensors = {f"t{i}": torch.full((i,), i, dtype=torch.int16) for i in range(MAX_TENSORS)}
    assert_same(decode(encode({}, tensors).to_bytes()).tensors, tensors)


def test_a_tensor_that_needs_grad_is_encoded_by_value() -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    decoded = decode(encode({}, {"weight": weight}).to_bytes()).tensors["weight"]
    assert raw(decoded) == raw(weight)
    assert not decoded.requires_grad


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "writable memoryview", "tensor"])
def test_every_kind_of_buffer_decodes_alike(kind: Any) -> None:
    sent = {"a": torch.arange(5), "b": torch.tensor(True)}
    body = encode({"n": 1}, sent).to_bytes()
    if kind == "tensor":
        buffer: Any = torch.tensor(list(body), dtype=torch.uint8)
    elif kind == "writable memoryview":
        buffer = memoryview(bytearray(body))
    else:
        buffer = kind(body)
    assert_same(decode(buffer).tensors, sent)


# --- no copies ---


def test_encoded_parts_are_views_of_the_tensors() -> None:
    first, second = torch.zeros(3, dtype=torch.int32), torch.zeros(8, dtype=torch.float32)
    encoded = encode({}, {"first": first, "second": second})
    first[0], second[-1] = 0x01020304, 1.0
    body = encoded.to_bytes()
    start = len(body) - ALIGNMENT - second.nbytes
    assert body[start : start + first.nbytes] == raw(first)
    assert body[-second.nbytes :] == raw(second)


def test_encoded_parts_keep_their_tensor_alive() -> None:
    tensor = torch.arange(100_000)
    expected = raw(tensor[-8:])
    encoded = encode({}, {"x": tensor})
    del tensor
    torch.zeros(100_000, dtype=torch.int64)  # would take over memory that was freed
    assert encoded.to_bytes()[-64:] == expected


def test_decoded_tensors_are_views_of_a_writable_buffer() -> None:
    body = bytearray(encode({}, {"x": torch.zeros(4, dtype=torch.int32)}).to_bytes())
    tensor = decode(body).tensors["x"]
    body[-4:] = (7).to_bytes(4, "little")
    assert tensor.tolist() == [0, 0, 0, 7]
    tensor[0] = 9
    assert body[-16:-12] == (9).to_bytes(4, "little")


def test_decoded_tensors_are_aligned_views_of_a_received_tensor() -> None:
    body = encode({}, {"a": torch.arange(3), "b": torch.ones(2, 2)}).to_bytes()
    buffer = torch.tensor(list(body), dtype=torch.uint8)
    for tensor in decode(buffer).tensors.values():
        offset = tensor.data_ptr() - buffer.data_ptr()
        assert 0 < offset < len(body)
        assert offset % ALIGNMENT == 0


def test_immutable_bytes_are_never_written_through_a_decoded_tensor() -> None:
    body = encode({}, {"x": torch.zeros(4, dtype=torch.int32)}).to_bytes()
    for buffer in (body, memoryview(body)):
        decode(buffer).tensors["x"].fill_(1)
    assert raw(decode(body).tensors["x"]) == bytes(16)


def test_a_decoded_tensor_outlives_the_callers_buffer() -> None:
    body = bytearray(encode({}, {"x": torch.arange(100_000)}).to_bytes())
    tensor = decode(body).tensors["x"]
    del body
    bytearray(900_000)
    assert int(tensor.sum()) == 99_999 * 50_000


# --- what cannot be encoded, and buffers that are not bodies ---


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"x": torch.zeros(2, dtype=torch.complex64)}, ValueError, "dtype torch.complex64"),
        ({"x": torch.zeros(2, device="meta")}, ValueError, "contiguous CPU tensor, got meta"),
        ({"x": torch.zeros((1,) * 9)}, LimitExceeded, "at most 8 axes; got 9"),
        (
            {str(i): torch.zeros(1) for i in range(MAX_TENSORS + 1)},
            LimitExceeded,
            "at most 32 tensors; got 33",
        ),
        ({"n" * MAX_HEADER_BYTES: torch.zeros(1)}, LimitExceeded, "at most 65536 bytes"),
    ],
    ids=["dtype", "device", "axes", "tensors", "header"],
)
def test_what_a_frame_cannot_hold_is_refused(
    tensors: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        encode({}, tensors)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(64, dtype=torch.int8), "1-D uint8 tensor, got torch.int8"),
        (torch.zeros(2, 64, dtype=torch.uint8), r"1-D uint8 tensor, got torch.uint8 \(2, 64\)"),
        (torch.zeros(128, dtype=torch.uint8)[::2], "contiguous CPU tensor"),
        (torch.zeros(64, dtype=torch.uint8, device="meta"), "contiguous CPU tensor, got meta"),
        (torch.zeros(68, dtype=torch.uint8)[4:], "multiple of 8 bytes of its storage, got offset"),
    ],
    ids=["dtype", "rank", "stride", "device", "alignment"],
)
def test_a_tensor_that_is_no_body_is_the_callers_value_error(
    buffer: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        decode(buffer)
    assert not isinstance(caught.value, MalformedPayload)


# --- checksums from where the tensors were computed ---


def test_a_given_checksum_is_sent_instead_of_taken_again() -> None:
    """A copy that went wrong between computing and encoding must show at the receiver."""
    computed, copied = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    fine = torch.tensor([5])
    sums = reference_checksum(raw(computed))
    body = encode({}, {"fine": fine, "x": copied}, {"x": (sums[0], sums[1])}).to_bytes()
    with pytest.raises(MalformedPayload, match="tensor 'x': checksum mismatch"):
        decode(body)
    good = encode({}, {"fine": fine, "x": computed}, {"x": (sums[0], sums[1])}).to_bytes()
    assert good == encode({}, {"fine": fine, "x": computed}).to_bytes()


def test_without_verification_only_the_segments_bytes_go_unchecked() -> None:
    body = bytearray(encode({}, {"x": torch.tensor([1, 2])}).to_bytes())
    body[-1] ^= 0x40
    assert decode(body, verify=False).tensors["x"].tolist() == [1, 2 + (0x40 << 56)]
    body[30] ^= 1
    with pytest.raises(MalformedPayload, match="header's CRC"):
        decode(body, verify=False)
