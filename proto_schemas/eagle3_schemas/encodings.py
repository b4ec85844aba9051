"""How supervision rows travel: one class per encoding, encode and decode side by side.

Each puts one tensor [N, C] on the wire. All decode to the same `target_probs`: the float32 softmax
over the draft vocab of the target's logits.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch

from eagle3_schemas.draft_head import DraftHead, LogitsTransform


class Encoding(Protocol):
    """Turns rows of the target's head into rows for the wire, and those into probs."""

    tensor_name: str
    needs_draft_head: bool
    """Whether decoding needs the draft vocab's head on the trainer."""

    def encode(
        self, head_input: torch.Tensor, draft_logits: torch.Tensor, transform: LogitsTransform
    ) -> torch.Tensor:
        """Rows on the target's device -> rows for the wire, there.

        Args:
            head_input: [N, H], what the head is applied to.
            draft_logits: [N, D], the head's output after its transform.
            transform: that transform.
        """

    def columns_and_dtypes(
        self, draft_vocab_size: int, dtype: torch.dtype, head: DraftHead | None
    ) -> tuple[int, tuple[torch.dtype, ...]]:
        """Return C and the dtypes that rows on the wire may have, for a target of `dtype`."""

    def decode(self, rows: torch.Tensor, head: DraftHead | None) -> torch.Tensor:
        """Rows [N, C] on the trainer's device -> `target_probs` rows [N, D] float32."""


class ProbsEncoding:
    """`probs`: softmax on the server; D * 4 bytes a row, nothing to rebuild. The reference."""

    tensor_name = "target_probs"
    needs_draft_head = False

    def encode(
        self, head_input: torch.Tensor, draft_logits: torch.Tensor, transform: LogitsTransform
    ) -> torch.Tensor:
        """[N, D] logits -> [N, D] float32."""
        return torch.softmax(draft_logits.float(), dim=-1)

    def columns_and_dtypes(
        self, draft_vocab_size: int, dtype: torch.dtype, head: DraftHead | None
    ) -> tuple[int, tuple[torch.dtype, ...]]:
        """[N, D] float32."""
        return draft_vocab_size, (torch.float32,)

    def decode(self, rows: torch.Tensor, head: DraftHead | None) -> torch.Tensor:
        """Return the rows as they came."""
        return rows


class LogitsEncoding:
    """`logits`: draft-vocab logits in the head's dtype, softmax on the trainer; bit-identical.

    D * 2 bytes a row for a bf16 target. Where a model only upcasts its head's output, the rows
    travel as they were before, which loses nothing.
    """

    tensor_name = "draft_logits"
    needs_draft_head = False

    def encode(
        self, head_input: torch.Tensor, draft_logits: torch.Tensor, transform: LogitsTransform
    ) -> torch.Tensor:
        """[N, D] logits -> [N, D] in the narrowest dtype that holds them."""
        if transform.upcast and transform.is_upcast_only:
            return draft_logits.to(head_input.dtype)
        return draft_logits

    def columns_and_dtypes(
        self, draft_vocab_size: int, dtype: torch.dtype, head: DraftHead | None
    ) -> tuple[int, tuple[torch.dtype, ...]]:
        """[N, D]; what follows the head decides the dtype."""
        return draft_vocab_size, (dtype, torch.float32, torch.bfloat16, torch.float16)

    def decode(self, rows: torch.Tensor, head: DraftHead | None) -> torch.Tensor:
        """[N, D] -> float32 softmax."""
        return torch.softmax(rows.float(), dim=-1)


class HiddenEncoding:
    """`hidden`: the head's input, H * model dtype a row; the trainer applies the draft head.

    Bit-identical on the CPU; from one kind of device to another the matmul rounds differently.
    """

    tensor_name = "head_input"
    needs_draft_head = True

    def encode(
        self, head_input: torch.Tensor, draft_logits: torch.Tensor, transform: LogitsTransform
    ) -> torch.Tensor:
        """[N, H] as it is."""
        return head_input

    def columns_and_dtypes(
        self, draft_vocab_size: int, dtype: torch.dtype, head: DraftHead | None
    ) -> tuple[int, tuple[torch.dtype, ...]]:
        """[N, H] in the head's dtype."""
        weight = _needed(head).weight
        return weight.shape[1], (weight.dtype,)

    def decode(self, rows: torch.Tensor, head: DraftHead | None) -> torch.Tensor:
        """[N, H] -> draft head, transform, float32 softmax."""
        return torch.softmax(_needed(head).logits(rows).float(), dim=-1)


def _needed(head: DraftHead | None) -> DraftHead:
    if head is None:
        raise ValueError("decoding `hidden` needs the draft vocab's head")
    return head


ENCODINGS: Final[dict[str, Encoding]] = {
    "probs": ProbsEncoding(),
    "logits": LogitsEncoding(),
    "hidden": HiddenEncoding(),
}
