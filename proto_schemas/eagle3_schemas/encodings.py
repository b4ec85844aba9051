"""How supervision rows travel: one class per encoding, encode and decode side by side."""

from __future__ import annotations

from typing import Final, Protocol

import torch


class Encoding(Protocol):
    """Turns the draft-vocab logits of N rows into tensors for the wire, and those into probs."""

    name: str

    def encode(self, draft_logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, D] logits in the head's dtype -> named tensors, on the same device."""

    def decode(self, tensors: dict[str, torch.Tensor], count: int, size: int) -> torch.Tensor:
        """Named tensors -> `target_probs` rows [count, size] float32, on their device."""


class ProbsEncoding:
    """`probs`: softmax over the draft vocab on the server; D * 4 bytes a row, nothing to rebuild.

    The reference for the others: float32 softmax of the logits, as `project_to_draft_vocab`.
    """

    name = "probs"

    def encode(self, draft_logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """[N, D] logits -> {"target_probs": [N, D] float32}."""
        return {"target_probs": torch.softmax(draft_logits.float(), dim=-1)}

    def decode(self, tensors: dict[str, torch.Tensor], count: int, size: int) -> torch.Tensor:
        """Return the rows as they came, after checking their shape and dtype."""
        rows = tensors.get("target_probs")
        if rows is None or rows.dtype is not torch.float32 or rows.shape != (count, size):
            got = None if rows is None else (rows.dtype, tuple(rows.shape))
            raise ValueError(f"expected float32 target_probs {(count, size)}, got {got}")
        return rows


ENCODINGS: Final[dict[str, Encoding]] = {"probs": ProbsEncoding()}
