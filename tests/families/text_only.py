"""Text-only families that the project names."""

from __future__ import annotations

from tests.families.family import MOE, ROPE, WINDOW, WINDOWED, Family, H, L, V

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


TEXT_ONLY = [
    Family("Llama", "LlamaForCausalLM", is_key=True),
    Family("Qwen2", "Qwen2ForCausalLM"),
    Family("Qwen3", "Qwen3ForCausalLM", {"head_dim": 16}),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", {"head_dim": 16, **MOE}),
    Family("Mixtral", "MixtralForCausalLM", MOE),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": WINDOW}),
    Family(
        "Gemma2",
        "Gemma2ForCausalLM",
        {"head_dim": 16, **WINDOWED, "final_logit_softcapping": 5.0, "pad_token_id": 0},
        transform={"softcap": 5.0},
        is_key=True,
    ),
    Family(
        "Gemma3 (text)",
        "Gemma3ForCausalLM",
        {"head_dim": 16, **WINDOWED, "final_logit_softcapping": 5.0, "pad_token_id": 0},
        transform={"softcap": 5.0},
    ),
    Family(
        "Gemma3 (conditional)",
        "Gemma3ForConditionalGeneration",
        {"head_dim": 16, **WINDOWED, "pad_token_id": 0},
        outer={"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 201},
        layers="model.language_model.layers",
        norm="model.language_model.norm",
    ),
    Family(
        "Gemma4 (text)",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            **WINDOWED,
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
        {"head_dim": 12, **WINDOWED, **MOE, "rope_parameters": ROPE},
    ),
    Family("OLMo2", "Olmo2ForCausalLM"),
    Family("OLMo3", "Olmo3ForCausalLM", WINDOWED),
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
        {"logit_scale": 0.3, "head_dim": 12, **WINDOWED, "pad_token_id": 0},
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
        {**MOE, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
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
]
