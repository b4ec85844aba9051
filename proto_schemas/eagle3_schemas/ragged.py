"""Sequences of unequal length: into one packed row, and its batch back into padded rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eagle3_schemas.batch import Eagle3TargetBatch
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.packing import documents_of


def pack_sequences(
    input_ids: Sequence[torch.Tensor], loss_mask: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Lay sequences end to end in one packed row: no padding travels, and the target pads little.

    Each sequence is supervised as it would be alone: its first token is never predicted, so its
    loss mask is 0 there, which in a packed row would ask for the end of the sequence before.

    Args:
        input_ids: [n_i] integers each, n_i >= 1, on one device.
        loss_mask: [n_i] each, non-zero where supervised; unshifted.

    Returns:
        The arguments of `generate_batch`, B = 1, T = the sum of n_i, for `prefetch` as well.

    Raises:
        InvalidRequest: no sequences, empty ones, or lengths that differ between the two.
    """
    if not input_ids or len(input_ids) != len(loss_mask):
        raise InvalidRequest(
            f"expected as many loss masks as sequences, and at least one; got {len(input_ids)} "
            f"sequences and {len(loss_mask)} loss masks"
        )
    for index, (ids, mask) in enumerate(zip(input_ids, loss_mask, strict=True)):
        for name, each in (("input_ids", ids), ("loss_mask", mask)):
            if not isinstance(each, torch.Tensor):
                raise InvalidRequest(
                    f"{name} must be a list of tensors; got {type(each).__name__} at index {index}"
                )
        if ids.ndim != 1 or not ids.numel() or mask.shape != ids.shape:
            raise InvalidRequest(
                "input_ids and loss_mask of a sequence must be 1-D, equally long and not empty; "
                f"got {list(ids.shape)} and {list(mask.shape)} at index {index}"
            )
    lengths = [ids.numel() for ids in input_ids]
    device = input_ids[0].device
    row = torch.cat(list(input_ids))[None]
    position_ids = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "loss_mask": torch.cat(list(loss_mask))[None] * (position_ids > 0),
        "position_ids": position_ids,
        "seq_lens": torch.tensor([lengths], device=device),
        "doc_remaining": torch.cat([torch.arange(n - 1, -1, -1, device=device) for n in lengths])[
            None
        ],
    }


def unpack_sequences(batch: Eagle3TargetBatch, pad_token_id: int = 0) -> Eagle3TargetBatch:
    """Give each document of a packed batch a row of its own, padded on the right.

    Args:
        batch: what a target returned for packed rows, on any device; unchanged.
        pad_token_id: put behind the sequences, and where the shift leaves nothing.

    Returns:
        [N, longest, …] of all documents in order, as if they had been a padded batch: zeros behind
        them, and in each one's last column no supervision. It carries no packing.

    Raises:
        InvalidRequest: the batch is not packed.
    """
    if not isinstance(batch, Eagle3TargetBatch):
        raise InvalidRequest(
            f"expected an Eagle3TargetBatch, as generate_batch returns; got {type(batch).__name__}"
        )
    if batch.seq_lens is None:
        raise InvalidRequest("expected a batch of packed rows, with seq_lens; got none")
    length = batch.input_ids.shape[1]
    documents = documents_of(batch.seq_lens.cpu())
    lengths = torch.tensor([each.length for each in documents])
    longest = int(lengths.max())
    columns = torch.arange(longest)
    is_real = columns < lengths[:, None]
    # The last column is zeros by the definition of the shift, not the next document's first.
    has_next = (columns < lengths[:, None] - 1).to(batch.input_ids.device)
    starts = torch.tensor([each.row * length + each.start for each in documents])
    places = (starts[:, None] + columns)[is_real].to(batch.input_ids.device)
    is_real = is_real.to(batch.input_ids.device)

    def spread(packed: torch.Tensor) -> torch.Tensor:
        padded = packed.new_zeros(*is_real.shape, *packed.shape[2:])
        padded[is_real] = packed.flatten(0, 1)[places]
        return padded

    def shifted(packed: torch.Tensor) -> torch.Tensor:
        padded = spread(packed)
        padded[~has_next] = 0
        return padded

    logits, probs, mask = batch.logits, batch.target_probs, batch.position_mask
    return Eagle3TargetBatch(
        aux_hidden_states=spread(batch.aux_hidden_states),
        input_ids=shifted(batch.input_ids).masked_fill(~has_next, pad_token_id),
        attention_mask=spread(batch.attention_mask),
        loss_mask=shifted(batch.loss_mask),
        logits=None if logits is None else shifted(logits),
        target_probs=None if probs is None else shifted(probs),
        position_mask=None if mask is None else shifted(mask),
    )
