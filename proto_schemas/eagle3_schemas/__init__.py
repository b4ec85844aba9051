"""The contract between server and client: batches, backend interface, messages, frames, errors."""

from eagle3_schemas.aux_layers import (
    AUX_LAYER_CONVENTION,
    default_aux_layer_ids,
    from_layer_inputs,
    to_layer_inputs,
    validate_aux_layer_ids,
)
from eagle3_schemas.backend import BatchHandle, Eagle3TargetBackend, EmbeddingsLike
from eagle3_schemas.batch import Eagle3TargetBatch
from eagle3_schemas.capture import Capture
from eagle3_schemas.draft_vocab import DraftVocab
from eagle3_schemas.messages import ModelInfo
from eagle3_schemas.protocol import PROTOCOL_VERSION
from eagle3_schemas.ragged import pack_sequences, unpack_sequences
from eagle3_schemas.supervision import project_to_draft_vocab, shift_left_with_zero
from eagle3_schemas.tokenizer import tokenizer_digest

__all__ = [
    "AUX_LAYER_CONVENTION",
    "PROTOCOL_VERSION",
    "BatchHandle",
    "Capture",
    "DraftVocab",
    "Eagle3TargetBackend",
    "Eagle3TargetBatch",
    "EmbeddingsLike",
    "ModelInfo",
    "default_aux_layer_ids",
    "from_layer_inputs",
    "pack_sequences",
    "project_to_draft_vocab",
    "shift_left_with_zero",
    "to_layer_inputs",
    "tokenizer_digest",
    "unpack_sequences",
    "validate_aux_layer_ids",
]
