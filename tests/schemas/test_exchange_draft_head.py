"""A draft vocab's head through a real frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eagle3_schemas import DraftVocab
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.exchange import (
    unpack_draft_head,
)
from eagle3_schemas.frame import decode, encode

DIGEST = "ab" * 32
H = 4
CPU = torch.device("cpu")


VOCAB = DraftVocab.from_ids(torch.tensor([7, 2, 5]))
HEAD_FIELDS: dict[str, Any] = {
    "fingerprint": "f",
    "draft_vocab_digest": VOCAB.digest,
    "upcast": True,
    "multiply": 0.5,
    "divide": None,
    "softcap": 30.0,
}


def draft_head(tensors: dict[str, torch.Tensor], **changes: Any) -> DraftHead:
    frame = decode(encode({**HEAD_FIELDS, **changes}, tensors).to_bytes())
    return unpack_draft_head(frame, VOCAB, CPU)


@pytest.mark.parametrize("bias", [None, torch.tensor([3.0, 4.0, 5.0])], ids=["no-bias", "bias"])
def test_a_draft_head_survives_a_frame(bias: torch.Tensor | None) -> None:
    weight = torch.arange(3.0 * H).reshape(3, H)
    got = draft_head({"weight": weight} | ({} if bias is None else {"bias": bias}))
    assert got.draft_vocab_size == 3
    assert got.transform == LogitsTransform(True, 0.5, None, 30.0)
    assert torch.equal(got.weight[:3], weight)
    assert (got.bias is None) == (bias is None)
    assert bias is None or torch.equal(got.bias[:3], bias)


WEIGHT = torch.zeros(3, H)


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({}, {}, r"expected weight \[3, H\] .*got None"),
        ({"weight": torch.zeros(4, H)}, {}, r"got \[4, 4\]"),
        ({"weight": torch.zeros(3)}, {}, r"got \[3\]"),
        ({"weight": WEIGHT, "bias": torch.zeros(4)}, {}, r"expected bias \[3\] .*got \[4\]"),
        ({"weight": WEIGHT, "bias": torch.zeros(3).bfloat16()}, {}, "got .*bfloat16"),
        ({"weight": WEIGHT}, {"draft_vocab_digest": DIGEST}, "got that of abab"),
        ({"weight": WEIGHT}, {"softcap": "30"}, "softcap"),
        ({"weight": WEIGHT}, {"scale": 2.0}, "scale"),
    ],
)
def test_a_draft_head_that_is_not_the_one_asked_for_is_refused(
    tensors: dict[str, torch.Tensor], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        draft_head(tensors, **fields)
