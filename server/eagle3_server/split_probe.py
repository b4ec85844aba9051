"""`prove_split`: whether a model's sequences can be split over ranks, found on a probe."""

from __future__ import annotations

import inspect
from typing import Final

import torch
from torch import nn

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.context_parallel import ContextParallel
from eagle3_server.forward import ForwardResult, forward_with_aux
from eagle3_server.layout import (
    decoder_layers,
    max_sequence_length,
    positions_depend_on_length,
    text_config,
)
from eagle3_server.packing import Packing

ONE_BY_ONE: Final = Packing("documents", "a sequence that is split over ranks has one document")
"""How packed rows run under context parallelism."""

_COLUMNS = 21  # of a rank, and some: the ranks' shares are not equal
# Largest relative difference of a token's state or logits. Of 48 families that can be split: 6e-6
# and 0.06; of one that cannot, and yet runs: 0.3.
_SAME, _SAME_HALF = {torch.float32: 1e-4}, 0.1


def prove_split(model: nn.Module, context: ContextParallel) -> None:
    """Compare a split forward with a whole one: three rows, one padded left and one right.

    Every rank must call it. A model that keeps a state from token to token, or counts positions in
    its own way, comes out otherwise and is refused.

    Args:
        model: a causal LM on its device, in eval mode.
        context: ranks to split its sequences over.

    Raises:
        InvalidRequest: its sequences cannot be split; the message says why.
    """
    refusal = f"{type(model).__name__} cannot be served under context parallelism"
    remedy = "Serve it without --cp, or without cp_mesh"
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InvalidRequest(f"{refusal}: its forward takes no past_key_values. {remedy}")
    if positions_depend_on_length(model):
        raise InvalidRequest(
            f"{refusal}: its rotary positions change with the length of a row. {remedy}"
        )
    input_ids, attention_mask = _probe(model, context)
    if not context.splits(input_ids.shape[1]):
        raise InvalidRequest(
            f"{refusal}: its {input_ids.shape[1]} positions are too few for {context.size} ranks. "
            f"{remedy}"
        )
    layers = range(len(decoder_layers(model)))
    whole = forward_with_aux(model, input_ids, attention_mask, layers)
    try:
        split = forward_with_aux(model, input_ids, attention_mask, layers, context=context)
    except Exception as exc:  # whatever a model does with a cache it does not know
        raise InvalidRequest(f"{refusal}: {exc!r:.300}. {remedy}") from exc
    error = _difference(whole, split, attention_mask)
    if not error <= _SAME.get(whole.aux_states[0].dtype, _SAME_HALF):
        raise InvalidRequest(
            f"{refusal}: a split sequence differs from the whole by {error:.2g} (relative). "
            f"{remedy}"
        )


def _probe(model: nn.Module, context: ContextParallel) -> tuple[torch.Tensor, torch.Tensor]:
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    count = min(weight.shape[0], int(getattr(text_config(model), "vocab_size", weight.shape[0])))
    length = _COLUMNS * context.size + 1
    length = min(length, max_sequence_length(model) or length)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(count, (3, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -length // 4 :] = 0
    attention_mask[2, : length // 4] = 0
    return input_ids.to(weight.device), attention_mask.to(weight.device)


def _difference(whole: ForwardResult, split: ForwardResult, mask: torch.Tensor) -> float:
    """Return the largest |a - b| / |a| of an attended token; NaN is the largest.

    Of each token, for a state that is lost where ranks meet may reach no more than a few.
    """
    worst = 0.0
    pairs = [*zip(whole.aux_states, split.aux_states, strict=True), (whole.logits, split.logits)]
    for a, b in pairs:
        a, b = a[mask.bool()].float(), b[mask.bool()].float()
        error = float(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12)).max())
        worst = error if error != error or error > worst else worst
    return worst
