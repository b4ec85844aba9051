"""`Eagle3TargetBatch`: what a target backend hands the trainer for one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Eagle3TargetBatch:
    """Supervision for one draft-training batch; the fields of NeMo AutoModel's class of that name.

    B batch, T sequence, H target hidden size, V target vocab, D draft vocab. `input_ids`,
    `loss_mask` and the supervision are shifted left by one (`shift_left_with_zero`); the others are
    not. Exactly one supervision source is set: `logits`, or `target_probs` with `position_mask`.

    Attributes:
        aux_hidden_states: [B, T, 3H], model dtype: the outputs of the three aux layers,
            concatenated in order. From a remote target, zeros where `attention_mask` is 0.
        input_ids: [B, T] integer.
        attention_mask: [B, T], as the caller passed it.
        loss_mask: [B, T], in the caller's dtype.
        logits: [B, T, V] full target logits (co-located targets).
        target_probs: [B, T, D] float32, renormalised over the draft vocab; zeros in rows that were
            not sent, so that reading them gives no gradient.
        position_mask: [B, T, 1] bool: supervised, and the target's argmax is in the draft vocab.
        position_ids: [B, T] position inside each packed document.
        seq_lens: [B, max_docs] lengths of the packed documents, 0-padded.
        doc_remaining: [B, T] tokens left in each position's document.

    Raises:
        ValueError: not exactly one supervision source.
    """

    aux_hidden_states: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    logits: torch.Tensor | None = None
    target_probs: torch.Tensor | None = None
    position_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    doc_remaining: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check that exactly one supervision source is carried."""
        probs, mask = self.target_probs is not None, self.position_mask is not None
        if probs != mask or probs == (self.logits is not None):
            given = [
                name
                for name in ("logits", "target_probs", "position_mask")
                if getattr(self, name) is not None
            ]
            raise ValueError(
                "expected exactly one supervision source, `logits` or (`target_probs` and "
                f"`position_mask`); got {given or 'none'}"
            )

    def to_trainer_inputs(self) -> dict[str, torch.Tensor | None]:
        """Return the keyword arguments of the trainer's forward for the source carried.

        The attributes themselves, of the shapes they have there; `target_logits` [B, T, V] is
        `logits`. Those of packed rows are there if `seq_lens` is set.
        """
        inputs: dict[str, torch.Tensor | None] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "loss_mask": self.loss_mask,
            "aux_hidden_states": self.aux_hidden_states,
        }
        if self.logits is not None:
            inputs["target_logits"] = self.logits
        else:
            inputs["target_probs"] = self.target_probs
            inputs["position_mask"] = self.position_mask
        if self.seq_lens is not None:
            inputs["position_ids"] = self.position_ids
            inputs["seq_lens"] = self.seq_lens
            inputs["doc_remaining"] = self.doc_remaining
        return inputs
