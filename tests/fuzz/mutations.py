"""Frames that are nearly right: damaged bytes, and well-formed frames with wrong content."""

from __future__ import annotations

import os
import random
from typing import Any

import msgpack
import torch
from tests.server.bad_requests.frames import COUNT, DIGEST, SHAPE

from eagle3_schemas.frame import encode
from eagle3_schemas.supervision import pack_bits

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 18, 1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 63, -(1 << 62),
    0.5, float("nan"), float("inf"), "", "x", "probs", "hidden", "logits", "all", "loss_mask",
    DIGEST,
    "f" * 64, "\0", "é" * 300, b"", b"\xff" * 100, [], [1, 2, 3], [0, 0, 0], [1, 2, 99], [[1]], {},
    {"a": 1}, list(range(300)),
]  # fmt: skip
FIELDS: dict[str, Any] = {
    "request_id": "request-7", "batch_size": SHAPE[0], "sequence_length": SHAPE[1],
    "draft_vocab_digest": DIGEST, "pad_token_id": None, "aux_layer_ids": [1, 2, 3],
    "encoding": "probs", "rows": "position_mask", "aux_dtype": "model", "exact": False,
}  # fmt: skip
CAPTURE_FIELDS: dict[str, Any] = {
    "request_id": "request-7", "batch_size": SHAPE[0], "sequence_length": SHAPE[1],
    "draft_vocab_digest": DIGEST, "pad_token_id": None, "aux_layer_ids": [1, 2], "exact": False,
    "outputs": ["aux", "loss_mask_probs", "argmax"],
}  # fmt: skip
DTYPES = [
    torch.int32, torch.int64, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.int8,
]  # fmt: skip


def fields_of(random: random.Random) -> dict[str, Any]:
    """Those of a request for supervision, or of one for a capture."""
    return random.choice((FIELDS, CAPTURE_FIELDS))


def tensors_of(random: random.Random) -> dict[str, torch.Tensor]:
    """The tensors of a valid request, with random ids and masks."""
    masks = [torch.tensor([random.random() < 0.8 for _ in range(COUNT)]) for _ in range(2)]
    ids = torch.tensor([random.randrange(131) for _ in range(COUNT)], dtype=torch.int32)
    return {
        "input_ids": ids,
        "attention_mask": pack_bits(masks[0].view(SHAPE)),
        "loss_mask": pack_bits(masks[1].view(SHAPE)),
    }


def wrong_content(random: random.Random) -> bytes:
    """A well-formed frame, checksums and all, with up to three things in it changed."""
    fields, tensors = dict(fields_of(random)), tensors_of(random)
    for _ in range(random.randrange(4)):
        name = random.choice(list(fields))
        match random.randrange(6):
            case 0:
                fields[name] = random.choice(VALUES)
            case 1:
                del fields[name]
            case 2:
                fields[random.choice(["x", "seq_lens", ""])] = random.choice(VALUES)
            case 3:
                shape = [random.choice([0, 1, 2, 3, 9, 18, 19]) for _ in range(random.randrange(4))]
                which = random.choice(list(tensors) or ["input_ids"])
                tensors[which] = torch.zeros(shape).to(random.choice(DTYPES))
            case 4:
                tensors.pop(random.choice(list(tensors) or [""]), None)
            case 5:
                value = random.choice([-1, 130, 131, 2**31 - 1, -(2**31)])
                tensors["input_ids"] = torch.full((COUNT,), value, dtype=torch.int32)
        if not fields:
            break
    try:
        return encode(fields, tensors).to_bytes()
    except (ValueError, OverflowError, TypeError):  # msgpack has no integer that large
        return encode({}, tensors).to_bytes()


def damaged(frame: bytes, random: random.Random) -> bytes:
    """The same bytes with something of them changed, cut, repeated or added."""
    body = bytearray(frame)
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(body) + 1)
        match random.randrange(5):
            case 0 if body:
                body[at % len(body)] ^= 1 << random.randrange(8)
            case 1 if body:
                body[at % len(body)] = random.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFF))
            case 2:
                del body[at : at + random.randrange(1, 64)]
            case 3:
                body[at:at] = random.randbytes(random.randrange(1, 64))
            case 4:
                body[at:at] = body[at : at + random.randrange(1, 64)]
    return bytes(body)


def resealed(random: random.Random) -> bytes:
    """A prelude whose lengths and CRC are right around a header of any msgpack."""
    import struct
    import zlib

    header = msgpack.packb(
        [random.choice(VALUES), [random.choice(VALUES) for _ in range(random.randrange(4))]]
        if random.random() < 0.5
        else random.choice(VALUES)
    )
    if random.random() < 0.5:
        header = damaged(header, random)
    header = header[:60000]
    payload = bytes(-(24 + len(header)) % 64) + random.randbytes(random.choice((0, 8, 64, 200)))
    nbytes = 24 + len(header) + len(payload)
    return (
        struct.pack("<4sHHIIQ", b"E3RF", 1, 0, len(header), zlib.crc32(header), nbytes)
        + header
        + payload
    )


def nearly_right(random: random.Random) -> bytes:
    """One input: half of them mutations of valid frames, the rest wrong content or noise."""
    match random.randrange(8):
        case 0 | 1 | 2 | 3:
            return damaged(encode(fields_of(random), tensors_of(random)).to_bytes(), random)
        case 4 | 5:
            return wrong_content(random)
        case 6:
            return resealed(random)
        case _:
            return random.randbytes(random.randrange(300))


def how_many(in_short: int, name: str) -> int:
    """The number of inputs: small, unless `make soak` says otherwise."""
    return int(os.environ.get(name, in_short))


def seed_of(name: str) -> int:
    """The same inputs every time, unless `make soak` wants others."""
    return int(os.environ.get(name, 0))
