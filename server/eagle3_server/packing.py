"""Packed rows: a forward in which documents that share a row do not see one another.

Two ways. *Masked*: one forward of the packed rows under a block-causal mask, which is what a
co-located trainer runs. *Documents*: each document is a row of its own, next to others of about its
length; it needs nothing of the model, and is cheaper where rows hold many documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from eagle3_schemas.errors import PackingUnsupported
from eagle3_schemas.packing import Document, documents_of, restarting_positions
from eagle3_server.context_parallel import ContextParallel
from eagle3_server.forward import ForwardResult, forward_with_aux

PackingRoute = Literal["masked", "documents"]

_SURPLUS = 1.125  # tokens computed for a token asked for, where documents are padded to one length
_FEW_TOKENS = 128  # of padding: a forward of its own would cost as much, the weights are read anew


@dataclass(frozen=True)
class Packing:
    """How a target runs packed rows when it must do as a co-located one does."""

    route: PackingRoute
    reason: str | None
    """Why it is not `masked`, or None."""
    surplus: float = _SURPLUS
    """Tokens computed for a token asked for, at most, where each document is a row of its own; 1.0
    pads nothing."""

    def by_document(self) -> Packing:
        """Return the way that any target can go, and the cheapest."""
        return replace(self, route="documents")

    def fewest_tokens(self, seq_lens: torch.Tensor) -> int:
        """Return the size of the smallest forward that packed rows are computed in."""
        if self.route == "masked":
            return int(seq_lens.sum())
        groups = grouped(documents_of(seq_lens), self.surplus)
        return min(len(group) * group[0].length for group in groups)


def forward_packed(
    model: nn.Module,
    packing: Packing,
    input_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    aux_layer_ids: Sequence[int],
    head_to_cut: nn.Module | None = None,
    context: ContextParallel | None = None,
) -> ForwardResult:
    """Run packed rows in either way; see `forward_masked` and `forward_documents`."""
    if packing.route == "masked":
        return forward_masked(model, input_ids, seq_lens, aux_layer_ids, head_to_cut)
    return forward_documents(
        model,
        input_ids,
        seq_lens,
        aux_layer_ids,
        head_to_cut,
        surplus=packing.surplus,
        context=context,
    )


def forward_masked(
    model: nn.Module,
    input_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    aux_layer_ids: Sequence[int],
    head_to_cut: nn.Module | None = None,
) -> ForwardResult:
    """Run packed rows in one forward, block-causally, each layer's sliding window kept.

    transformers builds the masks, as for its own `generate`: per kind of layer where a model mixes
    them, and none for FlashAttention, which finds the documents by their positions.

    Args:
        model: a causal LM for which `find_packing` says `masked`.
        input_ids: [B, T] on its device.
        seq_lens: [B, max_docs], checked.
        aux_layer_ids: as in `forward_with_aux`.
        head_to_cut: as in `forward_with_aux`.

    Raises:
        PackingUnsupported: the model takes no position ids, or FlashAttention with several rows.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise PackingUnsupported(f"{type(model).__name__} takes no position_ids")
    if is_flash(model) and input_ids.shape[0] != 1:
        raise PackingUnsupported(
            "packed rows with FlashAttention must come one a batch, B = 1, where they are to be "
            f"computed as one forward; got B = {input_ids.shape[0]}. Send one row a batch, serve "
            "with --attn-implementation sdpa, or drop exact"
        )
    positions = restarting_positions(seq_lens.to(input_ids.device), input_ids.shape[1])
    return forward_with_aux(
        model,
        input_ids,
        _block_causal_masks(model, input_ids, positions),
        aux_layer_ids,
        head_to_cut,
        position_ids=positions,
    )


