"""`draft_config`: what a draft checkpoint must name, so that it is served as it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eagle3_schemas import AUX_LAYER_CONVENTION, DraftVocab, ModelInfo, to_layer_inputs
from eagle3_schemas.errors import InvalidRequest, ProtocolMismatch


def draft_config(
    info: ModelInfo, aux_layer_ids: Sequence[int] | None, draft_vocab: DraftVocab
) -> dict[str, Any]:
    """Return the fields of `RemoteEagle3Backend.draft_config`, which documents them.

    Args:
        info: of the target.
        aux_layer_ids: the trainer's (layer outputs), or None for the server's default.
        draft_vocab: the trainer's.

    Raises:
        InvalidRequest: `aux_layer_ids` are not layers of the target, or there are none.
        ProtocolMismatch: the server names layers otherwise than this side.
    """
    if info.aux_layer_convention != AUX_LAYER_CONVENTION:
        raise ProtocolMismatch(
            f"expected aux_layer_ids that name a {AUX_LAYER_CONVENTION}; the server's name a "
            f"{info.aux_layer_convention}. Upgrade the older side"
        )
    ids = info.aux_layer_ids if aux_layer_ids is None else aux_layer_ids
    if ids is None:
        raise InvalidRequest(
            f"the target's {info.num_hidden_layers} decoder layers are too few for the default "
            "aux_layer_ids; pass aux_layer_ids to the backend"
        )
    return {
        "eagle_aux_hidden_state_layer_ids": list(to_layer_inputs(ids, info.num_hidden_layers)),
        "draft_vocab_size": draft_vocab.draft_vocab_size,
        "draft_vocab_digest": draft_vocab.digest,
        "target_hidden_size": info.hidden_size,
        "target_model_id": info.model_id,
        "target_revision": info.revision,
        "target_fingerprint": info.fingerprint,
    }
