"""Batches wider than any row of them, and what a forward sees of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.watching import columns_seen
from torch import nn

V = 131
ENCODINGS = ["probs", "logits", "hidden"]
ROWS = ["position_mask", "loss_mask", "all"]
PADDING = 6  # columns that no row uses


def widen(inputs: Any, columns: int, *, left: bool = False) -> Any:
    """Add columns that no row uses."""
    sides = (columns, 0) if left else (0, columns)
    return replace(
        inputs, **{name: nn.functional.pad(t, sides) for name, t in vars(inputs).items()}
    )


def columns_of(model: Any, backend: Any, inputs: Any) -> int:
    with columns_seen(model.get_input_embeddings()) as seen:
        backend.generate_batch(*inputs)
    (columns,) = seen
    return columns
