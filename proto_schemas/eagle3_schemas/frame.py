"""Message <-> framed bytes; the only module that knows msgpack. See docs/protocol.md.

A frame is a 24-byte prelude, a msgpack header, and one raw segment per tensor, each segment aligned
to 64 bytes from the start of the frame. There is one valid byte string for a message: padding is
zero, segments stand in table order without gaps, and every byte is covered by the header's CRC or
by a segment's checksum, so that a flipped bit anywhere is found.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import msgpack
import torch

from eagle3_schemas.errors import LimitExceeded, MalformedPayload, ProtocolMismatch
from eagle3_schemas.protocol import PROTOCOL_VERSION
from eagle3_schemas.tensors import (
    DTYPE_NAMES,
    DTYPES,
    Checksum,
    byte_view,
    checksum,
    from_flat_bytes,
)

MAGIC: Final = b"E3RF"
ALIGNMENT: Final = 64
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_TENSORS: Final = 32
MAX_RANK: Final = 8

_PRELUDE: Final = struct.Struct("<4sHHIIQ")  # magic, version, 0, header length, header CRC, total
_ZEROS: Final = memoryview(bytes(ALIGNMENT))


@dataclass(frozen=True)
class Frame:
    """A decoded message: plain fields, and tensors that are views of the received body."""

    fields: dict[str, Any]  # msgpack values; the message models validate them
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class EncodedFrame:
    """A frame as consecutive views, ready to be sent without joining them."""

    parts: list[memoryview]
    nbytes: int

    def to_bytes(self) -> bytes:
        """Join the parts: one copy, for small bodies and tests."""
        return b"".join(self.parts)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def encode(
    fields: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    checksums: Mapping[str, Checksum] | None = None,
) -> EncodedFrame:
    """Encode a message as views of its tensors; contiguous CPU tensors are not copied.

    Args:
        fields: msgpack-able values.
        tensors: CPU tensors of any rank and any dtype of the table. Do not change them while the
            parts are in use.
        checksums: checksums already taken where the tensors were computed; the others are taken
            here.

    Raises:
        ValueError: a tensor is not on the CPU, or of a dtype outside the table.
        LimitExceeded: more tensors, dimensions or header bytes than a frame may have.
    """
    if len(tensors) > MAX_TENSORS:
        raise LimitExceeded(f"a frame holds at most {MAX_TENSORS} tensors; got {len(tensors)}")
    table: list[list[Any]] = []
    views: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: dtype {tensor.dtype} is not one of {list(DTYPES)}")
        if tensor.ndim > MAX_RANK:
            raise LimitExceeded(f"tensor {name!r}: at most {MAX_RANK} axes; got {tensor.ndim}")
        view = byte_view(tensor.detach().contiguous())
        given = None if checksums is None else checksums.get(name)
        sums = checksum(tensor) if given is None else given
        start = _aligned(end)
        end = start + view.nbytes
        table.append(
            [name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), start, view.nbytes, list(sums)]
        )
        views.append(view)
    header = msgpack.packb([dict(fields), table])
    if len(header) > MAX_HEADER_BYTES:
        raise LimitExceeded(f"a header has at most {MAX_HEADER_BYTES} bytes; got {len(header)}")
    payload_start = _aligned(_PRELUDE.size + len(header))
    nbytes = payload_start + end
    prelude = _PRELUDE.pack(MAGIC, PROTOCOL_VERSION, 0, len(header), zlib.crc32(header), nbytes)
    padding = bytes(payload_start - _PRELUDE.size - len(header))
    parts = [memoryview(prelude + header + padding)]
    position = 0
    for view in views:
        gap = _aligned(position) - position
        if gap:
            parts.append(_ZEROS[:gap])
        if view.nbytes:
            parts.append(view)
        position += gap + view.nbytes
    return EncodedFrame(parts, nbytes)


def decode(body: bytes | bytearray | memoryview | torch.Tensor, *, verify: bool = True) -> Frame:
    """Decode a frame; its tensors are views of `body` unless that is read-only bytes.

    Every length is checked against the body before anything is built from it, so hostile bytes
    cost no memory beyond their own.

    Args:
        body: the whole frame; a 1-D uint8 CPU tensor or a writable buffer is not copied.
        verify: also check each segment's checksum, and that bools are 0 or 1.

    Raises:
        ValueError: `body` is a tensor that is not 1-D uint8, contiguous, on the CPU and aligned to
            8 bytes within its storage.
        ProtocolMismatch: another protocol version. Upgrade the older side.
        MalformedPayload: anything else that is not exactly one valid frame.
    """
    data = _as_tensor(body)
    view = byte_view(data)
    if view.nbytes < _PRELUDE.size:
        raise MalformedPayload(f"expected at least {_PRELUDE.size} bytes; got {view.nbytes}")
    magic, version, reserved, header_length, header_crc, nbytes = _PRELUDE.unpack_from(view)
    if magic != MAGIC:
        raise MalformedPayload(f"expected a frame that starts with {MAGIC!r}; got {magic!r}")
    if version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"expected protocol version {PROTOCOL_VERSION}; got {version}. Upgrade the older side"
        )
    if nbytes != view.nbytes:
        raise MalformedPayload(f"the frame says it has {nbytes} bytes; got {view.nbytes}")
    if header_length > MAX_HEADER_BYTES:
        raise MalformedPayload(f"header of {header_length} bytes; at most {MAX_HEADER_BYTES}")
    header_end = _PRELUDE.size + header_length
    payload_start = _aligned(header_end)
    if reserved or payload_start > nbytes or any(view[header_end:payload_start]):
        raise MalformedPayload("reserved bits or padding are not zero, or the header overruns")
    header = view[_PRELUDE.size : header_end]
    if zlib.crc32(header) != header_crc:
        raise MalformedPayload("the header's CRC does not match: its bytes changed on the way")
    fields, table = _unpack_header(header)
    tensors: dict[str, torch.Tensor] = {}
    end = 0
    for row in table:
        entry = _TensorEntry.parse(row)
        if entry.name in tensors:
            raise MalformedPayload(f"tensor {entry.name!r} appears twice")
        start = _aligned(end)
        if entry.offset != start or payload_start + start + entry.nbytes > nbytes:
            raise MalformedPayload(
                f"tensor {entry.name!r}: segment [{entry.offset}, +{entry.nbytes}) does not follow "
                f"the one before it at {start}, or overruns the {nbytes}-byte frame"
            )
        if any(view[payload_start + end : payload_start + start]):
            raise MalformedPayload(f"padding before tensor {entry.name!r} is not zero")
        end = start + entry.nbytes
        segment = data[payload_start + start : payload_start + end]
        if verify and checksum(segment) != entry.sums:
            raise MalformedPayload(
                f"tensor {entry.name!r}: checksum mismatch, its bytes changed on the way"
            )
        tensors[entry.name] = from_flat_bytes(segment, entry.dtype, entry.shape)
        if entry.dtype is torch.bool and verify and bool((segment > 1).any()):
            raise MalformedPayload(f"tensor {entry.name!r}: a bool is neither 0 nor 1")
    if payload_start + end != nbytes:
        raise MalformedPayload(f"{nbytes - payload_start - end} bytes follow the last segment")
    return Frame(fields, tensors)


def _as_tensor(body: bytes | bytearray | memoryview | torch.Tensor) -> torch.Tensor:
    if isinstance(body, torch.Tensor):
        if body.dtype is not torch.uint8 or body.ndim != 1:
            raise ValueError(f"expected a 1-D uint8 tensor, got {body.dtype} {tuple(body.shape)}")
        if body.storage_offset() % 8:  # torch cannot view wider dtypes there
            raise ValueError(
                "expected a tensor that starts at a multiple of 8 bytes of its storage, got offset "
                f"{body.storage_offset()}"
            )
        return body
    if len(body) == 0:
        return torch.empty(0, dtype=torch.uint8)
    if memoryview(body).readonly:  # torch would hand out tensors that write into immutable bytes
        body = bytearray(body)
    return torch.frombuffer(body, dtype=torch.uint8)


def _unpack_header(header: memoryview) -> tuple[dict[str, Any], list[Any]]:
    try:
        value = msgpack.unpackb(
            header,
            strict_map_key=True,
            # Counts are bounded because msgpack allocates a container before it reads it.
            max_array_len=256,
            max_map_len=256,
            max_ext_len=0,
            ext_hook=_refuse_extension,  # one of no bytes passes the limit
            object_pairs_hook=_mapping,
        )
    except Exception as exc:  # msgpack raises ValueError, UnicodeDecodeError and its own kinds
        raise MalformedPayload(f"the header is not valid msgpack: {type(exc).__name__}") from exc
    match value:
        case [dict() as fields, list() as table] if len(table) <= MAX_TENSORS:
            return fields, table
    raise MalformedPayload(f"expected a header [fields, table of at most {MAX_TENSORS} tensors]")


def _mapping(pairs: list[tuple[object, Any]]) -> dict[object, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs) or not all(isinstance(key, str) for key in mapping):
        raise ValueError("map keys must be distinct strings")
    return mapping


def _refuse_extension(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _is_count(value: object, bits: int = 63) -> bool:
    return type(value) is int and 0 <= value < 1 << bits  # `type is`: a bool is no count


@dataclass(frozen=True)
class _TensorEntry:
    """One row of the tensor table, checked."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sums: Checksum

    @classmethod
    def parse(cls, row: Sequence[Any]) -> _TensorEntry:
        match row:
            case [
                str(name),
                str(dtype_name),
                list(shape),
                int(offset),
                int(nbytes),
                [int(plain), int(weighted)],
            ]:
                pass
            case _:
                raise MalformedPayload(
                    "expected a tensor row [name, dtype, shape, offset, length, [sum, weighted]]"
                )
        if dtype_name not in DTYPES:
            raise MalformedPayload(f"tensor {name!r}: unknown dtype {dtype_name!r}")
        if len(shape) > MAX_RANK or not all(map(_is_count, (*shape, offset, nbytes))):
            raise MalformedPayload(f"tensor {name!r}: shape, offset and length must be counts")
        if not _is_count(plain, 64) or not _is_count(weighted, 64):
            raise MalformedPayload(f"tensor {name!r}: its checksum must be two unsigned words")
        dtype = DTYPES[dtype_name]
        if prod(shape) * dtype.itemsize != nbytes:
            raise MalformedPayload(
                f"tensor {name!r}: {dtype_name} {shape} needs {prod(shape) * dtype.itemsize} "
                f"bytes, its segment has {nbytes}"
            )
        if (
            prod(max(extent, 1) for extent in shape) >= 1 << 60
        ):  # 0 x huge: torch's strides overflow
            raise MalformedPayload(f"tensor {name!r}: {shape} is a shape no tensor can have")
        return cls(name, dtype, tuple(shape), offset, nbytes, (plain, weighted))
