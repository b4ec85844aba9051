"""What the peer's trainer is trained on: batches of every kind its recipe makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS, TTT_STEPS = 20, 4
UNSUPERVISED_STEP = 7  # of sparse batches
# All different, so that a transposed axis fails.
BATCH_SIZE, SEQUENCE_LENGTH, VOCAB_SIZE, DRAFT_VOCAB_SIZE, NUM_LAYERS = 3, 19, 131, 61, 9


@dataclass(frozen=True)
class Variant:
    """What one comparison trains, on what supervision."""

    target_dtype: torch.dtype = torch.float32
    draft_dtype: torch.dtype = torch.float32
    is_sparse: bool = False
    lk_loss_type: str | None = None
    is_packed: bool = False


VARIANTS = {
    "fp32": Variant(),
    "sparse": Variant(is_sparse=True),
    # The peer multiplies aux states without a cast: its batches are cast by `train`, ours arrive
    # cast (`output_dtype`).
    "bf16_target_fp32_draft": Variant(target_dtype=torch.bfloat16),
    "bf16": Variant(target_dtype=torch.bfloat16, draft_dtype=torch.bfloat16),
    # Divides by the overlap of both distributions, which is 0 in rows we do not send.
    "lk_alpha_sparse": Variant(is_sparse=True, lk_loss_type="alpha"),
    "packed": Variant(is_packed=True),
    "packed_bf16": Variant(target_dtype=torch.bfloat16, draft_dtype=torch.bfloat16, is_packed=True),
}


def make_batches(variant: Variant) -> list[dict[str, Tensor]]:
    """Return batches padded on the right, whose first tokens, the prompt, carry no loss.

    Sparse ones supervise a third of the rest, nothing in their first row, and one batch nothing.
    Packed ones hold documents that each begin with a prompt of 2 tokens, as its recipe packs them:
    padding is folded into a row's last document.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH_SIZE, SEQUENCE_LENGTH)
    frequencies = torch.rand(VOCAB_SIZE, generator=generator) ** 4
    columns = torch.arange(SEQUENCE_LENGTH)
    batches = []
    for step in range(STEPS):
        tokens = torch.multinomial(
            frequencies, BATCH_SIZE * SEQUENCE_LENGTH, True, generator=generator
        )
        lengths = torch.randint(9, SEQUENCE_LENGTH + 1, (BATCH_SIZE, 1), generator=generator)
        attention_mask = (columns < lengths).long()
        loss_mask = attention_mask * (columns >= 4)
        if variant.is_sparse:
            loss_mask *= torch.rand(shape, generator=generator) < 0.33
            loss_mask[0] = 0
            loss_mask *= step != UNSUPERVISED_STEP
        input_ids = tokens.view(shape) * attention_mask
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
        if variant.is_packed:
            batch |= packed(attention_mask, generator)
        batches.append(batch)
    return batches


def packed(attention_mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Split each row's tokens into up to three documents."""
    seq_lens, positions, remaining = [], [], []
    for length in attention_mask.sum(1).tolist():
        first = int(torch.randint(3, length - 3, (1,), generator=generator))
        second = int(torch.randint(1, length - first, (1,), generator=generator))
        lens = [first, second, length - first - second]
        pad = SEQUENCE_LENGTH - length
        remaining.append([n - 1 - i for n in lens for i in range(n)] + [0] * pad)
        lens[-1] += pad
        positions.append([i for n in lens for i in range(n)])
        seq_lens.append(lens)
    position_ids = torch.tensor(positions)
    return {
        "loss_mask": attention_mask * (position_ids >= 2),
        "position_ids": position_ids,
        "seq_lens": torch.tensor(seq_lens),
        "doc_remaining": torch.tensor(remaining),
    }
