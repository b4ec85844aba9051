"""The draft vocab: the target's most frequent tokens, numbered by frequency.

EAGLE-3 drafts over a subset of the target's vocab, because the head over all of it would cost more
than the rest of the draft. Letters: V target vocab, D draft vocab.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def count_tokens(documents: Iterable[Sequence[int]], vocab_size: int) -> Tensor:
    """Return how often each target id occurs, [V] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for document in documents:
        counts += torch.bincount(torch.tensor(document, dtype=torch.int64), minlength=vocab_size)
    return counts


def build_draft_vocab(
    token_counts: Tensor, draft_vocab_size: int, special_token_ids: Iterable[int] = ()
) -> tuple[Tensor, Tensor]:
    """Choose the draft vocab: special tokens first, then by falling count, ties by lowest id.

    Special tokens come first because text rarely contains them, yet a draft that cannot propose
    the end of a turn is rejected there every time.

    Args:
        token_counts: [V] int64.
        draft_vocab_size: D, at most V.
        special_token_ids: kept in this order; repeats are ignored.

    Returns:
        selected_token_ids [D] int64, whose order numbers the draft vocab, and
        selected_token_mask [V] bool.

    Raises:
        ValueError: D is out of range, or smaller than the number of special tokens.
    """
    special = list(dict.fromkeys(special_token_ids))
    if not max(1, len(special)) <= draft_vocab_size <= len(token_counts):
        raise ValueError(
            f"draft_vocab_size must be in [{max(1, len(special))}, {len(token_counts)}] for "
            f"{len(special)} special tokens; got {draft_vocab_size}"
        )
    # A stable sort leaves equal counts in the order of their ids.
    by_count = token_counts.argsort(descending=True, stable=True)
    special_ids = torch.tensor(special, dtype=torch.int64)
    ordinary_ids = by_count[~torch.isin(by_count, special_ids)]
    selected_token_ids = torch.cat([special_ids, ordinary_ids])[:draft_vocab_size]
    selected_token_mask = torch.zeros(len(token_counts), dtype=torch.bool)
    selected_token_mask[selected_token_ids] = True
    return selected_token_ids, selected_token_mask