def _block_causal_masks(model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> Any:
    """Return what this model takes for a mask: a tensor, a dict by kind of layer, or None."""
    from transformers.masking_utils import create_masks_for_generate

    build = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    weight: torch.Tensor = next(model.parameters())
    # Only its shape, dtype and device are read.
    embeds = torch.empty(*input_ids.shape, 0, dtype=weight.dtype, device=input_ids.device)
    takes = inspect.signature(build).parameters
    cache: Any = {"cache" if "cache" in takes else "past_key_values": None}  # renamed in 5.24
    config: Any = model.config
    return build(
        config=config, inputs_embeds=embeds, attention_mask=None, position_ids=positions, **cache
    )


def is_flash(model: nn.Module) -> bool:
    """Whether a model's attention is FlashAttention, which finds documents by their positions."""
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


def forward_documents(
    model: nn.Module,
    input_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    aux_layer_ids: Sequence[int],
    head_to_cut: nn.Module | None = None,
    *,
    surplus: float,
    context: ContextParallel | None = None,
) -> ForwardResult:
    """Run each packed document as a row of its own; the result is laid out as the packed rows.

    Padding at a document's end is computed as tokens are, as it is in the masked way: nothing
    before it can tell.

    Args:
        model: a causal LM.
        input_ids: [B, T] on its device.
        seq_lens: [B, max_docs], checked.
        aux_layer_ids: as in `forward_with_aux`.
        head_to_cut: as in `forward_with_aux`; `logits` are then one row of no meaning.
        surplus: tokens computed for a token asked for, at most; 1.0 pads nothing.
        context: as in `forward_with_aux`.
    """
    ids, total = input_ids.flatten(), input_ids.numel()
    states: list[torch.Tensor] = []
    logits: torch.Tensor | None = None
    head_input: torch.Tensor | None = None
    for group in grouped(documents_of(seq_lens), surplus):
        places, is_real = _places(group, input_ids.shape[1], input_ids.device)
        result = forward_with_aux(
            model, ids[places], is_real, aux_layer_ids, head_to_cut, context=context
        )
        source, target = is_real.flatten(), places[is_real]
        if logits is None:  # not `states`, which stay empty where no layer is wanted
            states = [_spread(s, total) for s in result.aux_states]
            logits = result.logits if head_to_cut is not None else _spread(result.logits, total)
            if result.head_input is not None:
                head_input = _spread(result.head_input, total)
        for whole, part in zip(states, result.aux_states, strict=True):
            whole[target] = part.flatten(0, 1)[source]
        if head_input is not None and result.head_input is not None:
            head_input[target] = result.head_input.flatten(0, 1)[source]
        if head_to_cut is None and logits is not None:
            logits[target] = result.logits.flatten(0, 1)[source]
    assert logits is not None
    shape = tuple(input_ids.shape)
    return ForwardResult(
        tuple(whole.view(*shape, -1) for whole in states),
        logits if head_to_cut is not None else logits.view(*shape, -1),
        None if head_input is None else head_input.view(*shape, -1),
    )


def _spread(like: torch.Tensor, total: int) -> torch.Tensor:
    """Return room for `total` rows of [b, t, C]; every one is written, for lengths sum to T."""
    return like.new_empty(total, like.shape[-1])


def _places(
    group: Sequence[Document], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a group's tokens lie in the flattened batch [n, longest], and which are real.

    Places beyond a document's end repeat its last.
    """
    starts = torch.tensor([each.row * length + each.start for each in group], device=device)
    lengths = torch.tensor([each.length for each in group], device=device)
    columns = torch.arange(max(each.length for each in group), device=device)
    places = starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)
    return places, columns < lengths[:, None]


def grouped(documents: Sequence[Document], surplus: float) -> Iterator[list[Document]]:
    """Split documents into groups of about one length, the longest first.

    A group's tokens are at most `surplus` times its real ones, or a few more (unless 1.0).
    """
    few = _FEW_TOKENS if surplus > 1.0 else 0
    group: list[Document] = []
    real = 0
    for document in sorted(documents, key=lambda each: -each.length):
        longest = group[0].length if group else document.length
        padded = (len(group) + 1) * longest
        real += document.length
        if group and padded > max(surplus * real, real + few):
            yield group
            group, real = [], document.length
        group.append(document)
    if group:
        yield group
