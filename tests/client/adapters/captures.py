"""Captures laid out by hand from documents, and heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.capture import Capture
from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.target_head import FinalNorm, NormForm, TargetHead

# All different, so that a transposed axis fails.
HIDDEN_SIZE, NUM_AUX, VOCAB_SIZE = 5, 2, 23
EPS = 1e-5

Document = dict[str, Tensor]
"""A document as speculators' datasets have it: one entry a token, nothing shifted."""


def make_documents(lengths: list[int], seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "hidden_states": torch.randn(n, NUM_AUX * HIDDEN_SIZE, generator=generator),
            "verifier_last_hidden_states": torch.randn(n, HIDDEN_SIZE, generator=generator),
            "input_ids": torch.randint(1, VOCAB_SIZE, (n,), generator=generator),
            "loss_mask": torch.randint(0, 2, (n,), generator=generator),
        }
        for n in lengths
    ]


def capture_of(
    rows: list[list[Document]], length: int, *, left: bool = False, packed: bool = False
) -> Capture:
    """Lay documents out as a capture of them has them: ids and loss mask shifted in each row.

    What is not attended holds noise, which must reach no result.
    """
    shape = len(rows), length
    generator = torch.Generator().manual_seed(99)
    tokens = {
        "hidden_states": torch.randn(*shape, NUM_AUX * HIDDEN_SIZE, generator=generator),
        "verifier_last_hidden_states": torch.randn(*shape, HIDDEN_SIZE, generator=generator),
        "input_ids": torch.full(shape, 7),
        "loss_mask": torch.ones(shape, dtype=torch.int64),
    }
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    seq_lens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, documents in enumerate(rows):
        count = sum(len(document["input_ids"]) for document in documents)
        column = length - count if left else 0
        for number, document in enumerate(documents):
            n = len(document["input_ids"])
            attention_mask[row, column : column + n] = 1
            for name, tensor in tokens.items():
                tensor[row, column : column + n] = document[name]
            seq_lens[row, number] = n
            column += n
        seq_lens[row, len(documents) - 1] += length - count
    return Capture(
        {
            "aux": tokens["hidden_states"],
            "last_hidden_prenorm": tokens["verifier_last_hidden_states"],
        },
        (1, 4),
        shift_left_with_zero(tokens["input_ids"]),
        attention_mask,
        shift_left_with_zero(tokens["loss_mask"]),
        seq_lens=seq_lens if packed else None,
    )


def make_head(**changes: Any) -> TargetHead:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    gain = torch.randn(HIDDEN_SIZE, generator=generator)
    norm = FinalNorm(NormForm("rms", EPS, False), gain, None)
    return replace(TargetHead(weight, None, LogitsTransform(), norm), **changes)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
