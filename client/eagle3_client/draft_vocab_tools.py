"""Draft vocabs: built from token counts, judged by coverage, and converted to and from `t2d`/`d2t`.

Letters: V target vocab (`model_info().vocab_size`), D draft vocab. Everything returned is on the
CPU; arguments may be on any device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import InvalidRequest


class SpecForgeMapping(NamedTuple):
    """A draft vocab as SpecForge's checkpoints have it, and how to get the draft's head there."""

    t2d: torch.Tensor
    """[V] bool: the target ids in the draft vocab, which are numbered in ascending order."""
    d2t: torch.Tensor
    """[D] int64: target id of draft id i, less i."""
    row_order: torch.Tensor
    """[D] int64: row i of the head that goes with `d2t` is row `row_order[i]` of the head trained:
    `weight[row_order]`, and the same for a bias. 0, 1, 2, … if the ids ascended already."""


def count_token_ids(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]], vocab_size: int
) -> torch.Tensor:
    """Count the target ids that are supervised.

    Args:
        batches: pairs `(input_ids, loss_mask)` of any, equal shape: integer ids in [0, V), and
            non-zero where they count; None for the mask counts all.
        vocab_size: V.

    Returns:
        [V] int64 counts.

    Raises:
        InvalidRequest: an item that is no such pair, or an id outside [0, V).
    """
    if vocab_size < 1:
        raise InvalidRequest(f"vocab_size must be >= 1, the target's V; got {vocab_size}")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for index, batch in enumerate(batches):
        ids = _counted_ids(batch, index)
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            raise InvalidRequest(
                f"batch {index}: input_ids must be in [0, {vocab_size}); got "
                f"{int(ids.min())} to {int(ids.max())}. Use the target's tokenizer and its V"
            )
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def _counted_ids(batch: object, index: int) -> torch.Tensor:
    match batch:
        case (torch.Tensor() as input_ids, (torch.Tensor() | None) as loss_mask):
            pass
        case _:
            raise InvalidRequest(
                f"batch {index}: expected (input_ids, loss_mask), two tensors; got "
                f"{type(batch).__name__}. Build the pairs as (b['input_ids'], b['loss_mask'])"
            )
    if not _is_integer(input_ids):
        raise InvalidRequest(f"batch {index}: input_ids must be integers; got {input_ids.dtype}")
    if loss_mask is None:
        return input_ids.detach().reshape(-1).to("cpu", torch.int64)
    if loss_mask.shape != input_ids.shape:
        raise InvalidRequest(
            f"batch {index}: loss_mask must have the shape of input_ids, {list(input_ids.shape)}; "
            f"got {list(loss_mask.shape)}"
        )
    return input_ids.detach()[loss_mask.detach().to(input_ids.device) != 0].to("cpu", torch.int64)


def build_draft_vocab(
    token_counts: torch.Tensor, draft_vocab_size: int, special_token_ids: Iterable[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a draft vocab: special tokens, then by falling count, ties by lowest id.

    Special tokens come first because text rarely contains them, yet a draft that cannot propose the
    end of a turn is rejected there every time. Tokens never counted fill what is left.

    Args:
        token_counts: [V] integers >= 0.
        draft_vocab_size: D, at most V.
        special_token_ids: kept in this order; repeats are ignored.

    Returns:
        `(selected_token_ids [D] int64, selected_token_mask [V] bool)`, the arguments of
        `set_vocab_mapping`. The order of the ids numbers the draft vocab.

    Raises:
        InvalidRequest: counts that are none, a special id outside [0, V), or a D that is out of
            range or has no room for the special tokens.
    """
    counts = _checked_counts(token_counts)
    vocab_size = counts.numel()
    special = list(dict.fromkeys(int(token_id) for token_id in special_token_ids))
    if outside := [token_id for token_id in special if not 0 <= token_id < vocab_size]:
        raise InvalidRequest(
            f"special_token_ids must be in [0, {vocab_size}), the length of token_counts; got "
            f"{outside}. Leave out those the target has no logits for"
        )
    smallest = max(1, len(special))
    if not smallest <= draft_vocab_size <= vocab_size:
        raise InvalidRequest(
            f"draft_vocab_size must be in [{smallest}, {vocab_size}] for {len(special)} special "
            f"tokens and a target vocab of {vocab_size}; got {draft_vocab_size}"
        )
    # A stable sort leaves equal counts in the order of their ids.
    by_count = counts.argsort(descending=True, stable=True)
    special_ids = torch.tensor(special, dtype=torch.int64)
    ordinary_ids = by_count[~torch.isin(by_count, special_ids)]
    ids = torch.cat([special_ids, ordinary_ids])[:draft_vocab_size]
    return ids, DraftVocab.from_ids(ids).mask(vocab_size)


