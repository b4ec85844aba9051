"""One model family: tiny, random, different in every dimension that must not be mixed up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

V, H, L = 211, 48, 6
SEED = 20240917
WINDOW = 5  # shorter than any test's T, so a lost sliding window shows

SLIDING = ["sliding_attention", "full_attention"]

CORE = {  # the words most configs share; others translate below
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 72,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as the docs say it.
        architecture: transformers' class.
        config: overrides of CORE for a text model; for a multimodal one, its text config's.
        outer: a multimodal model's own config (vision tower, ids); None for a text model.
        transform: fields of the `LogitsTransform` that the head must be found to have in bfloat16;
            none: identity. An upcast shows in bfloat16 only.
        layers: where the decoder layers are; said here, so that finding them is tested too.
        norm: where the final norm is.
        hidden_states_offset: `output_hidden_states[i + offset]` is what layer i gives; 1 where the
            list starts with the embeddings.
        core: whether the config starts from CORE.
        is_key: runs unmarked; the others are `slow`.
    """

    name: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    outer: dict[str, Any] | None = None
    transform: dict[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    norm: str = "model.norm"
    hidden_states_offset: int = 1
    core: bool = True
    is_key: bool = False

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Build the model; each call gives the same weights, in memory of its own."""
        cls = getattr(transformers, self.architecture)
        text = {**CORE, **self.config} if self.core else dict(self.config)
        torch.manual_seed(SEED)
        if self.outer is None:
            config = cls.config_class(**text)
        else:
            config = cls.config_class(text_config=text, **self.outer)
        model: nn.Module = cls._from_config(config, dtype=dtype)
        return randomize(model).eval()


def randomize(model: nn.Module) -> nn.Module:
    """Give every weight a scale at which it matters.

    Initial weights would hide mistakes: norms of 1, biases of 0, and logits so close to each other
    that the argmax is an accident of rounding.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_((0.1 * noise).to(parameter.dtype))
            elif "embed" in name or "wte" in name or "lm_head" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
MROPE = {**ROPE, "mrope_section": [2, 2, 2]}
VL_IDS = {
    "image_token_id": 201,
    "video_token_id": 202,
    "vision_start_token_id": 203,
    "vision_end_token_id": 204,
}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
LINEAR = {
    "head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 3,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": SLIDING * 3}
