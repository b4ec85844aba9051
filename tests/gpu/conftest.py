"""Tests of what only a device can show: `pytest -m gpu tests/gpu`, or `benchmarks/gpu.py`.

`EAGLE3TEST_DEVICE=cpu` runs those that need no CUDA of their own, which shows that they would run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.families.family import Family
from torch import nn

DEVICE = torch.device(os.environ.get("EAGLE3TEST_DEVICE", "cuda"))


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The device under test; a host without one fails instead of skipping."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.fail(f"this test needs a GPU, and torch {torch.__version__} finds none")
    return DEVICE


@pytest.fixture
def cuda(device: torch.device) -> Iterator[torch.device]:
    """For tests of CUDA itself; what they did to the allocator ends with them."""
    if device.type != "cuda":
        pytest.fail("this test needs CUDA itself")
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


class OnDevice:
    """A family whose models are built on the device."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def build(self, dtype: torch.dtype) -> nn.Module:
        return self._family.build(dtype).to(DEVICE)


def wide_llama(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Llama whose answers have megabytes: copies of them take time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        initializer_range=0.2,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(device=DEVICE, dtype=dtype).eval().requires_grad_(False)
