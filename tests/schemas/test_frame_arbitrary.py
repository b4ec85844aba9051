"""Anything at all as a frame: only this project's errors come out, and only whole frames."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import msgpack
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.schemas.hostile import (
    VALID,
    ZEROS,
    fields,
    forge,
)

from eagle3_schemas.errors import (
    RemoteEagle3Error,
)
from eagle3_schemas.frame import decode
from eagle3_schemas.messages import SupervisionRequest, parse
from eagle3_schemas.tensors import DTYPES

PROPERTY = settings()  # the profile of tests/conftest.py


def decode_or_refuse(body: bytes) -> None:
    """Decode both ways; only this project's errors may come out, and only whole frames."""
    for verify in (True, False):
        try:
            frame = decode(body, verify=verify)
        except RemoteEagle3Error:
            continue
        assert sum(tensor.nbytes for tensor in frame.tensors.values()) <= len(body)
        assert all(isinstance(name, str) for name in (*frame.fields, *frame.tensors))
        try:
            parse(SupervisionRequest, frame.fields)
        except RemoteEagle3Error:
            continue


@PROPERTY
@given(st.binary(max_size=300))
@example(b"E3RF")
def test_arbitrary_bytes_only_raise_typed_errors(body: bytes) -> None:
    decode_or_refuse(body)
    decode_or_refuse(b"E3RF\1\0" + body)


@PROPERTY
@given(st.binary(max_size=200), st.binary(max_size=100))
def test_arbitrary_headers_only_raise_typed_errors(header: bytes, payload: bytes) -> None:
    decode_or_refuse(forge(header, payload))
    decode_or_refuse(fields(header))


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=8)
)
def test_mutated_frames_with_a_right_crc_only_raise_typed_errors(
    changes: list[tuple[int, int]],
) -> None:
    body = bytearray(VALID)
    for position, value in changes:
        body[position] = value
    length = struct.unpack_from("<I", body, 8)[0]
    struct.pack_into("<I", body, 12, zlib.crc32(body[24 : 24 + length]))
    decode_or_refuse(bytes(body))


def numbers() -> st.SearchStrategy[int]:
    edges = [0, 1, 63, 64, 65, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)]
    return st.integers(0, 8) | st.sampled_from(edges)


ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | numbers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
ANY_ROW = (
    st.tuples(
        st.sampled_from(["a", "b", ""]),
        st.sampled_from(sorted(DTYPES)),
        st.lists(numbers(), max_size=4),
        numbers(),
        numbers(),
        st.lists(numbers(), min_size=2, max_size=2),
    ).map(list)
    | ANY_VALUE
)


def rows_that_nearly_fit() -> Iterator[st.SearchStrategy[list[Any]]]:
    """Rows whose length is what their shape needs, so that the later checks are reached."""
    for name, dtype in sorted(DTYPES.items()):
        yield st.builds(
            lambda shape, offset, name=name, size=dtype.itemsize: [
                "abc"[len(shape) % 3],
                name,
                shape,
                offset,
                torch.Size(shape).numel() * size,
                ZEROS,
            ],
            st.lists(st.integers(0, 5), max_size=4),
            st.sampled_from([0, 64, 128]),
        )


@PROPERTY
@given(
    st.lists(ANY_ROW | st.one_of(*rows_that_nearly_fit()), max_size=3),
    st.dictionaries(st.text(max_size=4), ANY_VALUE, max_size=3),
    st.integers(0, 200),
)
def test_arbitrary_tensor_tables_only_raise_typed_errors(
    rows: list[Any], values: dict[str, Any], payload: int
) -> None:
    decode_or_refuse(forge(msgpack.packb([values, rows]), bytes(payload)))


@PROPERTY
@given(ANY_VALUE)
def test_arbitrary_values_as_a_header_only_raise_typed_errors(value: Any) -> None:
    decode_or_refuse(forge(msgpack.packb(value)))
