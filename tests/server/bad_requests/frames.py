"""A valid supervision request, and the one thing a test wants wrong in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagle3_schemas import DraftVocab
from eagle3_schemas.frame import EncodedFrame, encode
from eagle3_schemas.supervision import pack_bits

VOCAB_SIZE = 131
DRAFT_IDS = torch.tensor([90, 5, 130, 0, 17])
DIGEST = DraftVocab.from_ids(DRAFT_IDS).digest
SHAPE = (2, 9)
COUNT = 18


def frame_of(tensors: dict[str, Tensor | None] | None = None, **fields: Any) -> EncodedFrame:
    """A valid supervision request, with what the test wants otherwise; None leaves a thing out."""
    ones = pack_bits(torch.ones(SHAPE, dtype=torch.bool))
    ids = torch.arange(COUNT, dtype=torch.int32)
    all_tensors = {"input_ids": ids, "attention_mask": ones, "loss_mask": ones, **(tensors or {})}
    all_fields = {
        "request_id": "request-7",
        "batch_size": SHAPE[0],
        "sequence_length": SHAPE[1],
        "draft_vocab_digest": DIGEST,
        **fields,
    }
    return encode(
        {name: value for name, value in all_fields.items() if value is not None},
        {name: tensor for name, tensor in all_tensors.items() if tensor is not None},
    )
