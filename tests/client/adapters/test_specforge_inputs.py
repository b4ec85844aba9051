"""SpecForge's arguments against a loop, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.client.adapters.captures import (
    VOCAB_SIZE,
    assert_equal,
    capture_of,
    make_documents,
    make_head,
)
from torch import Tensor

from eagle3_client.adapters import specforge_inputs, speculators_inputs
from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.capture import Capture
from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.errors import InvalidRequest


def padded(left: bool = False) -> tuple[Capture, Tensor]:
    """A capture with `last_hidden`, and the mask it was made with."""
    documents = make_documents([6, 1, 9, 4])
    rows = [[document] for document in documents]
    capture = capture_of(rows, 11, left=left)
    loss_mask = torch.randint(0, 2, (4, 11), generator=torch.Generator().manual_seed(1))
    outputs = {"aux": capture.aux, "last_hidden": capture.last_hidden_prenorm}
    shifted = shift_left_with_zero(loss_mask)
    return replace(capture, outputs=outputs, loss_mask=shifted), loss_mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("bias", [None, torch.ones(VOCAB_SIZE)], ids=["plain", "bias"])
def test_specforge_batches_by_definition(left: bool, bias: Tensor | None) -> None:
    capture, loss_mask = padded(left)
    head = make_head(bias=bias, transform=LogitsTransform(softcap=2.0))
    inputs = specforge_inputs(capture, head, loss_mask)
    assert inputs["hidden_states"] is capture.aux
    assert inputs["input_ids"] is capture.input_ids
    assert torch.equal(inputs["attention_mask"], capture.attention_mask)
    assert inputs["target"].shape == (4, 11, VOCAB_SIZE)
    assert inputs["loss_mask"].shape == (4, 11, 1)
    assert inputs["loss_mask"].dtype == torch.int64
    logits = head.logits(capture.last_hidden)
    for row in range(4):
        for t in range(11):
            is_last = t == 10 or not capture.attention_mask[row, t : t + 2].all()
            supervised = int(inputs["loss_mask"][row, t])
            assert supervised == (0 if is_last else int(loss_mask[row, t]))
            if t < 10:
                torch.testing.assert_close(inputs["target"][row, t], logits[row, t + 1])
    assert inputs["loss_mask"].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_specforge_masks_of_any_dtype(dtype: torch.dtype) -> None:
    capture, loss_mask = padded()
    expected = specforge_inputs(capture, make_head(), loss_mask)
    capture = replace(capture, loss_mask=capture.loss_mask.to(dtype))
    assert_equal(specforge_inputs(capture, make_head(), loss_mask.to(dtype)), expected)


def test_the_captures_own_mask_is_refused_since_it_is_shifted() -> None:
    capture, loss_mask = padded()
    for wrong in (capture.loss_mask, loss_mask[:, :-1], loss_mask[:1], 1 - loss_mask):
        with pytest.raises(InvalidRequest, match=r"unshifted mask \[4, 11\].*got another"):
            specforge_inputs(capture, make_head(), wrong)


def test_packed_rows_are_refused_where_documents_would_mix() -> None:
    capture, loss_mask = padded()
    capture = replace(capture, seq_lens=torch.tensor([[5, 6]] * 4))
    with pytest.raises(InvalidRequest, match=r"packed rows\. Send each document"):
        specforge_inputs(capture, make_head(), loss_mask)


def test_an_output_that_was_not_captured_is_named() -> None:
    capture, loss_mask = padded()
    with pytest.raises(InvalidRequest, match=r"got \['aux', 'last_hidden'\].*last_hidden_prenorm"):
        speculators_inputs(capture)
    capture = replace(capture, outputs={"aux": capture.aux})
    with pytest.raises(InvalidRequest, match=r"outputs=\('aux', 'last_hidden'\)"):
        specforge_inputs(capture, make_head(), loss_mask)
