"""`Eagle3TargetBackend`: the interface a trainer sees, whether the target is local or remote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from eagle3_schemas.batch import Eagle3TargetBatch


class EmbeddingsLike(Protocol):
    """Anything with a `weight` [V, H]: all that a draft needs to copy the target's embeddings."""

    @property
    def weight(self) -> torch.Tensor:
        """[V, H], model dtype."""


class BatchHandle(Protocol):
    """An `Eagle3TargetBatch` on its way; any thread may wait for it or cancel it."""

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        """Wait up to `timeout` seconds for the batch.

        Raises:
            TimeoutError: not there yet; the request goes on, call again.
            RemoteEagle3Error: the request failed for good.
        """

    def cancel(self) -> bool:
        """Drop the request if it has not started; return whether it was dropped."""


class Eagle3TargetBackend(ABC):
    """Supplies the frozen target's supervision (the contract of NeMo AutoModel's recipe).

    Whether several threads may use one at once, each backend says: `RemoteEagle3Backend` allows it,
    `HFEagle3TargetModel` does not.
    """

    @abstractmethod
    def generate_batch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Eagle3TargetBatch:
        """Run the target on one batch; blocks.

        Args:
            input_ids: [B, T] integer token ids.
            attention_mask: [B, T], non-zero where attended.
            loss_mask: [B, T], non-zero where supervised; unshifted.
            position_ids: [B, T], restarting per packed document; needed with `seq_lens`.
            seq_lens: [B, max_docs] packed document lengths, 0-padded; each row's sum is T.
            doc_remaining: [B, T] tokens left in each document, for the trainer.
        """

    @abstractmethod
    def get_input_embeddings(self) -> EmbeddingsLike:
        """Return the target's input embeddings, an object with `.weight` [V, H]."""

    def set_vocab_mapping(
        self, selected_token_ids: torch.Tensor, selected_token_mask: torch.Tensor
    ) -> None:
        """Set the draft vocab for the batches requested from now on.

        A co-located target returns full logits and the trainer projects them, so this does nothing
        unless a backend overrides it. May be called again at any time.

        Args:
            selected_token_ids: [D] distinct target ids; their order numbers the draft vocab.
            selected_token_mask: [V] bool, true for exactly those ids.
        """

    @property
    def supports_async(self) -> bool:
        """Whether `generate_batch_async` works."""
        return False

    def generate_batch_async(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> BatchHandle:
        """Start `generate_batch` and return a handle; check `supports_async` first.

        Arguments as `generate_batch` has them.

        Raises:
            NotImplementedError: this backend is synchronous; call `generate_batch`.
        """
        # Not abstract: a synchronous backend is whole without it, and callers ask supports_async.
        raise NotImplementedError(
            f"{type(self).__name__} is synchronous (supports_async is False); call generate_batch"
        )

    def close(self) -> None:
        """Release what this backend holds; safe to repeat, affects no other client."""
