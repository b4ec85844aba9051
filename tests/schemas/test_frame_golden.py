"""The frame's bytes are pinned: what this version writes, and what the page says."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack
import torch
from tests.schemas.frame_oracle import assert_same, reference_checksum, reference_frame

from eagle3_schemas import PROTOCOL_VERSION
from eagle3_schemas.frame import (
    decode,
    encode,
)
from eagle3_schemas.tensors import byte_view

GOLDEN_FIELDS = {"request_id": "golden-1", "rows": None, "exact": False, "ids": [1, 14, 26]}
GOLDEN_TENSORS = {
    "aux": torch.tensor([[1.0, -2.5, 0.0], [3.140625, -0.0, 65280.0]], dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(-1, dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
}
# Changing these bytes breaks every deployed peer: bump PROTOCOL_VERSION in the same change.
GOLDEN_VERSION = 1
GOLDEN_HEX = """
4533524601000000a70000005d2f11f043010000000000009284aa7265717565
73745f6964a8676f6c64656e2d31a4726f7773c0a56578616374c2a369647393
010e1a9496a3617578a862666c6f61743136920203000c92cf40490001079fbf
80cf404900014f1f3f8096a46e6f6e65a7666c6f617433329200044000920000
96a67363616c6172a5696e74363490400892cfffffffffffffffffcfffffffff
ffffffff96a46d61736ba4626f6f6c9103cc800392ce00010001ce0001000100
803f20c00000494000807f470000000000000000000000000000000000000000
0000000000000000000000000000000000000000000000000000000000000000
ffffffffffffffff000000000000000000000000000000000000000000000000
0000000000000000000000000000000000000000000000000000000000000000
010001
"""


def golden() -> bytes:
    return bytes.fromhex("".join(GOLDEN_HEX.split()))


def test_golden_bytes_are_what_this_version_writes() -> None:
    assert PROTOCOL_VERSION == GOLDEN_VERSION
    assert encode(GOLDEN_FIELDS, GOLDEN_TENSORS).to_bytes().hex() == golden().hex()


def test_golden_bytes_decode_to_the_message() -> None:
    frame = decode(golden())
    assert frame.fields == GOLDEN_FIELDS
    assert_same(frame.tensors, GOLDEN_TENSORS)


GOLDEN_PARTS = [
    ("aux", "bfloat16", [2, 3], struct.pack("<6H", 0x3F80, 0xC020, 0, 0x4049, 0x8000, 0x477F)),
    ("none", "float32", [0, 4], b""),
    ("scalar", "int64", [], struct.pack("<q", -1)),
    ("mask", "bool", [3], b"\1\0\1"),
]


def test_golden_bytes_follow_from_the_definition_alone() -> None:
    assert reference_frame(GOLDEN_FIELDS, GOLDEN_PARTS).hex() == golden().hex()


def test_the_protocol_pages_own_code_writes_the_golden_bytes(documented: list[str]) -> None:
    """The page is enough to write a second implementation: its code is one."""
    page: dict[str, Any] = {}
    exec("".join(documented), page)
    assert page["frame"](GOLDEN_FIELDS, GOLDEN_PARTS).hex() == golden().hex()


def test_a_part_of_the_golden_bytes_is_found_where_the_table_says() -> None:
    """One worked row of the layout: the prelude, then the offsets counted from the payload."""
    body = golden()
    magic, version, reserved, header_length, crc, total = struct.unpack_from("<4sHHIIQ", body)
    assert (magic, version, reserved, total) == (b"E3RF", 1, 0, len(body))
    header = body[24 : 24 + header_length]
    assert zlib.crc32(header) == crc
    payload = -(-(24 + header_length) // 64) * 64
    fields, table = msgpack.unpackb(header)
    assert fields == GOLDEN_FIELDS
    for (name, dtype, shape, offset, length, sums), part in zip(table, GOLDEN_PARTS, strict=True):
        data = body[payload + offset : payload + offset + length]
        assert (name, dtype, shape, data) == part
        assert offset % 64 == 0
        assert sums == reference_checksum(data)
    assert byte_view(GOLDEN_TENSORS["aux"]) == GOLDEN_PARTS[0][3]
