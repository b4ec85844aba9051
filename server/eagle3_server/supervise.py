"""Draft-vocab supervision for the rows that are needed, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.encodings import Encoding
from eagle3_schemas.errors import TargetFailed
from eagle3_schemas.host_zeros import host_zeros
from eagle3_schemas.messages import Rows

# Encoded at once: bounds the copies of their draft-vocab logits. Each block makes a GPU wait for
# the host, which learns there how many of its rows are sent.
_ENCODED_ROWS = 64
_ENCODED_ROWS_ON_GPU = 1024


@dataclass(frozen=True)
class HeadRows:
    """Where a chunk's logits come from: the rows-only head, or logits a full forward gave.

    Attributes:
        tiles: flat positions [N] int64 -> their logits [N, V] in tiles: first id, [N, ids].
        head_input: flat positions [N] -> the head's input [N, H]; None on the full path.
        transform: what follows the head; decides how `logits` travel.
        chunk_rows: rows to take at once.
        device: where the logits are, and positions must be.
    """

    tiles: Callable[[torch.Tensor], Iterator[tuple[int, torch.Tensor]]]
    head_input: Callable[[torch.Tensor], torch.Tensor] | None
    transform: LogitsTransform
    chunk_rows: int
    device: torch.device


@dataclass(frozen=True)
class SupervisionRows:
    """Rows in the unshifted frame: row of position t' supervises position t' - 1.

    On the device of the head.
    """

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
    share: tuple[int, int] = (0, 1),
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
        share: (i, n) computes the i-th of n parts of the rows; the others stay out of both results.

    Raises:
        TargetFailed: draft-vocab logits or head inputs that are not finite, with their position.
    """
    loss_mask, selected_token_ids, selected_token_mask = (
        each.to(source.device) for each in (loss_mask, selected_token_ids, selected_token_mask)
    )
    supervised = loss_mask.clone()
    supervised[:, 0] = False  # no position precedes it
    computed = supervised
    if rows == "all":
        computed = torch.ones_like(loss_mask)
        computed[:, 0] = False
    positions = share_of(computed, share)
    in_vocab = torch.zeros_like(loss_mask).flatten()
    ordered, order = selected_token_ids.sort()
    place = order.argsort()
    sent: torch.Tensor | None = None
    count = 0
    at_once = _ENCODED_ROWS if source.device.type == "cpu" else _ENCODED_ROWS_ON_GPU
    for chunk in torch.split(positions, source.chunk_rows):  # no positions: one empty chunk
        top: Top | None = None
        draft_logits = torch.empty(0)
        for start, logits in source.tiles(chunk):
            if sent is None:  # one buffer for the most rows there can be: no copy at the end
                sent = _rows_like(source, encoding, logits, positions.numel(), ordered.numel())
            if needs_draft_logits:
                # In the rows' own buffer, whose dtype holds them without loss, ordered by id.
                draft_logits = sent[count : count + chunk.numel()]
                first, last, part = draft_columns(logits, start, ordered)
                draft_logits[:, first:last] = part
            top = top_of(logits, start, top)
        assert sent is not None
        assert top is not None
        # A NaN counts as the largest, so the top logit tells of one anywhere in its row: such a row
        # must not pass for one whose argmax is outside the draft vocab.
        check_rows_finite(top.values, chunk, loss_mask.shape[1])
        hit = selected_token_mask[top.ids]
        in_vocab[chunk] = hit
        wanted = hit if rows == "position_mask" else torch.ones_like(hit)
        for begin in range(0, chunk.numel(), at_once):
            block = slice(begin, begin + at_once)
            kept = chunk[block][wanted[block]]
            if needs_draft_logits:
                part = draft_logits[block]
                if kept.numel() < part.shape[0]:
                    part = part.index_select(0, wanted[block].nonzero().squeeze(1))
                part = part.gather(1, place.expand(kept.numel(), -1))
                check_rows_finite(part, kept, loss_mask.shape[1])
                part = encoding.encode(part, part, source.transform)
            else:
                assert source.head_input is not None
                head_input = source.head_input(kept)
                part = encoding.encode(head_input, head_input[:, :0], source.transform)
                check_rows_finite(part, kept, loss_mask.shape[1])
            # Never beyond the block just read.
            sent[count : count + part.shape[0]] = part
            count += part.shape[0]
    assert sent is not None
    return SupervisionRows(in_vocab.view_as(loss_mask) & supervised, sent[:count])


def share_of(rows: torch.Tensor, share: tuple[int, int]) -> torch.Tensor:
    """Return the flat positions [N] where `rows` [B, T] bool is true, or the i-th of n parts."""
    part, parts = share
    return rows.flatten().nonzero().squeeze(1).tensor_split(parts)[part]


@dataclass(frozen=True)
class Top:
    """The argmax of some rows so far."""

    values: torch.Tensor  # [N] the largest logit so far; NaN if there was one
    ids: torch.Tensor  # [N] its lowest id; undefined if NaN


def top_of(logits: torch.Tensor, start: int, before: Top | None) -> Top:
    """Argmax of the ids so far; ties go to the lowest."""
    if before is None:
        top = logits.max(dim=-1)
        return Top(top.values, top.indices + start)
    # On the CPU `amax` costs half of `max`, and few rows find a larger logit in a later tile.
    values = logits.amax(dim=-1)
    larger = (values > before.values).nonzero().squeeze(1)
    if larger.numel():
        before.ids[larger] = logits[larger].max(dim=-1).indices + start
    return Top(torch.maximum(values, before.values), before.ids)


def draft_columns(
    logits: torch.Tensor, start: int, ordered: torch.Tensor
) -> tuple[int, int, torch.Tensor]:
    """Return which ordered draft-vocab ids a tile holds, [first, last), and their logits.

    Args:
        logits: [N, ids], of the ids from `start` on.
        start: the tile's first id.
        ordered: [D] int64, ascending.
    """
    ends = torch.tensor([start, start + logits.shape[1]], device=ordered.device)
    first, last = torch.searchsorted(ordered, ends).tolist()
    # On the CPU `gather` takes a seventh of the time of `index_select` along rows.
    columns = (ordered[first:last] - start).expand(logits.shape[0], -1)
    return first, last, logits.gather(1, columns)


def _rows_like(
    source: HeadRows, encoding: Encoding, logits: torch.Tensor, count: int, draft_vocab_size: int
) -> torch.Tensor:
    """Return a buffer for `count` rows of the encoding."""
    none = torch.zeros(0, dtype=torch.int64, device=logits.device)
    head_input = logits[:0] if source.head_input is None else source.head_input(none)
    draft_logits = logits.new_empty(0, draft_vocab_size)
    part = encoding.encode(head_input, draft_logits, source.transform)
    shape = (count, part.shape[1])
    return host_zeros(shape, part.dtype) if part.device.type == "cpu" else part.new_empty(shape)


def check_rows_finite(rows: torch.Tensor, positions: torch.Tensor, sequence_length: int) -> None:
    """Raise TargetFailed naming the first position whose row is not finite."""
    # aminmax reads once, allocates nothing, and lets NaN through.
    if rows.numel() == 0 or all(bool(v.isfinite()) for v in torch.aminmax(rows)):
        return
    bad = (~rows.isfinite().view(rows.shape[0], -1).all(dim=-1)).nonzero()[0, 0]
    row, column = divmod(int(positions[bad]), sequence_length)
    raise TargetFailed(
        f"the head gave non-finite logits at row {row}, position {column} of input_ids (the "
        f"supervision of position {column - 1}); nothing was sent. "
        "Look at this row, or serve the target in a wider dtype (--dtype bfloat16 or float32)"
    )
