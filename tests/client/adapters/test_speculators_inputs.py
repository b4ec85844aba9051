"""speculators' arguments against a slow loop from its `shift_batch`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.adapters.captures import (
    Document,
    assert_equal,
    capture_of,
    make_documents,
)
from torch import Tensor

from eagle3_client.adapters import speculators_inputs


def slow_speculators_inputs(documents: list[Document]) -> dict[str, Tensor]:
    """From the definition, a position at a time."""
    positions: dict[str, list[Tensor]] = {}
    for number, document in enumerate(documents):
        for t in range(len(document["input_ids"]) - 1):
            position = {
                "hidden_states": document["hidden_states"][t],
                "input_ids": document["input_ids"][t + 1],
                "verifier_last_hidden_states": document["verifier_last_hidden_states"][t + 1],
                "loss_mask": document["loss_mask"][t + 1],
                "position_ids": torch.tensor(t + 1),
                "document_ids": torch.tensor(number),
            }
            for name, value in position.items():
                positions.setdefault(name, []).append(value)
    return {name: torch.stack(values)[None] for name, values in positions.items()}


LENGTHS = [6, 1, 9, 2, 4]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_a_document_whichever_side_is_padded(side: str) -> None:
    documents = make_documents(LENGTHS)
    capture = capture_of([[document] for document in documents], 11, left=side == "left")
    assert_equal(speculators_inputs(capture), slow_speculators_inputs(documents))


def test_packed_rows_are_the_same_documents() -> None:
    documents = make_documents(LENGTHS)
    capture = capture_of([documents[:3], documents[3:]], 17, packed=True)
    assert_equal(speculators_inputs(capture), slow_speculators_inputs(documents))


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_any_packing(rows: list[list[int]], padding: int) -> None:
    length = max(map(sum, rows)) + padding
    documents = make_documents([n for row in rows for n in row])
    left = iter(documents)
    capture = capture_of([[next(left) for _ in row] for row in rows], length, packed=True)
    got = speculators_inputs(capture)
    expected = slow_speculators_inputs(documents)
    if expected:
        assert_equal(got, expected)
    assert all(
        tensor.shape[:2] == (1, sum(n - 1 for r in rows for n in r)) for tensor in got.values()
    )


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_any_padding(lengths: list[int], padding: int, left: bool) -> None:
    documents = make_documents(lengths)
    rows = [[document] for document in documents]
    got = speculators_inputs(capture_of(rows, max(lengths) + padding, left=left))
    expected = slow_speculators_inputs(documents)
    if expected:
        assert_equal(got, expected)
    assert all(t.shape[:2] == (1, sum(max(n - 1, 0) for n in lengths)) for t in got.values())


def test_tokens_that_are_not_attended_are_no_part_of_a_document() -> None:
    (whole,) = make_documents([9])
    capture = capture_of([[whole]], 9)
    kept = torch.tensor([0, 1, 4, 5, 8])
    attention_mask = torch.zeros_like(capture.attention_mask)
    attention_mask[0, kept] = 1
    document = {name: tensor[kept] for name, tensor in whole.items()}
    got = speculators_inputs(replace(capture, attention_mask=attention_mask))
    assert_equal(got, slow_speculators_inputs([document]))


def test_a_capture_of_packed_rows_knows_its_documents(
    serve: Any, connect: Any, build_model: Any
) -> None:
    backend = connect(serve(build_model("llama")), exact=True)
    seq_lens = torch.tensor([[4, 3, 3], [1, 9, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], [0, *range(9)]])
    input_ids = torch.randint(1, 131, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 9] = 0  # padding
    given = {"input_ids": input_ids, "attention_mask": mask, "loss_mask": mask}
    capture = backend.capture(
        **given, position_ids=positions, seq_lens=seq_lens, outputs=["aux", "last_hidden_prenorm"]
    )
    assert torch.equal(capture.seq_lens, seq_lens)
    documents = [
        {
            "hidden_states": capture.aux[row, start:end],
            "verifier_last_hidden_states": capture.last_hidden_prenorm[row, start:end],
            "input_ids": input_ids[row, start:end],
            "loss_mask": mask[row, start:end],
        }
        for row, start, end in [(0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 0, 1), (1, 1, 10)]
    ]
    assert_equal(speculators_inputs(capture), slow_speculators_inputs(documents))
    unpacked = backend.capture(**given, outputs=["aux"])
    assert unpacked.seq_lens is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    documents = make_documents(LENGTHS)
    capture = capture_of([[document] for document in documents], 11)
    masks = {n: getattr(capture, n).to(dtype) * 3 for n in ("attention_mask", "loss_mask")}
    got = speculators_inputs(replace(capture, **{n: m.to(dtype) for n, m in masks.items()}))
    assert_equal(got, slow_speculators_inputs(documents))
