"""What describes packed rows: checked against a loop, and refused by the rule it breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.packing import (
    Document,
    check_packing,
    check_seq_lens,
    documents_of,
    restarting_positions,
)

SEQ_LENS = torch.tensor([[3, 4, 2], [9, 0, 0], [1, 0, 8]])
POSITIONS = [
    [0, 1, 2, 0, 1, 2, 3, 0, 1],
    [0, 1, 2, 3, 4, 5, 6, 7, 8],
    [0, 0, 1, 2, 3, 4, 5, 6, 7],
]


def test_positions_restart_in_each_document() -> None:
    assert restarting_positions(SEQ_LENS, 9).tolist() == POSITIONS


def test_documents_are_named_in_order() -> None:
    assert documents_of(SEQ_LENS) == [
        Document(0, 0, 3), Document(0, 3, 4), Document(0, 7, 2), Document(1, 0, 9),
        Document(2, 0, 1), Document(2, 1, 8),
    ]  # fmt: skip


def given(**changes: Any) -> dict[str, Any]:
    ones = torch.ones(3, 9, dtype=torch.int64)
    return {
        "input_ids": ones,
        "attention_mask": ones,
        "position_ids": torch.tensor(POSITIONS),
        "seq_lens": SEQ_LENS,
        "doc_remaining": ones,
    } | changes


def test_a_right_description_is_taken() -> None:
    check_packing(**given())
    check_packing(**given(doc_remaining=None))
    check_packing(**given(position_ids=None, seq_lens=None, doc_remaining=None))
    check_packing(**given(seq_lens=SEQ_LENS.int(), position_ids=torch.tensor(POSITIONS).int()))
    padded = torch.ones(3, 9)
    padded[0, 2] = padded[0, 8] = padded[1, 4:] = 0  # at the ends of documents
    check_packing(**given(attention_mask=padded))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_lens": None}, r"position_ids .*need seq_lens"),
        ({"seq_lens": None, "position_ids": None}, r"doc_remaining .*need seq_lens"),
        ({"position_ids": None}, r"need position_ids \[B, T\] that restart"),
        ({"position_ids": torch.tensor(POSITIONS)[:, :8]}, r"position_ids must have the shape"),
        ({"doc_remaining": torch.ones(3, 8)}, r"doc_remaining must have the shape"),
        ({"position_ids": torch.arange(9).expand(3, 9)}, r"got 3 instead of 0 at row 0, column 3"),
        ({"seq_lens": SEQ_LENS.float()}, "integers"),
        ({"seq_lens": SEQ_LENS[0]}, r"B = 3 .*got shape \[3\]"),
        ({"seq_lens": SEQ_LENS[:2]}, r"got shape \[2, 3\]"),
        ({"seq_lens": SEQ_LENS[:, :0]}, "at least one document"),
        ({"seq_lens": torch.tensor([[3, 4, 2], [8, 0, 0], [1, 0, 8]])}, r"sum 8\) in row 1"),
        ({"seq_lens": torch.tensor([[3, 4, 2], [9, 0, 0], [-1, 2, 8]])}, r"in row 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        check_packing(**given(**changes))


def test_padding_inside_a_document_is_refused() -> None:
    """What is computed does not depend on the mask, so a token after it would attend to it."""
    attended = torch.ones(3, 9)
    attended[0, 4] = 0
    with pytest.raises(InvalidRequest, match="row 0, column 4, and a token"):
        check_seq_lens(SEQ_LENS, attended)
