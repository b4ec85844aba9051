"""Hostile bytes: each a typed error, raised by the check meant for it, at no cost of memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schemas.hostile import (
    CASES,
    EMPTY_HEADER,
    MSGPACK_CASES,
    TWO_SEGMENTS,
    VALID,
    fields,
    forge,
    refused,
    row,
    table,
)

from eagle3_schemas.errors import (
    MalformedPayload,
    ProtocolMismatch,
)
from eagle3_schemas.frame import Frame, decode

PROPERTY = settings()  # the profile of tests/conftest.py


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


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="the child limits itself by what only Linux has: RLIMIT_AS and /proc",
)
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
