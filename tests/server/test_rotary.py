"""Rotary positions that change with T: no history, and no trim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

DRAFT_IDS = torch.arange(5, 65).flip(0)
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "initializer_range": 0.3,
    "pad_token_id": None,
}


def dynamic() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=rope)
    return LlamaForCausalLM(config).eval()


def longrope() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 16,
    }
    config = Phi3Config(
        **SIZES,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    return Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [dynamic, longrope])
def test_a_result_has_no_history(build: Any, serve: Any, connect: Any, batch_of: Any) -> None:
    backend = connect(serve(build()), DRAFT_IDS, exact=True)
    short, long = batch_of(131, (24, 9)), batch_of(131, (60, 60))
    first = backend.generate_batch(*short)
    backend.generate_batch(*long)
    again = backend.generate_batch(*short)
    assert torch.equal(first.aux_hidden_states, again.aux_hidden_states)
    assert torch.equal(first.position_mask, again.position_mask)
    with torch.no_grad():
        fresh = build()(
            input_ids=short.input_ids,
            attention_mask=short.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
    expected = torch.cat([fresh.hidden_states[i + 1] for i in (1, 2, 3)], -1)
    attended = short.attention_mask.bool()
    assert torch.equal(first.aux_hidden_states[attended], expected[attended])


@pytest.mark.parametrize("build", [dynamic, longrope])
def test_such_a_target_is_not_trimmed(build: Any, serve: Any, connect: Any, batch_of: Any) -> None:
    inputs = batch_of(131, (24, 9))
    inputs.attention_mask[:, 12:] = 0
    inputs.loss_mask[:, 12:] = 0
    bridge = serve(build())
    exact = connect(bridge, DRAFT_IDS, exact=True).generate_batch(*inputs)
    default = connect(bridge, DRAFT_IDS).generate_batch(*inputs)
    assert torch.equal(exact.aux_hidden_states, default.aux_hidden_states)
