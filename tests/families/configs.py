"""The model families: tiny, random, and different in every dimension that must not be mixed up."""

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


_MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_MROPE = {**_ROPE, "mrope_section": [2, 2, 2]}
_VL_IDS = {
    "image_token_id": 201,
    "video_token_id": 202,
    "vision_start_token_id": 203,
    "vision_end_token_id": 204,
}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 24,
}
_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 8,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_LLAMA4 = {
    "head_dim": 12,
    "intermediate_size_mlp": 80,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": WINDOW,
}
_LLAMA4_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vision_output_dim": 32,
    "image_size": 16,
    "patch_size": 8,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
_LINEAR = {
    "head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 3,
}
_WINDOWED = {"sliding_window": WINDOW, "layer_types": SLIDING * 3}

FAMILIES = [
    Family("Llama", "LlamaForCausalLM", is_key=True),
    Family("Qwen2", "Qwen2ForCausalLM"),
    Family("Qwen3", "Qwen3ForCausalLM", {"head_dim": 16}),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", {"head_dim": 16, **_MOE}),
    Family("Mixtral", "MixtralForCausalLM", _MOE),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": WINDOW}),
    Family(
        "Gemma2",
        "Gemma2ForCausalLM",
        {"head_dim": 16, **_WINDOWED, "final_logit_softcapping": 5.0, "pad_token_id": 0},
        transform={"softcap": 5.0},
        is_key=True,
    ),
    Family(
        "Gemma3 (text)",
        "Gemma3ForCausalLM",
        {"head_dim": 16, **_WINDOWED, "final_logit_softcapping": 5.0, "pad_token_id": 0},
        transform={"softcap": 5.0},
    ),
    Family(
        "Gemma3 (conditional)",
        "Gemma3ForConditionalGeneration",
        {"head_dim": 16, **_WINDOWED, "pad_token_id": 0},
        outer={"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 201},
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family(
        "Gemma4 (text)",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            **_WINDOWED,
            "final_logit_softcapping": 5.0,
            "pad_token_id": 0,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 20,
            "num_kv_shared_layers": 2,
        },
        transform={"softcap": 5.0},
    ),
    Family(
        "Phi3",
        "Phi3ForCausalLM",
    ),
    Family(
        "GPT-OSS",
        "GptOssForCausalLM",
        {"head_dim": 12, **_WINDOWED, **_MOE, "rope_parameters": _ROPE},
    ),
    Family("OLMo2", "Olmo2ForCausalLM"),
    Family("OLMo3", "Olmo3ForCausalLM", _WINDOWED),
    Family(
        "Cohere",
        "CohereForCausalLM",
        {"logit_scale": 0.3, "pad_token_id": 0},
        transform={"multiply": 0.3},
        is_key=True,
    ),
    Family(
        "Cohere2",
        "Cohere2ForCausalLM",
        {"logit_scale": 0.3, "head_dim": 12, **_WINDOWED, "pad_token_id": 0},
        transform={"multiply": 0.3},
    ),
    Family(
        "Granite",
        "GraniteForCausalLM",
        {
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
        transform={"divide": 3.0},
        is_key=True,
    ),
    Family(
        "GraniteMoE",
        "GraniteMoeForCausalLM",
        {**_MOE, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
        transform={"divide": 3.0},
    ),
    Family(
        "GPT2",
        "GPT2LMHeadModel",
        {
            "vocab_size": V,
            "n_embd": H,
            "n_inner": 72,
            "n_layer": L,
            "n_head": 4,
            "n_positions": 96,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        core=False,
        is_key=True,
        layers="transformer.h",
        norm="transformer.ln_f",
    ),
    Family(
        "GPT-NeoX", "GPTNeoXForCausalLM", layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm"
    ),
    Family(
        "Falcon",
        "FalconForCausalLM",
        {"ffn_hidden_size": 72},
        layers="transformer.h",
        norm="transformer.ln_f",
    ),
    Family(
        "OPT",
        "OPTForCausalLM",
        {"ffn_dim": 72, "word_embed_proj_dim": H, "pad_token_id": 1},
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
    ),
    Family(
        "Bloom",
        "BloomForCausalLM",
        {"vocab_size": V, "hidden_size": H, "n_layer": L, "n_head": 4},
        core=False,
        layers="transformer.h",
        norm="transformer.ln_f",
    ),
    Family(
        "MPT",
        "MptForCausalLM",
        {"vocab_size": V, "d_model": H, "n_layers": L, "n_heads": 4, "max_seq_len": 96},
        core=False,
        layers="transformer.blocks",
        norm="transformer.norm_f",
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 40,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 20,
            "q_lora_rank": 28,
            "qk_rope_head_dim": 8,
            "v_head_dim": 14,
            "qk_nope_head_dim": 10,
            "first_k_dense_replace": 2,
        },
    ),
    Family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        {"rope_parameters": _MROPE},
        outer={
            "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": H},
            **_VL_IDS,
        },
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": _MROPE},
        outer={
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 40,
                "out_hidden_size": H,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_VL_IDS,
        },
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        {"head_dim": 12, "rope_parameters": _MROPE},
        outer={
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 40,
                "out_hidden_size": H,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **_VL_IDS,
        },
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family(
        "LLaVA",
        "LlavaForConditionalGeneration",
        {"model_type": "llama"},
        outer={"vision_config": _CLIP, "image_token_index": 201},
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family(
        "Mistral3",
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
        outer={"vision_config": _PIXTRAL, "image_token_index": 201, "spatial_merge_size": 1},
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family("GLM4", "Glm4ForCausalLM", {"head_dim": 12}),
    Family(
        "GLM4-MoE",
        "Glm4MoeForCausalLM",
        {
            "head_dim": 12,
            "moe_intermediate_size": 40,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 2,
        },
    ),
    Family("Llama4 (text)", "Llama4ForCausalLM", _LLAMA4),
    Family(
        "Llama4 (conditional)",
        "Llama4ForConditionalGeneration",
        _LLAMA4,
        outer={
            "vision_config": _LLAMA4_VISION,
            "image_token_index": 201,
            "boi_token_index": 202,
            "eoi_token_index": 203,
        },
        layers="language_model.model.layers",
        norm="language_model.model.norm",
    ),
    Family(
        "MiniMax",
        "MiniMaxForCausalLM",
        {
            **_MOE,
            "head_dim": 12,
            "layer_types": ["linear_attention", "full_attention"] * 3,
            "block_size": 8,
            "linear_attn_alpha_factor": 1.3,
            "mlp_alpha_factor": 0.8,
        },
    ),
    Family("MiniMax-M2", "MiniMaxM2ForCausalLM", {**_MOE, "head_dim": 12}),
    Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        {**_LINEAR, **_MOE, "shared_expert_intermediate_size": 24},
    ),
    Family("Qwen3.5", "Qwen3_5ForCausalLM", _LINEAR),
    Family("SmolLM3", "SmolLM3ForCausalLM"),
    Family("Ernie4.5", "Ernie4_5ForCausalLM", {"head_dim": 16, "pad_token_id": 0}),
    Family("Exaone4", "Exaone4ForCausalLM", _WINDOWED),
    Family("HunYuan (dense)", "HunYuanDenseV1ForCausalLM", {"head_dim": 12}),
    Family("Starcoder2", "Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
    Family(
        "Mamba2",
        "Mamba2ForCausalLM",
        {
            "vocab_size": V,
            "hidden_size": H,
            "num_hidden_layers": L,
            "num_heads": 8,
            "head_dim": 12,
            "state_size": 10,
            "n_groups": 2,
            "chunk_size": 8,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        core=False,
        transform={"upcast": True},
        is_key=True,
        layers="backbone.layers",
        norm="backbone.norm_f",
        hidden_states_offset=0,
    ),
    Family("Nemotron", "NemotronForCausalLM"),
    # --- beyond the families promised: other heads (a bias), transforms, hybrids ---
    Family("Phi (head bias)", "PhiForCausalLM", norm="model.final_layernorm"),
    Family(
        "GPT-J (head bias)",
        "GPTJForCausalLM",
        {
            "vocab_size": V,
            "n_embd": H,
            "n_inner": 72,
            "n_layer": L,
            "n_head": 4,
            "n_positions": 96,
            "rotary_dim": 8,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        core=False,
        layers="transformer.h",
        norm="transformer.ln_f",
    ),
    Family(
        "HyperCLOVA X",
        "HyperCLOVAXForCausalLM",
        {"logits_scaling": 0.3},
        transform={"multiply": 0.3},
    ),
    Family(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        {
            "lm_head_multiplier": 0.3,
            "head_dim": 12,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 10,
            "mamba_chunk_size": 8,
        },
        transform={"multiply": 0.3},
        norm="model.final_layernorm",
    ),
    Family(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        {
            "logits_soft_cap": 5.0,
            "attention_window_size": WINDOW,
            "lru_width": 40,
            "head_dim": 12,
        },
        transform={"softcap": 5.0},
        norm="model.final_norm",
    ),
    Family(
        "NanoChat",
        "NanoChatForCausalLM",
        {"final_logit_softcapping": 5.0},
        transform={"softcap": 5.0},
    ),
    Family(
        "Gemma4 (conditional)",
        "Gemma4ForConditionalGeneration",
        {
            "head_dim": 16,
            **_WINDOWED,
            "final_logit_softcapping": 5.0,
            "pad_token_id": 0,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 20,
        },
        outer={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
            "audio_config": None,
            "image_token_id": 201,
        },
        transform={"softcap": 5.0},
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family(
        "Qwen3.5 (conditional)",
        "Qwen3_5ForConditionalGeneration",
        {**_LINEAR, "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.75}},
        outer={
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 40,
                "out_hidden_size": H,
                "num_position_embeddings": 16,
            },
            **_VL_IDS,
        },
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", {**_MOE, "shared_expert_intermediate_size": 24}),
    Family(
        "Ernie4.5-MoE",
        "Ernie4_5_MoeForCausalLM",
        {**_MOE, "moe_num_experts": 4, "moe_k": 2, "pad_token_id": 0},
    ),
    Family("HunYuan-MoE", "HunYuanMoEV1ForCausalLM", {**_MOE, "head_dim": 12}),
    Family("Seed-OSS", "SeedOssForCausalLM", {"head_dim": 12}),
    Family(
        "Nemotron-H",
        "NemotronHForCausalLM",
        {
            "hybrid_override_pattern": "M*-M*-",
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "ssm_state_size": 10,
            "n_groups": 2,
            "chunk_size": 8,
            "head_dim": 12,
        },
        transform={"upcast": True},
        norm="model.norm_f",
    ),
    Family(
        "Jamba",
        "JambaForCausalLM",
        {
            **_MOE,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 6,
        },
        norm="model.final_layernorm",
    ),
    Family(
        "GraniteMoE hybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **_MOE,
            "logits_scaling": 3.0,
            "layer_types": ["mamba", "attention"] * 3,
            "mamba_n_heads": 8,
            "mamba_d_head": 12,
            "mamba_n_groups": 2,
            "mamba_d_state": 10,
            "mamba_chunk_size": 8,
            "shared_intermediate_size": 40,
        },
        transform={"divide": 3.0},
    ),
]

FALLS_BACK: frozenset[str] = frozenset()
"""Families whose head runs for every position (`head: "full"`): served, not counted as covered."""
