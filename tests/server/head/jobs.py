"""Names and helpers that the head's tests share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eagle3_schemas.draft_head import LogitsTransform
from eagle3_server.engine import DeviceTensors
from eagle3_server.forward import forward_logits
from eagle3_server.head import RowsHead

V = 131
AUX = (1, 2, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRANSFORMS = {
    "llama": LogitsTransform(),
    "gemma2": LogitsTransform(softcap=2.0),
    "cohere": LogitsTransform(multiply=0.3),
    "granite": LogitsTransform(divide=3.0),
}


def find(model: Any, chunk_bytes: int = 1 << 20) -> RowsHead:
    return RowsHead.find(model, partial(forward_logits, model), chunk_bytes)


def whole(tiles: Any) -> Tensor:
    """Join logits that came in tiles; each is said to start where the one before ended."""
    parts, end = [], 0
    for start, tile in tiles:
        assert start == end
        end += tile.shape[1]
        parts.append(tile)
    return torch.cat(parts, dim=-1)


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def equal_results(got: DeviceTensors, expected: DeviceTensors) -> None:
    assert list(got.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=0, atol=0)
