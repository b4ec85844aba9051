"""Supervision as pure tensor functions: shift, project, and packing of masks and rows."""

from __future__ import annotations

import torch

from eagle3_schemas.host_zeros import host_zeros


def shift_left_with_zero(tensor: torch.Tensor) -> torch.Tensor:
    """Drop column 0 and append a zero column: [B, T, ...] -> [B, T, ...], same dtype and device.

    The same rule as NeMo AutoModel's `_shift_left_with_zero` and SpecForge's `padding(left=False)`.

    Args:
        tensor: [B, T, ...], any dtype and device.
    """
    return torch.cat((tensor[:, 1:], torch.zeros_like(tensor[:, :1])), dim=1)


def project_to_draft_vocab(
    logits: torch.Tensor,
    selected_token_ids: torch.Tensor,
    selected_token_mask: torch.Tensor,
    loss_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project target logits onto the draft vocab (NeMo's `_compute_target_distribution`).

    Args:
        logits: [B, T, V], any float dtype and device, already shifted left.
        selected_token_ids: [D] int64 on that device.
        selected_token_mask: [V] bool on that device.
        loss_mask: [B, T], already shifted left, non-zero where supervised.

    Returns:
        `target_probs` [B, T, D] float32, each row summing to 1 over the draft vocab, and
        `position_mask` [B, T, 1] bool. Ties of the argmax go to the lowest id.
    """
    position_mask = selected_token_mask[logits.argmax(dim=-1)] & loss_mask.bool()
    draft_logits = logits.index_select(-1, selected_token_ids)
    return torch.softmax(draft_logits.float(), dim=-1), position_mask.unsqueeze(-1)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean tensor of any shape into [ceil(n / 8)] uint8, first element in bit 0."""
    bits = mask.reshape(-1)
    padded = bits.new_zeros(-(-bits.numel() // 8) * 8)
    padded[: bits.numel()] = bits
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Invert `pack_bits`: a bool tensor of `shape`, which must fit the packed length."""
    count = 1
    for extent in shape:
        count *= extent
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return bits.reshape(-1)[:count].bool().reshape(shape)


def scatter_rows(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Place rows [N, C] where `mask` [B, T] is true, zeros elsewhere: [B, T, C].

    When every position is true this is a view, not a copy.
    """
    if rows.shape[0] == mask.numel():
        return rows.view(*mask.shape, rows.shape[-1])
    shape = (mask.numel(), rows.shape[-1])
    full = host_zeros(shape, rows.dtype) if rows.device.type == "cpu" else rows.new_zeros(shape)
    full[mask.reshape(-1)] = rows
    return full.view(*mask.shape, rows.shape[-1])
