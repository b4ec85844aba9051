"""`DraftVocab`: an ordered selection of target ids, checked, and addressed by a digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.tensors import byte_view


@dataclass(frozen=True, eq=False)
class DraftVocab:
    """A checked draft-vocab mapping; immutable, so a request keeps the one it was submitted with.

    Attributes:
        selected_token_ids: [D] int64 on the CPU, distinct, in the caller's order: entry i is the
            target id of draft id i. Never sorted.
        digest: hex SHA-256 of the ordered ids.
    """

    selected_token_ids: torch.Tensor
    digest: str

    @classmethod
    def from_ids(
        cls, selected_token_ids: torch.Tensor, selected_token_mask: torch.Tensor | None = None
    ) -> DraftVocab:
        """Check a mapping and take its digest.

        Args:
            selected_token_ids: [D] integer ids, any order, any device; copied.
            selected_token_mask: [V], non-zero for exactly those ids, any device; optional.

        Raises:
            InvalidRequest: empty, not 1-D, not integers, a repeated or negative id, or a mask that
                marks another set than the ids.
        """
        if selected_token_ids.ndim != 1 or selected_token_ids.numel() == 0:
            raise InvalidRequest(
                "selected_token_ids must be [D] with D >= 1; got shape "
                f"{list(selected_token_ids.shape)}"
            )
        dtype = selected_token_ids.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
            raise InvalidRequest(f"selected_token_ids must be integer ids; got {dtype}")
        ids = selected_token_ids.detach().to("cpu", torch.int64, copy=True).contiguous()
        ordered = ids.sort().values
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.numel():
            raise InvalidRequest(
                f"selected_token_ids must be distinct; id {int(repeated[0])} appears twice"
            )
        if int(ordered[0]) < 0:
            raise InvalidRequest(f"selected_token_ids must be >= 0; got {int(ordered[0])}")
        if selected_token_mask is not None:
            _check_mask(ordered, selected_token_mask)
        digest = hashlib.sha256(b"eagle3-draft-vocab-v1\0")
        digest.update(byte_view(ids))
        return cls(ids, digest.hexdigest())

    @property
    def draft_vocab_size(self) -> int:
        """D."""
        return self.selected_token_ids.numel()

    def check_range(self, vocab_size: int) -> None:
        """Check that the ids are of a target's vocab.

        Args:
            vocab_size: V, the width of the target's logits.

        Raises:
            InvalidRequest: an id is not in [0, V); the draft vocab is of another tokenizer.
        """
        largest = int(self.selected_token_ids.max())
        if largest >= vocab_size:
            raise InvalidRequest(
                f"selected_token_ids must be in [0, {vocab_size}), the target's vocab; got "
                f"{largest}. Build the draft vocab with this target's tokenizer"
            )

    def mask(self, vocab_size: int) -> torch.Tensor:
        """Return `selected_token_mask` [V] bool on the CPU, derived from the ids.

        Args:
            vocab_size: V, the width of the target's logits.
        """
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[self.selected_token_ids] = True
        return mask


def _check_mask(ordered_ids: torch.Tensor, mask: torch.Tensor) -> None:
    if mask.ndim != 1:
        raise InvalidRequest(f"selected_token_mask must be [V]; got shape {list(mask.shape)}")
    if int(ordered_ids[-1]) >= mask.numel():
        raise InvalidRequest(
            f"selected_token_ids must be in [0, {mask.numel()}), the length of "
            f"selected_token_mask; got {int(ordered_ids[-1])}. Build both for the target's vocab"
        )
    marked = mask.detach().to("cpu").ne(0).nonzero().squeeze(1)
    if not torch.equal(marked, ordered_ids):
        raise InvalidRequest(
            f"selected_token_mask must mark exactly the {ordered_ids.numel()} selected_token_ids; "
            f"it marks {marked.numel()} ids, another set. Derive it from the ids: "
            "mask = torch.zeros(V, dtype=torch.bool); mask[selected_token_ids] = True"
        )
