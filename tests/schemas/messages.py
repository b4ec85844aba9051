"""What tests of messages share: the smallest of each kind, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.inspection import InspectRequest
from eagle3_schemas.messages import (
    DraftHeadFields,
    DraftVocabInfo,
    Limits,
    Message,
    ModelInfo,
    SupervisionRequest,
    SupervisionResponse,
    parse,
)
from eagle3_schemas.self_check import SelfCheck

DIGEST = "0123456789abcdef" * 4

LIMITS = {"max_tokens_per_request": 65536, "max_sequence_length": None, "max_body_bytes": 1 << 30}
SMALLEST: dict[type[Message], dict[str, Any]] = {
    SupervisionRequest: {
        "request_id": "req-1",
        "batch_size": 2,
        "sequence_length": 7,
        "draft_vocab_digest": DIGEST,
    },
    SupervisionResponse: {
        "request_id": "req-1",
        "fingerprint": "f" * 32,
        "draft_vocab_digest": DIGEST,
        "aux_layer_ids": [1, 2, 4],
        "encoding": "probs",
        "rows": "all",
        "aux_dtype": "model",
    },
    DraftHeadFields: {
        "fingerprint": "f" * 32,
        "draft_vocab_digest": DIGEST,
        "upcast": True,
        "multiply": 0.0625,
        "divide": None,
        "softcap": 30.0,
    },
    Limits: LIMITS,
    DraftVocabInfo: {"digest": DIGEST, "draft_vocab_size": 11},
    ModelInfo: {
        "protocol_version": 1,
        "server_version": "0.1.0",
        "model_id": "Qwen/Qwen3-8B",
        "revision": None,
        "architecture": "Qwen3ForCausalLM",
        "fingerprint": "f" * 32,
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "vocab_size": 151936,
        "input_vocab_size": 151936,
        "dtype": "bfloat16",
        "device": "cuda:0",
        "device_name": "a GPU",
        "attn_implementation": "sdpa",
        "torch_version": "2.13.0",
        "num_threads": 2,
        "aux_layer_ids": [1, 17, 32],
        "aux_layer_convention": "layer_output",
        "head": "full",
        "head_reason": "no output embeddings",
        "encodings": ["probs", "logits"],
        "limits": LIMITS,
    },
    InspectRequest: {"text": "tea"},
    SelfCheck: {"name": "hooks", "status": "not_applicable", "words": "not comparable"},
}


def refused(kind: type[Message], **changes: Any) -> str:
    """Return the error's text for a message whose fields are changed; None drops nothing."""
    with pytest.raises(InvalidRequest) as caught:
        parse(kind, {**SMALLEST[kind], **changes})
    return caught.value.detail
