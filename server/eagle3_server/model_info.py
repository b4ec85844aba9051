"""What a server says of its target: `GET /v1/model`."""

from __future__ import annotations

from importlib.metadata import version

import torch

from eagle3_schemas import AUX_LAYER_CONVENTION, ModelInfo
from eagle3_schemas.capture import OUTPUTS
from eagle3_schemas.messages import Limits
from eagle3_server.engine import TargetDescription


def model_info(target: TargetDescription, limits: Limits, deterministic: bool | None) -> ModelInfo:
    """Join what the target is with what the server adds to it."""
    return ModelInfo(
        server_version=version("eagle3-remote"),
        model_id=target.model_id,
        revision=target.revision,
        architecture=target.architecture,
        fingerprint=target.fingerprint,
        quantization=target.quantization,
        tokenizer_digest=target.tokenizer_digest,
        num_hidden_layers=target.num_hidden_layers,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        input_vocab_size=target.input_vocab_size,
        dtype=target.dtype,
        device=target.device,
        device_name=target.device_name,
        attn_implementation=target.attn_implementation,
        torch_version=torch.__version__,
        num_threads=target.num_threads,
        deterministic=deterministic,
        aux_layer_ids=target.aux_layer_ids,
        aux_layer_convention=AUX_LAYER_CONVENTION,
        hooks=target.hooks,
        hooks_reason=target.hooks_reason,
        head=target.head,
        head_reason=target.head_reason,
        encodings=target.encodings,
        config_digest=target.config_digest,
        weights_digest=target.weights_digest,
        packing=target.packing,
        packing_reason=target.packing_reason,
        outputs={name: OUTPUTS[name] for name in target.outputs},
        outputs_reason=target.outputs_reason,
        limits=limits,
    )


def limits_of(
    target: TargetDescription, max_tokens_per_request: int, max_body_bytes: int
) -> Limits:
    """Join what one request may hold by the settings with what the target can take."""
    return Limits(
        max_tokens_per_request=max_tokens_per_request,
        max_sequence_length=target.max_sequence_length,
        max_body_bytes=max_body_bytes,
    )
