"""Draft-vocab supervision for the rows that are needed, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.encodings import Encoding
from eagle3_schemas.errors import TargetFailed
from eagle3_schemas.messages import Rows


@dataclass(frozen=True)
class HeadRows:
    """Where a chunk's logits come from: the rows-only head, or logits a full forward gave.

    Attributes:
        logits: flat positions [N] int64 -> logits [N, V].
        head_input: flat positions [N] -> the head's input [N, H]; None on the full path.
        transform: what follows the head; its dtype decides how `logits` travel.
        chunk_rows: rows to take at once.
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    head_input: Callable[[torch.Tensor], torch.Tensor] | None
    transform: LogitsTransform
    chunk_rows: int


@dataclass(frozen=True)
class SupervisionRows:
    """Rows in the unshifted frame: row of position t' supervises position t' - 1."""

    position_mask: torch.Tensor  # [B, T] bool, unshifted: column 0 is false
    rows: torch.Tensor  # [m, C], the encoding's rows, in row order


def supervise_rows(
    source: HeadRows,
    loss_mask: torch.Tensor,
    selected_token_ids: torch.Tensor,
    selected_token_mask: torch.Tensor,
    encoding: Encoding,
    rows: Rows,
    *,
    needs_draft_logits: bool,
) -> SupervisionRows:
    """Run the head over the rows asked for; memory grows with rows x D, never with T x V.

    Args:
        source: the head.
        loss_mask: [B, T] bool, unshifted.
        selected_token_ids: [D] int64.
        selected_token_mask: [V] bool.
        encoding: what the rows are encoded as.
        rows: which rows are sent.
        needs_draft_logits: false for an encoding that sends the head's input alone.

    Raises:
        TargetFailed: draft-vocab logits or head inputs that are not finite, with their position.
    """
    supervised = loss_mask.clone()
    supervised[:, 0] = False  # no position precedes it
    computed = supervised
    if rows == "all":
        computed = torch.ones_like(loss_mask)
        computed[:, 0] = False
    positions = computed.flatten().nonzero().squeeze(1)
    in_vocab = torch.zeros_like(loss_mask).flatten()
    sent: torch.Tensor | None = None
    count = 0
    for chunk in torch.split(positions, source.chunk_rows):
        logits = source.logits(chunk)
        top = logits.max(dim=-1)  # ties: the lowest id
        # A NaN counts as the largest, so the top logit tells of one anywhere in its row: such a row
        # must not pass for one whose argmax is outside the draft vocab.
        _check_finite(top.values, chunk, loss_mask.shape[1])
        hit = selected_token_mask[top.indices]
        in_vocab[chunk] = hit
        kept = chunk[hit] if rows == "position_mask" else chunk
        if needs_draft_logits:
            chosen = logits[hit] if rows == "position_mask" else logits
            draft_logits = chosen.index_select(-1, selected_token_ids)
            _check_finite(draft_logits, kept, loss_mask.shape[1])
        else:
            draft_logits = logits.new_empty(kept.shape[0], 0)
        head_input = logits if source.head_input is None else source.head_input(kept)
        part = encoding.encode(head_input, draft_logits, source.transform)
        if not needs_draft_logits:
            _check_finite(part, kept, loss_mask.shape[1])
        if sent is None:  # one buffer for the most rows there can be: no second copy at the end
            sent = part.new_empty(positions.numel(), part.shape[1])
        sent[count : count + part.shape[0]] = part
        count += part.shape[0]
    if sent is None:
        sent = _no_rows(source, loss_mask, selected_token_ids, encoding)
    return SupervisionRows(in_vocab.view_as(loss_mask) & supervised, sent[:count])


def logsumexp_rows(source: HeadRows, positions: torch.Tensor) -> torch.Tensor:
    """Full-vocab logsumexp of the rows at flat positions [N] -> [N] float32."""
    parts = [
        torch.logsumexp(source.logits(chunk).float(), -1)
        for chunk in torch.split(positions, source.chunk_rows)
    ]
    return torch.cat(parts)


def _no_rows(
    source: HeadRows, loss_mask: torch.Tensor, selected_token_ids: torch.Tensor, encoding: Encoding
) -> torch.Tensor:
    """An empty part of the right width and dtype, for a batch without supervision."""
    first = torch.zeros(1, dtype=torch.int64, device=loss_mask.device)
    logits = source.logits(first)
    head_input = logits if source.head_input is None else source.head_input(first)
    draft_logits = logits.index_select(-1, selected_token_ids)
    return encoding.encode(head_input, draft_logits, source.transform)[:0]


def _check_finite(rows: torch.Tensor, positions: torch.Tensor, sequence_length: int) -> None:
    # aminmax reads once, allocates nothing, and lets NaN through.
    if rows.numel() == 0 or all(bool(v.isfinite()) for v in torch.aminmax(rows)):
        return
    bad = (~rows.isfinite().view(rows.shape[0], -1).all(dim=-1)).nonzero()[0, 0]
    row, column = divmod(int(positions[bad]), sequence_length)
    raise TargetFailed(
        f"the head gave non-finite supervision for row {row}, position {column}; nothing was sent. "
        "Look at this row, or serve the target in a wider dtype (--dtype bfloat16 or float32)"
    )
