"""Every output from `output_hidden_states` and loops, without the code under test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagle3_schemas.capture import OUTPUTS

V = {"llama": 131, "gemma2": 131, "gpt2": 131, "qwen3": 157}
ALL = tuple(OUTPUTS)


def by_definition(model: Any, inputs: Any, draft_ids: Tensor, layers: Any) -> dict[str, Tensor]:
    """Every output, from `output_hidden_states` and loops."""
    attended = inputs.attention_mask != 0
    depth = model.config.num_hidden_layers
    before_norm: list[Tensor] = []
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    handle = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    with torch.no_grad():
        output = model(
            input_ids=inputs.input_ids, attention_mask=attended.long(),
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
    handle.remove()
    states = [*output.hidden_states[1:depth], before_norm[0]]
    batch_size, length, _ = output.logits.shape
    result = {
        "aux": torch.cat([states[i] for i in layers], -1),
        "last_hidden_prenorm": before_norm[0],
        "last_hidden": output.hidden_states[-1],
    }
    result = {
        name: torch.where(attended[..., None], state, state.new_zeros(()))
        for name, state in result.items()
    }
    result["argmax"] = torch.zeros(batch_size, length, dtype=torch.int64)
    result["logsumexp"] = torch.zeros(batch_size, length)
    result["position_mask"] = torch.zeros(batch_size, length, 1, dtype=torch.bool)
    result["loss_mask_probs"] = torch.zeros(batch_size, length, len(draft_ids))
    result["loss_mask_logits"] = output.logits.new_zeros(batch_size, length, len(draft_ids))
    result["draft_logsumexp"] = torch.zeros(batch_size, length)
    selected = set(draft_ids.tolist())
    for b in range(batch_size):
        for t in range(length - 1):
            if not inputs.loss_mask[b, t + 1]:
                continue
            z = output.logits[b, t + 1]
            values = z.tolist()
            best = values.index(max(values))
            result["argmax"][b, t] = best
            result["logsumexp"][b, t] = z.double().exp().sum().log()
            result["position_mask"][b, t, 0] = best in selected
            chosen = torch.stack([z[i] for i in draft_ids.tolist()])
            result["loss_mask_logits"][b, t] = chosen
            chosen = chosen.float()
            result["loss_mask_probs"][b, t] = torch.softmax(chosen, dim=0)
            result["draft_logsumexp"][b, t] = chosen.double().exp().sum().log()
    return result


def check(captured: Any, expected: dict[str, Tensor], names: Any) -> None:
    assert list(captured.outputs) == list(names)
    for name in names:
        got = getattr(captured, name)
        assert (got.shape, got.dtype) == (expected[name].shape, expected[name].dtype), name
        is_sum = name.endswith("logsumexp")
        tolerance = 1e-6 if is_sum else 0.0
        torch.testing.assert_close(got, expected[name], rtol=tolerance, atol=tolerance)
