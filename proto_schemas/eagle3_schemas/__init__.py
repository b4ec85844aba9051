"""The contract between server and client: batches, backend interface, messages, frames, errors."""

from eagle3_schemas.aux_layers import (
    AUX_LAYER_CONVENTION,
    default_aux_layer_ids,
    validate_aux_layer_ids,
)
from eagle3_schemas.backend import BatchHandle, Eagle3TargetBackend, EmbeddingsLike
from eagle3_schemas.batch import Eagle3TargetBatch
from eagle3_schemas.draft_vocab import DraftVocab
from eagle3_schemas.messages import ModelInfo
from eagle3_schemas.protocol import PROTOCOL_VERSION
from eagle3_schemas.supervision import project_to_draft_vocab, shift_left_with_zero

__all__ = [
    "AUX_LAYER_CONVENTION",
    "PROTOCOL_VERSION",
    "BatchHandle",
    "DraftVocab",
    "Eagle3TargetBackend",
    "Eagle3TargetBatch",
    "EmbeddingsLike",
    "ModelInfo",
    "default_aux_layer_ids",
    "project_to_draft_vocab",
    "shift_left_with_zero",
    "validate_aux_layer_ids",
]
