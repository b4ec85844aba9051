"""A batch that was sent, padded on either side, and what follows from its masks by hand."""

from __future__ import annotations

import torch

from eagle3_schemas.tokens import TokenBatch

DIGEST = "ab" * 32
H, D = 4, 3
CPU = torch.device("cpu")


def bits(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


SENT = TokenBatch(
    input_ids=torch.arange(10).reshape(2, 5),
    attention_mask=bits([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    loss_mask=bits([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]]),
)
SHIFTED_LOSS_MASK = bits([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
POSITION_MASK = bits([[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]])
