"""What a frame must be, spelt out from the definition."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import msgpack
import torch


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes in row-major order, so that NaNs and -0.0 compare too."""
    row_major = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytes(row_major.reshape(-1).view(torch.uint8).tolist())


def assert_same(got: Mapping[str, torch.Tensor], sent: Mapping[str, torch.Tensor]) -> None:
    assert list(got) == list(sent)
    for name, tensor in sent.items():
        assert got[name].dtype is tensor.dtype
        assert got[name].shape == tensor.shape
        assert raw(got[name]) == raw(tensor)


def reference_checksum(data: bytes) -> list[int]:
    """From docs/protocol.md, in plain Python."""
    data += bytes(-len(data) % 8)
    words = [word for (word,) in struct.iter_unpack("<Q", data)]
    weighted = sum(index * word for index, word in enumerate(words, 1))
    return [sum(words) % 2**64, weighted % 2**64]


def reference_frame(
    fields: dict[str, Any], tensors: list[tuple[str, str, list[int], bytes]]
) -> bytes:
    """From docs/protocol.md, independently of the package: struct, msgpack and zlib alone."""
    table, segments = [], b""
    for name, dtype, shape, data in tensors:
        segments += bytes(-len(segments) % 64)
        table.append([name, dtype, shape, len(segments), len(data), reference_checksum(data)])
        segments += data
    header = msgpack.packb([fields, table])
    padding = bytes(-(24 + len(header)) % 64)
    total = 24 + len(header) + len(padding) + len(segments)
    prelude = struct.pack("<4sHHIIQ", b"E3RF", 1, 0, len(header), zlib.crc32(header), total)
    return prelude + header + padding + segments