def draft_vocab_coverage(selected_token_ids: torch.Tensor, token_counts: torch.Tensor) -> float:
    """Return the share of counted tokens that are in the draft vocab, in [0, 1].

    Counted on text that was not used to choose it, this bounds the share of tokens that the draft
    can get right.

    Args:
        selected_token_ids: [D] distinct ids in [0, V), in any order.
        token_counts: [V] integers >= 0, not all 0.

    Raises:
        InvalidRequest: another shape, dtype or range, or nothing was counted.
    """
    counts = _checked_counts(token_counts)
    vocab = DraftVocab.from_ids(selected_token_ids)
    vocab.check_range(counts.numel())
    if (total := int(counts.sum())) == 0:
        raise InvalidRequest("token_counts must count at least one token; all are 0")
    return int(counts[vocab.selected_token_ids].sum()) / total


def _checked_counts(token_counts: torch.Tensor) -> torch.Tensor:
    if token_counts.ndim != 1 or token_counts.numel() == 0 or not _is_integer(token_counts):
        raise InvalidRequest(
            "token_counts must be [V] integers, as count_token_ids returns them; got shape "
            f"{list(token_counts.shape)}, {token_counts.dtype}"
        )
    counts = token_counts.detach().to("cpu", torch.int64)
    if int(counts.min()) < 0:
        raise InvalidRequest(f"token_counts must be >= 0; got {int(counts.min())}")
    return counts


def _is_integer(tensor: torch.Tensor) -> bool:
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def to_t2d_d2t(
    selected_token_ids: torch.Tensor, vocab_size: int, *, reorder: bool = False
) -> SpecForgeMapping:
    """Convert a draft vocab to SpecForge's `t2d` and `d2t`, which number it in ascending order.

    Args:
        selected_token_ids: [D] distinct ids in [0, V).
        vocab_size: V.
        reorder: allow ids that do not ascend. The draft's head then fits the result only after its
            rows were put in the returned `row_order`: until then every draft token is another one.

    Raises:
        InvalidRequest: ids that are no draft vocab, or do not ascend without `reorder`.
    """
    vocab = DraftVocab.from_ids(selected_token_ids)
    vocab.check_range(vocab_size)
    ids = vocab.selected_token_ids
    row_order = ids.argsort()
    if not reorder and (wrong := (ids.diff() < 0).nonzero()).numel():
        place = int(wrong[0, 0])
        raise InvalidRequest(
            "t2d and d2t number the draft vocab in ascending order; expected ascending "
            f"selected_token_ids, got {int(ids[place])} before {int(ids[place + 1])}. Pass "
            "reorder=True and put the draft head's rows in the row_order returned, or train on "
            "sorted ids"
        )
    ascending = ids[row_order]
    d2t = ascending - torch.arange(ascending.numel())
    return SpecForgeMapping(vocab.mask(vocab_size), d2t, row_order)


def from_t2d_d2t(t2d: torch.Tensor, d2t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert SpecForge's `t2d` and `d2t` to a draft vocab, checking one against the other.

    Args:
        t2d: [V] bool, or numbers that are non-zero for the ids in the draft vocab.
        d2t: [D] integers: target id of draft id i, less i.

    Returns:
        `(selected_token_ids [D] int64, selected_token_mask [V] bool)`, the arguments of
        `set_vocab_mapping`, in ascending order: that of the checkpoint's head.

    Raises:
        InvalidRequest: they name different ids, or `d2t` does not ascend, as `t2d` implies.
    """
    if t2d.ndim != 1 or d2t.ndim != 1 or not _is_integer(d2t):
        raise InvalidRequest(
            f"t2d must be [V] bool and d2t [D] integers; got {list(t2d.shape)} {t2d.dtype} and "
            f"{list(d2t.shape)} {d2t.dtype}"
        )
    expected = t2d.detach().to("cpu").ne(0).nonzero().squeeze(1)
    ids = d2t.detach().to("cpu", torch.int64) + torch.arange(d2t.numel())
    if not torch.equal(ids, expected):
        is_reordered = torch.equal(ids.sort().values, expected)
        reason = "in another order" if is_reordered else "other ids"
        raise InvalidRequest(
            f"expected d2t[i] + i to be the {expected.numel()} ids that t2d marks, ascending; got "
            f"{ids.numel()} ids, {reason}. "
            + (
                "Whoever wrote it numbered the draft vocab otherwise than t2d: ask which of the "
                "two its head was trained with, and pass that order to set_vocab_mapping"
                if is_reordered
                else "Take both from one checkpoint; if d2t holds target ids, subtract "
                "torch.arange(D) first"
            )
        )
    vocab = DraftVocab.from_ids(ids)
    return vocab.selected_token_ids, vocab.mask(t2d.numel())
