"""Hostile bytes: every one a typed error, raised by the check meant for it, at no cost of memory.

Headers forged here carry a right CRC, so that the check behind it is the one that fires.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eagle3_schemas.errors import (
    MalformedPayload,
    ProtocolMismatch,
    RemoteEagle3Error,
)
from eagle3_schemas.frame import MAX_HEADER_BYTES, MAX_TENSORS, Frame, decode, encode
from eagle3_schemas.messages import SupervisionRequest, parse
from eagle3_schemas.tensors import DTYPES

PROPERTY = settings()  # the profile of tests/conftest.py

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


def test_the_forging_helpers_build_valid_frames() -> None:
    """Else the cases below would be refused for the helpers' mistakes."""
    assert decode(forge(EMPTY_HEADER)) == Frame({}, {})
    assert decode(fields(b"\x81\xa1a\x01")) == Frame({"a": 1}, {})
    decoded = decode(table(row("x"), row("y", offset=64), payload=TWO_SEGMENTS)).tensors
    assert {name: tensor.tolist() for name, tensor in decoded.items()} == {
        "x": [0, 0, 0, 0],
        "y": [0, 0, 0, 0],
    }


# --- damage on the way ---


def test_every_prefix_of_a_frame_is_malformed() -> None:
    for length in range(len(VALID)):
        error = refused(VALID[:length])
        assert type(error) is MalformedPayload
        expected = "expected at least 24 bytes" if length < 24 else "the frame says it has"
        assert error.detail.startswith(expected)


def test_every_flipped_bit_is_found() -> None:
    for position in range(len(VALID)):
        for bit in range(8):
            damaged = bytearray(VALID)
            damaged[position] ^= 1 << bit
            expected = ProtocolMismatch if position in (4, 5) else MalformedPayload
            assert type(refused(damaged)) is expected, (position, bit)


def test_every_flipped_byte_is_found() -> None:
    for position in range(len(VALID)):
        damaged = bytearray(VALID)
        damaged[position] ^= 0xFF
        refused(damaged)


@PROPERTY
@given(st.data())
def test_bytes_cut_out_or_put_in_are_found(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(VALID)))
    cut = data.draw(st.integers(0, len(VALID) - start))
    inserted = data.draw(st.binary(max_size=80))
    damaged = VALID[:start] + inserted + VALID[start + cut :]
    if damaged != VALID:
        refused(damaged)


# --- lies ---


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
    "timestamp without bytes": (fields(b"\x81\xa1a\xc7\x00\xff"), "invalid timestamp"),
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


@pytest.mark.parametrize(("body", "message"), CASES.values(), ids=CASES)
def test_a_lie_is_malformed_and_the_error_says_which(body: bytes, message: str) -> None:
    with pytest.raises(MalformedPayload, match=message):
        decode(body)


@pytest.mark.parametrize(("body", "reason"), MSGPACK_CASES.values(), ids=MSGPACK_CASES)
def test_the_msgpack_error_is_chained_and_no_attempt_to_allocate(body: bytes, reason: str) -> None:
    """A limit refused the header, not the machine's lack of memory or stack."""
    cause = refused(body).__cause__
    assert isinstance(cause, ValueError)
    assert reason in str(cause)


@pytest.mark.parametrize("version", [0, 2, 0xFFFF])
def test_another_version_is_a_protocol_mismatch_that_says_what_to_do(version: int) -> None:
    """Even if nothing after the version can be read: the other side may lay it out otherwise."""
    body = forge(EMPTY_HEADER, version=version, reserved=7, length=2**32 - 1, crc=1, total=5)
    with pytest.raises(ProtocolMismatch, match=f"expected protocol version 1; got {version}. Upg"):
        decode(body)


@pytest.mark.parametrize("extent", [2**59, 2**59 + 1])
@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_the_largest_shapes_of_nothing_that_are_let_through_are_real(
    extent: int, dtype: str
) -> None:
    body = table(row(dtype=dtype, shape=[0, extent], length=0))
    assert decode(body).tensors["x"].shape == (0, extent)


# --- memory ---


def test_hostile_bytes_cost_little_memory() -> None:
    """The bound: lists of 256 entries nested 1024 deep, which is how deep msgpack goes."""
    for name, (body, _) in CASES.items():
        refused(body)  # messages and regular expressions are built once
        tracemalloc.start()
        refused(body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20, f"{name}: {peak} bytes"


CHILD = """
import resource, sys, warnings
import msgpack, torch
from eagle3_schemas.errors import RemoteEagle3Error
from eagle3_schemas.frame import decode
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    valid, *bodies = msgpack.unpackb(file.read())
decode(valid)
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20),) * 2)
try:
    bytearray(80 << 20)
except MemoryError:
    pass
else:
    raise SystemExit("the limit does not hold")
for body in bodies:
    try:
        decode(body)
    except RemoteEagle3Error as error:
        if isinstance(error.__cause__, MemoryError):
            raise
    else:
        raise SystemExit("accepted a hostile body")
decode(valid)
print(len(bodies))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_hostile_bytes_allocate_nothing_outside_python_either(tmp_path: Path) -> None:
    """A process that may map 64 MiB more refuses them all, so neither torch nor msgpack tried."""
    bodies = tmp_path / "bodies"
    bodies.write_bytes(msgpack.packb([VALID, *(body for body, _ in CASES.values())]))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(bodies)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(len(CASES))), done.stderr


# --- anything at all ---


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
