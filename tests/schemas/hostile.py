"""Forged frames: helpers that build them with a right CRC, and the table of lies."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack
import pytest
import torch

from eagle3_schemas.errors import (
    RemoteEagle3Error,
)
from eagle3_schemas.frame import MAX_HEADER_BYTES, MAX_TENSORS, decode, encode

ZEROS = [0, 0]  # the checksum of zero bytes, however many


def forge(header: bytes, payload: bytes = b"", **prelude: Any) -> bytes:
    """Build a frame around any header bytes; keywords override what the prelude says."""
    padding = bytes(-(24 + len(header)) % 64)
    values = {
        "magic": b"E3RF",
        "version": 1,
        "reserved": 0,
        "length": len(header),
        "crc": zlib.crc32(header),
        "total": 24 + len(header) + len(padding) + len(payload),
        **prelude,
    }
    return struct.pack("<4sHHIIQ", *values.values()) + header + padding + payload


def table(*rows: Any, payload: bytes = b"") -> bytes:
    """Build a frame with these rows as its tensor table."""
    return forge(msgpack.packb([{}, list(rows)]), payload)


def row(
    name: Any = "x",
    dtype: Any = "uint8",
    shape: Any = (4,),
    offset: Any = 0,
    length: Any = 4,
    sums: Any = ZEROS,
) -> list[Any]:
    return [name, dtype, shape, offset, length, sums]


def fields(packed: bytes) -> bytes:
    """Build a frame without tensors whose fields are these msgpack bytes."""
    return forge(b"\x92" + packed + b"\x90")


def refused(body: bytes | bytearray) -> RemoteEagle3Error:
    """Return the typed error a body is refused with; anything else fails the test."""
    with pytest.raises(RemoteEagle3Error) as caught:
        decode(body)
    return caught.value


VALID = encode(
    {"request_id": "r-1", "n": 3},
    {
        "a": torch.tensor([1.5, -2.0, 0.0], dtype=torch.bfloat16),
        "none": torch.empty(0, 2),
        "b": torch.tensor([True, False, True]),
    },
).to_bytes()
EMPTY_HEADER = msgpack.packb([{}, []])
FOUR = bytes(4)
TWO_SEGMENTS = FOUR + bytes(60) + FOUR


DEEP_LISTS = b"\x91" * (MAX_HEADER_BYTES - 1) + b"\x90"
DEEP_MAPS = b"\x81\xa1a" * (MAX_HEADER_BYTES // 3) + b"\xc0"
HUGE = b"\xff\xff\xff\xff"

PRELUDE_CASES = {
    "no bytes": (b"", "expected at least 24 bytes; got 0"),
    "another magic": (forge(EMPTY_HEADER, magic=b"E3RG"), "starts with b'E3RF'; got b'E3RG'"),
    "shorter than it says": (forge(EMPTY_HEADER, total=65), "says it has 65 bytes; got 64"),
    "longer than it says": (forge(EMPTY_HEADER, total=63), "says it has 63 bytes; got 64"),
    "total of all ones": (forge(EMPTY_HEADER, total=2**64 - 1), "says it has 18446744073709551615"),
    "bytes after the frame": (forge(EMPTY_HEADER) + b"\0", "says it has 64 bytes; got 65"),
    "header over the limit": (
        forge(bytes(MAX_HEADER_BYTES + 1)),
        "header of 65537 bytes; at most 65536",
    ),
    "header length of all ones": (
        forge(EMPTY_HEADER, length=2**32 - 1),
        "header of 4294967295 bytes; at most 65536",
    ),
    "header overruns the frame": (
        forge(EMPTY_HEADER, length=MAX_HEADER_BYTES),
        "the header overruns",
    ),
    "no padding after the header": (
        forge(EMPTY_HEADER, total=24 + len(EMPTY_HEADER))[: 24 + len(EMPTY_HEADER)],
        "the header overruns",
    ),
    "reserved bits": (forge(EMPTY_HEADER, reserved=1), "reserved bits or padding are not zero"),
    "padding after the header": (
        forge(EMPTY_HEADER)[:-1] + b"\1",
        "reserved bits or padding are not zero",
    ),
    "CRC": (forge(EMPTY_HEADER, crc=0), "the header's CRC does not match"),
    "no header": (forge(b""), "not valid msgpack"),
}

MSGPACK_CASES = {
    "truncated header": (forge(EMPTY_HEADER[:-1]), "incomplete input"),
    "bytes after the header's value": (forge(EMPTY_HEADER + b"\0"), "extra data"),
    "reserved msgpack byte": (forge(b"\xc1"), ""),
    "text that is not UTF-8": (fields(b"\x81\xa1a\xa1\xff"), "invalid start byte"),
    "key that is not UTF-8": (fields(b"\x81\xa1\xff\xc0"), "invalid start byte"),
    "integer key": (fields(b"\x81\x01\x02"), "int is not allowed for map key"),
    "bytes key": (fields(b"\x81\xc4\x01a\xc0"), "map keys must be distinct strings"),
    "key of an inner map": (fields(b"\x81\xa1a\x81\xc4\x01a\xc0"), "map keys must be distinct"),
    "repeated key": (fields(b"\x82\xa1a\x01\xa1a\x02"), "map keys must be distinct strings"),
    "extension": (fields(b"\x81\xa1a\xd4\x05a"), "exceeds max_ext_len"),
    "extension without bytes": (fields(b"\x81\xa1a\xc7\x00\x05"), "extension type 5"),
    "timestamp": (fields(b"\x81\xa1a\xd6\xff\0\0\0\0"), "exceeds max_ext_len"),
    "timestamp without bytes": (fields(b"\x81\xa1a\xc7\x00\xff"), ""),  # older msgpack: other words
    "huge extension": (fields(b"\x81\xa1a\xc9" + HUGE + b"\x05"), "exceeds max_ext_len"),
    "deeply nested lists": (forge(DEEP_LISTS), ""),
    "deeply nested maps": (forge(DEEP_MAPS), ""),
    "huge list": (forge(b"\xdd" + HUGE), "4294967295 exceeds max_array_len"),
    "huge map": (forge(b"\xdf" + HUGE), "4294967295 exceeds max_map_len"),
    "huge text": (forge(b"\xdb" + HUGE), "incomplete input"),
    "huge bytes": (forge(b"\xc6" + HUGE), "incomplete input"),
    "list of 2**24": (forge(b"\xdd\1\0\0\0"), "16777216 exceeds max_array_len"),
    "map of 2**24": (forge(b"\xdf\1\0\0\0"), "16777216 exceeds max_map_len"),
    "long list": (forge(b"\xdc\x04\x01" + bytes(1025)), "1025 exceeds max_array_len"),
    "long map": (forge(b"\xde\x01\x01" + bytes(514)), "257 exceeds max_map_len"),
    "huge lists in huge lists": (
        forge(b"\xdc\xff\xff" * (MAX_HEADER_BYTES // 3)),
        "65535 exceeds max_array_len",
    ),
    "huge maps in huge maps": (
        forge(b"\xde\xff\xff\xa1a" * (MAX_HEADER_BYTES // 5)),
        "65535 exceeds max_map_len",
    ),
    "long lists in long lists": (forge(b"\xdc\x04\x00" * (MAX_HEADER_BYTES // 3)), ""),
    "long maps in long maps": (forge(b"\xde\x01\x00\xa1a" * (MAX_HEADER_BYTES // 5)), ""),
}

SHAPE_OF_HEADER = r"expected a header \[fields, table of at most 32 tensors\]"
STRUCTURE_CASES = {
    "a map at the top": msgpack.packb({"a": 1}),
    "a number at the top": msgpack.packb(1),
    "nothing at the top": msgpack.packb(None),
    "fields alone": msgpack.packb([{}]),
    "a third entry": msgpack.packb([{}, [], []]),
    "fields in a list": msgpack.packb([[], []]),
    "a table in a map": msgpack.packb([{}, {}]),
    "too many tensors": msgpack.packb(
        [{}, [row(str(i), shape=[0], length=0) for i in range(MAX_TENSORS + 1)]]
    ),
}

ROW = r"expected a tensor row \[name, dtype, shape, offset, length, \[sum, weighted\]\]"
COUNTS = "tensor 'x': shape, offset and length must be counts"
WORDS = "tensor 'x': its checksum must be two unsigned words"
ROW_CASES = {
    "row is a number": (table(1), ROW),
    "row is text": (table("xyzxyz"), ROW),
    "row is a map": (table({"name": "x"}), ROW),
    "row is short": (table(row()[:-1]), ROW),
    "row is long": (table([*row(), 0]), ROW),
    "name is bytes": (table(row(b"x")), ROW),
    "name is a number": (table(row(1)), ROW),
    "dtype is a number": (table(row(dtype=1)), ROW),
    "shape is a number": (table(row(shape=4)), ROW),
    "shape is text": (table(row(shape="4")), ROW),
    "offset is a float": (table(row(offset=0.0)), ROW),
    "offset is null": (table(row(offset=None)), ROW),
    "length is a float": (table(row(length=4.0)), ROW),
    "length is text": (table(row(length="4")), ROW),
    "one sum": (table(row(sums=[0])), ROW),
    "three sums": (table(row(sums=[0, 0, 0])), ROW),
    "sums are floats": (table(row(sums=[0.0, 0.0])), ROW),
    "sums are null": (table(row(sums=None)), ROW),
    "unknown dtype": (table(row(dtype="complex64")), "unknown dtype 'complex64'"),
    "dtype of another spelling": (table(row(dtype="torch.uint8")), "unknown dtype 'torch.uint8'"),
    "dtype without a name": (table(row(dtype="")), "unknown dtype ''"),
    "negative extent": (table(row(shape=[-4])), COUNTS),
    "two negative extents": (table(row(shape=[-2, -2])), COUNTS),
    "extent of 2**63": (table(row(shape=[2**63, 0], length=0)), COUNTS),
    "extent is a bool": (table(row(shape=[True, 4])), COUNTS),
    "extent is a float": (table(row(shape=[4.0])), COUNTS),
    "extent is a list": (table(row(shape=[[4]])), COUNTS),
    "nine axes": (table(row(shape=[1] * 8 + [4])), COUNTS),
    "negative offset": (table(row(offset=-64)), COUNTS),
    "offset of 2**63": (table(row(offset=2**63)), COUNTS),
    "offset is a bool": (table(row(offset=False), payload=FOUR), COUNTS),
    "negative length": (table(row(length=-4)), COUNTS),
    "length of 2**64 - 1": (table(row(length=2**64 - 1)), COUNTS),
    "length is a bool": (table(row(shape=[1], length=True), payload=b"\0"), COUNTS),
    "negative sum": (table(row(sums=[-1, 0]), payload=FOUR), WORDS),
    "sum is a bool": (table(row(sums=[0, False]), payload=FOUR), WORDS),
    "shape needs more bytes": (table(row(shape=[5]), payload=FOUR), "needs 5 bytes, its segment"),
    "shape needs fewer bytes": (table(row(shape=[3]), payload=FOUR), "needs 3 bytes, its segment"),
    "dtype needs more bytes": (table(row(dtype="int64"), payload=FOUR), "needs 32 bytes"),
    "shape of an empty segment": (table(row(length=0)), "needs 4 bytes, its segment has 0"),
    "shape overflows 64 bits": (table(row(shape=[2**32] * 4, length=0)), "needs 3402823669209384"),
    "zero times a huge extent": (
        table(row(shape=[0, 2**62], length=0)),
        "a shape no tensor can have",
    ),
    "zero times huge extents": (
        table(row(shape=[2**40, 0, 2**40], length=0)),
        "a shape no tensor can have",
    ),
}

FOLLOW = "does not follow the one before it at {}, or overruns"
SEGMENT_CASES = {
    "overlap": (table(row("a"), row("b"), payload=FOUR), FOLLOW.format(64)),
    "gap of a block": (
        table(row("a"), row("b", offset=128), payload=bytes(132)),
        FOLLOW.format(64),
    ),
    "gap before the first": (table(row(offset=64), payload=bytes(68)), FOLLOW.format(0)),
    "other order": (table(row("a", offset=64), row("b"), payload=TWO_SEGMENTS), FOLLOW.format(0)),
    "not aligned": (table(row("a"), row("b", offset=4), payload=bytes(8)), FOLLOW.format(64)),
    "offset outside the frame": (table(row(offset=2**62), payload=FOUR), FOLLOW.format(0)),
    "no segment at all": (table(row()), FOLLOW.format(0)),
    "segment longer than the frame": (
        table(row(shape=[2**50], length=2**50), payload=FOUR),
        FOLLOW.format(0),
    ),
    "second segment cut off": (
        table(row("a"), row("b", offset=64), payload=TWO_SEGMENTS[:-1]),
        FOLLOW.format(64),
    ),
    "empty tensor beyond the end": (
        table(row("a"), row("b", shape=[0], offset=64, length=0), payload=FOUR),
        FOLLOW.format(64),
    ),
    "same name twice": (
        table(row("x"), row("x", offset=64), payload=TWO_SEGMENTS),
        "tensor 'x' appears twice",
    ),
    "padding between segments": (
        table(row("a"), row("b", offset=64), payload=FOUR + b"\1" + bytes(63)),
        "padding before tensor 'b' is not zero",
    ),
    "bytes after the last segment": (table(row(), payload=bytes(5)), "1 bytes follow the last"),
    "block after the last segment": (table(row(), payload=bytes(64)), "60 bytes follow the last"),
    "bytes without a tensor": (table(payload=bytes(64)), "64 bytes follow the last segment"),
    "sum": (table(row(sums=[1, 0]), payload=FOUR), "tensor 'x': checksum mismatch"),
    "weighted sum": (table(row(sums=[0, 1]), payload=FOUR), "tensor 'x': checksum mismatch"),
    "sums of 2**64 more": (
        table(row(sums=[2**64 - 1, 0]), payload=FOUR),
        "tensor 'x': checksum mismatch",
    ),
    "bool of 2": (
        table(
            row(dtype="bool", sums=[0x02000001, 0x02000001]),
            payload=b"\1\0\0\2",
        ),
        "a bool is neither 0 nor 1",
    ),
}

CASES: dict[str, tuple[bytes, str]] = {
    **PRELUDE_CASES,
    **{name: (body, "not valid msgpack") for name, (body, _) in MSGPACK_CASES.items()},
    **{name: (forge(header), SHAPE_OF_HEADER) for name, header in STRUCTURE_CASES.items()},
    **ROW_CASES,
    **SEGMENT_CASES,
}
