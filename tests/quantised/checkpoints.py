"""Checkpoints of a tiny Llama: plain, quantised by their packages, and one quantised by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.servers import save_tiny_llama

V, L = 131, 7


def save_plain(path: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Of sizes that groups of 64 weights divide, row by row."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_hidden_layers": L, "vocab_size": V}
    return save_tiny_llama(path, seed=seed, tie_word_embeddings=tied, **sizes)


def save_quantised(plain: Path, path: Path, config: Any) -> Path:
    """Quantise with transformers, and save what came of it."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    return path


def save_compressed(plain: Path, path: Path, activations: str, *, with_head: bool = False) -> Path:
    """Write 8-bit weights and activations (`token` or `tensor`) as compressed-tensors lays them."""
    path.mkdir()
    weights = load_file(plain / "model.safetensors")
    for name in [n for n in weights if n.endswith("proj.weight") or (with_head and "lm_" in n)]:
        weight = weights[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        weights[name] = (weight / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    part = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [] if with_head else ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**part, "strategy": "channel", "dynamic": False},
                "input_activations": {**part, "strategy": activations, "dynamic": True},
            }
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return path
