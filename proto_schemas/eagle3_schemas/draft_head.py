"""`DraftHead`: the rows of the target's head that a draft vocab selects, and what follows them.

With it a trainer rebuilds `target_probs` from hidden states, which are far smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

ROW_MULTIPLE = 16
"""Matmuls of fewer rows (or columns) take other kernels on the CPU, with other rounding; from 16 on
every row is bit-equal whatever the others are (measured in fp32 and bf16, 1 and 2 threads)."""


@dataclass(frozen=True)
class LogitsTransform:
    """What a model does to its head's output; identity by default.

    The steps run in this order, as the families that have them do: upcast to float32, times
    `multiply` (Cohere's `logit_scale`), divided by `divide` (Granite's `logits_scaling`), then
    `softcap * tanh(x / softcap)` (Gemma's `final_logit_softcapping`).
    """

    upcast: bool = False
    multiply: float | None = None
    divide: float | None = None
    softcap: float | None = None

    @property
    def is_upcast_only(self) -> bool:
        """Whether the head's own dtype holds the result without loss."""
        return self.multiply is None and self.divide is None and self.softcap is None

    def __call__(self, head_output: torch.Tensor) -> torch.Tensor:
        """Turn the head's output into logits, any shape."""
        logits = head_output.float() if self.upcast else head_output
        if self.multiply is not None:
            logits = logits * self.multiply
        if self.divide is not None:
            logits = logits / self.divide
        if self.softcap is not None:
            # Three steps, as the models do it: one fused expression rounds differently in bf16.
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """Append zero rows up to a multiple of 16: [N, C] -> [ceil(N / 16) * 16, C]."""
    missing = -rows.shape[0] % ROW_MULTIPLE
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows


@dataclass(frozen=True)
class DraftHead:
    """A draft vocab's head on the trainer's device; fetched once per mapping.

    Attributes:
        weight: [D', H], the head's rows in draft-vocab order; D' >= 16, zero rows appended.
        bias: [D'], or None.
        transform: what follows the head.
        draft_vocab_size: D.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitsTransform
    draft_vocab_size: int

    @classmethod
    def build(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, transform: LogitsTransform
    ) -> DraftHead:
        """Pad [D, H] and [D] to at least 16 rows, below which kernels round differently."""
        size = weight.shape[0]
        if size < ROW_MULTIPLE:
            weight = pad_rows(weight)
            if bias is not None:
                bias = pad_rows(bias.unsqueeze(1)).squeeze(1)
        return cls(weight, bias, transform, size)

    def logits(self, head_input: torch.Tensor) -> torch.Tensor:
        """Head inputs [N, H] -> draft-vocab logits [N, D] in the model's own precision."""
        output = linear(pad_rows(head_input), self.weight, self.bias)
        return self.transform(output[: head_input.shape[0], : self.draft_vocab_size])
