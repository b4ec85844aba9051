"""`load_target` finds the class that a checkpoint needs, and never makes weights up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families.configs import FAMILIES, L
from tests.families.full_path import B, T, make_job

from eagle3_schemas.errors import InvalidRequest
from eagle3_server import ServerSettings
from eagle3_server.loading import load_target

LAYERS = (1, 2, 4)


def save(name: str, directory: Path) -> Any:
    model: Any = next(f for f in FAMILIES if f.name == name).build(torch.float32)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("Llama", "LlamaForCausalLM"),
        ("LLaVA", "LlavaForConditionalGeneration"),  # has no text-only class
        ("Gemma3 (conditional)", "Gemma3ForConditionalGeneration"),
        ("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration"),
        ("Llama4 (conditional)", "Llama4ForCausalLM"),  # has one: no tower in memory
        ("Qwen3.5 (conditional)", "Qwen3_5ForCausalLM"),
    ],
)
def test_checkpoint_is_served_as_saved(name: str, architecture: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    target = load_target(ServerSettings(model=str(tmp_path), dtype="float32", device="cpu"))
    description = target.describe()
    assert description.architecture == architecture
    assert description.num_hidden_layers == L
    assert description.head == "rows"
    job = make_job(aux_layer_ids=LAYERS, rows="all")
    result = target.supervise(job).tensors
    with torch.no_grad():
        output = model(
            input_ids=job.input_ids,
            attention_mask=job.attention_mask.long(),
            output_hidden_states=True,
            use_cache=False,
        )
    aux = torch.cat([output.hidden_states[i + 1] for i in LAYERS], -1)
    assert torch.equal(result["aux_hidden_states"], aux[job.attention_mask])
    draft_logits = output.logits[:, 1:, job.draft_vocab.selected_token_ids]
    probs = torch.softmax(draft_logits, -1).reshape(B * (T - 1), -1)
    assert torch.equal(result["target_probs"], probs)


def test_checkpoint_without_some_weights_is_refused(tmp_path: Path) -> None:
    """transformers would make random ones, and only warn."""
    save("Llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InvalidRequest, match=r"lacks 1 of the weights.*layers\.3\.mlp\.up_proj"):
        load_target(ServerSettings(model=str(tmp_path), device="cpu"))


def test_checkpoint_with_weights_of_another_shape_is_refused(tmp_path: Path) -> None:
    save("Llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InvalidRequest, match="cannot load"):
        load_target(ServerSettings(model=str(tmp_path), device="cpu"))
