"""Packed rows: several documents in one row, told apart by `seq_lens`; checks and positions."""

from __future__ import annotations

from typing import NamedTuple

import torch

from eagle3_schemas.errors import InvalidRequest


class Document(NamedTuple):
    """One document of a packed batch: columns `start` to `start + length` of `row`."""

    row: int
    start: int
    length: int


def check_packing(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    doc_remaining: torch.Tensor | None,
) -> None:
    """Check the three that describe packed rows; all None is an ordinary batch.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], non-zero where attended.
        position_ids: [B, T], 0, 1, 2, … in each document.
        seq_lens: [B, max_docs] lengths, 0-padded; each row's sum is T, padding folded in.
        doc_remaining: [B, T]; only the trainer reads it, so its values are its own.

    Raises:
        InvalidRequest: one of the three without the others it needs, wrong shapes or sums,
            positions that do not restart, or padding inside a document.
    """
    if seq_lens is None:
        for name, tensor in (("position_ids", position_ids), ("doc_remaining", doc_remaining)):
            if tensor is not None:
                raise InvalidRequest(
                    f"{name} describe packed rows and need seq_lens [B, max_docs]; got none. "
                    "Without packing leave them out: the target counts positions itself"
                )
        return
    if position_ids is None:
        raise InvalidRequest(
            "seq_lens need position_ids [B, T] that restart in each document; got none"
        )
    for name, tensor in (("position_ids", position_ids), ("doc_remaining", doc_remaining)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise InvalidRequest(
                f"{name} must have the shape of input_ids, {list(input_ids.shape)}; got "
                f"{list(tensor.shape)}"
            )
    check_seq_lens(seq_lens, attention_mask)
    expected = restarting_positions(seq_lens.cpu(), input_ids.shape[1])
    wrong = (position_ids.cpu() != expected).nonzero()
    if wrong.numel():
        row, column = wrong[0].tolist()
        raise InvalidRequest(
            f"position_ids must count 0, 1, 2, … in each document of seq_lens; got "
            f"{position_ids[row, column].item()} instead of {int(expected[row, column])} at row "
            f"{row}, column {column}"
        )


def check_seq_lens(seq_lens: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Check document lengths against a batch.

    Args:
        seq_lens: [B, max_docs] integers.
        attention_mask: [B, T], non-zero where attended.

    Raises:
        InvalidRequest: not integers of that shape, negative ones, sums that are not T, or a
            position that is not attended before one that is in the same document.
    """
    batch_size, length = attention_mask.shape
    if seq_lens.is_floating_point() or seq_lens.is_complex() or seq_lens.dtype is torch.bool:
        raise InvalidRequest(f"seq_lens must be integers; got {seq_lens.dtype}")
    if seq_lens.ndim != 2 or seq_lens.shape[0] != batch_size or seq_lens.shape[1] < 1:
        raise InvalidRequest(
            f"seq_lens must be [B, max_docs] with B = {batch_size} and at least one document; got "
            f"shape {list(seq_lens.shape)}"
        )
    lens = seq_lens.detach().cpu().long()
    wrong = ((lens < 0).any(1) | (lens > length).any(1) | (lens.sum(1) != length)).nonzero()
    if wrong.numel():
        row = int(wrong[0, 0])
        raise InvalidRequest(
            f"seq_lens must be >= 0 and sum to T = {length} in each row, padding folded into the "
            f"last document; got {lens[row].tolist()!s:.200} (sum {int(lens[row].sum())}) in row "
            f"{row}"
        )
    attended = attention_mask.detach().cpu().ne(0)
    starts = restarting_positions(lens, length) == 0
    # A gap, and then a token that would attend to it.
    after_gap = ~attended[:, :-1] & attended[:, 1:] & ~starts[:, 1:]
    if bool(after_gap.any()):
        row, column = after_gap.nonzero()[0].tolist()
        raise InvalidRequest(
            "in packed rows attention_mask may be 0 at the end of a document only; got 0 at row "
            f"{row}, column {column}, and a token of the same document after it"
        )


def restarting_positions(seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """Return positions [B, T] int64 that count from 0 in each document of [B, max_docs] lengths."""
    columns = torch.arange(length, device=seq_lens.device).expand(seq_lens.shape[0], -1)
    ends = seq_lens.long().cumsum(1)
    index = torch.searchsorted(ends, columns.contiguous(), right=True)
    starts = torch.nn.functional.pad(ends, (1, 0))
    return columns - starts.gather(1, index.clamp(max=seq_lens.shape[1]))


def documents_of(seq_lens: torch.Tensor) -> list[Document]:
    """Return the documents of [B, max_docs] lengths, row by row; zeros are none."""
    documents = []
    for row, lens in enumerate(seq_lens.tolist()):
        start = 0
        for length in lens:
            if length:
                documents.append(Document(row, start, length))
            start += length
    return documents
