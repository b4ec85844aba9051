"""Which decoder layers are captured: the default rule, its check, and both naming conventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from eagle3_schemas.errors import InvalidRequest

AUX_LAYER_CONVENTION: Final = "layer_output"
"""Layer id i names the *output* of decoder layer i. vLLM and speculators name inputs (ours + 1):
`to_layer_inputs` and `from_layer_inputs` convert."""

NUM_AUX_LAYERS: Final = 3


def default_aux_layer_ids(num_hidden_layers: int) -> tuple[int, ...]:
    """Return `[1, L//2 - 1, L - 4]`, the EAGLE-3 default (as SpecForge and NeMo AutoModel have it).

    Raises:
        InvalidRequest: the target is too shallow for three distinct ids; pass `aux_layer_ids`.
    """
    ids = (1, num_hidden_layers // 2 - 1, num_hidden_layers - 4)
    if len(set(ids)) != NUM_AUX_LAYERS or not all(0 <= i < num_hidden_layers for i in ids):
        raise InvalidRequest(
            f"a target with {num_hidden_layers} decoder layers is too shallow for the default "
            f"aux_layer_ids [1, L//2 - 1, L - 4] = {list(ids)}, which must be 3 distinct ids in "
            f"[0, {num_hidden_layers}); pass aux_layer_ids explicitly"
        )
    return ids


def validate_aux_layer_ids(aux_layer_ids: Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Return the ids as a tuple if they are three distinct decoder layers.

    Raises:
        InvalidRequest: any other number of ids, a repeated one, or one out of range.
    """
    ids = tuple(aux_layer_ids)
    if (
        len(ids) != NUM_AUX_LAYERS
        or len(set(ids)) != NUM_AUX_LAYERS
        or not all(_is_layer(i, num_hidden_layers) for i in ids)
    ):
        raise InvalidRequest(
            f"aux_layer_ids must be {NUM_AUX_LAYERS} distinct ids in [0, {num_hidden_layers}) "
            f"(id i is the output of decoder layer i); got {list(ids)}"
        )
    return ids


def validate_layer_ids(layer_ids: Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Return the ids as a tuple if they are distinct decoder layers, in any number but none.

    Raises:
        InvalidRequest: none, a repeated one, or one out of range.
    """
    ids = tuple(layer_ids)
    if (
        not ids
        or len(set(ids)) != len(ids)
        or not all(_is_layer(i, num_hidden_layers) for i in ids)
    ):
        raise InvalidRequest(
            f"aux_layer_ids must be distinct ids in [0, {num_hidden_layers}), at least one (id i "
            f"is the output of decoder layer i); got {list(ids)}"
        )
    return ids


def _is_layer(layer_id: object, num_hidden_layers: int) -> bool:
    return (
        isinstance(layer_id, int)
        and not isinstance(layer_id, bool)
        and 0 <= layer_id < num_hidden_layers
    )


def to_layer_inputs(aux_layer_ids: Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Return the same hidden states' ids as serving engines name them, in the same order.

    vLLM and speculators (`eagle_aux_hidden_state_layer_ids`) name what a layer reads: the output of
    layer i is the input of layer i + 1. That of the last layer, L - 1, is L there.

    Args:
        aux_layer_ids: three distinct layer outputs, in [0, L).
        num_hidden_layers: L, the target's decoder layers.

    Raises:
        InvalidRequest: as `validate_aux_layer_ids`.
    """
    return tuple(i + 1 for i in validate_aux_layer_ids(aux_layer_ids, num_hidden_layers))


def from_layer_inputs(layer_input_ids: Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Return `aux_layer_ids` for ids of a serving engine's config; undoes `to_layer_inputs`.

    Args:
        layer_input_ids: three distinct layer inputs, in [1, L]. 0, the embeddings, is no layer's
            output, and cannot be captured here.
        num_hidden_layers: L, the target's decoder layers.

    Raises:
        InvalidRequest: any other number of ids, a repeated one, or one out of range.
    """
    ids = tuple(layer_input_ids)
    try:
        return validate_aux_layer_ids([i - 1 for i in ids if type(i) is int], num_hidden_layers)
    except InvalidRequest as exc:
        raise InvalidRequest(
            f"ids of layer inputs must be {NUM_AUX_LAYERS} distinct ids in "
            f"[1, {num_hidden_layers}] (id i is the input of decoder layer i, and "
            f"{num_hidden_layers} the output of the last); got {list(ids)}. Pass the draft "
            "config's eagle_aux_hidden_state_layer_ids, with this target's number of layers"
        ) from exc
