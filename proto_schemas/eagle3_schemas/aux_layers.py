"""Which decoder layers are captured: the default rule, its check, and both naming conventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from eagle3_schemas.errors import InvalidRequest

AUX_LAYER_CONVENTION: Final = "layer_output"
"""Layer id i names the *output* of decoder layer i. vLLM and speculators name inputs (ours + 1):
`to_layer_inputs` and `from_layer_inputs` convert."""

NUM_AUX_LAYERS: Final = 3

FEWEST_LAYERS: Final = 7
"""Decoder layers from which on the default rule gives three distinct ids."""


def default_aux_layer_ids(num_hidden_layers: int) -> tuple[int, ...]:
    """Return `[1, L//2 - 1, L - 4]`, the EAGLE-3 default (as SpecForge and NeMo AutoModel have it).

    Args:
        num_hidden_layers: L, the target's decoder layers.

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


def example_aux_layer_ids(num_hidden_layers: int) -> tuple[int, ...]:
    """Return three layers as far apart as three are, for a message to name; fewer where L < 3."""
    step = max((num_hidden_layers - 1) // 2, 1)
    return tuple(range(0, num_hidden_layers, step))[:NUM_AUX_LAYERS]


def validate_aux_layer_ids(aux_layer_ids: Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Return the ids as a tuple if they are three distinct decoder layers.

    Args:
        aux_layer_ids: layer outputs, in the order wanted.
        num_hidden_layers: L, the target's decoder layers.

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
        InvalidRequest: no sequence of integers, an empty one, a repeated id, or one out of range.
    """
    try:
        ids = tuple(layer_ids)
    except TypeError as exc:
        raise InvalidRequest(
            f"aux_layer_ids must be a sequence of integers; got {layer_ids!r:.100}"
        ) from exc
    are_layers = all(_is_layer(i, num_hidden_layers) for i in ids)
    if not ids or not are_layers or len(set(ids)) != len(ids):
        raise InvalidRequest(
            f"aux_layer_ids must be distinct integers in [0, {num_hidden_layers}), at least one "
            f"(id i is the output of decoder layer i); got {list(ids)!r:.200}"
        )
    return ids


def _is_layer(layer_id: object, num_hidden_layers: int) -> bool:
    return type(layer_id) is int and 0 <= layer_id < num_hidden_layers


def to_layer_inputs(aux_layer_ids: Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Return the same hidden states' ids as serving engines name them, in the same order.

    vLLM and speculators (`eagle_aux_hidden_state_layer_ids`) name what a layer reads: the output of
    layer i is the input of layer i + 1. That of the last layer, L - 1, is L there.

    Args:
        aux_layer_ids: distinct layer outputs in [0, L), at least one.
        num_hidden_layers: L, the target's decoder layers.

    Raises:
        InvalidRequest: as `validate_layer_ids`.
    """
    return tuple(i + 1 for i in validate_layer_ids(aux_layer_ids, num_hidden_layers))


def from_layer_inputs(layer_input_ids: Sequence[int], num_hidden_layers: int) -> tuple[int, ...]:
    """Return `aux_layer_ids` for ids of a serving engine's config; undoes `to_layer_inputs`.

    Args:
        layer_input_ids: distinct layer inputs in [1, L], at least one. 0, the embeddings, is no
            layer's output, and cannot be captured: take `get_input_embeddings`.
        num_hidden_layers: L, the target's decoder layers.

    Raises:
        InvalidRequest: none, a repeated id, or one out of range.
    """
    ids = tuple(layer_input_ids)
    try:
        outputs = [i - 1 if type(i) is int else -1 for i in ids]
        return validate_layer_ids(outputs, num_hidden_layers)
    except InvalidRequest as exc:
        raise InvalidRequest(
            f"ids of layer inputs must be distinct integers in [1, {num_hidden_layers}], at least "
            f"one (id i is the input of decoder layer i, and {num_hidden_layers} the output of the "
            f"last); got {list(ids)}. Pass the draft config's eagle_aux_hidden_state_layer_ids, "
            "with this target's number of layers"
        ) from exc
