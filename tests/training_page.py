"""Runs code of the pages; imported by processes too, so it needs no pytest."""

from __future__ import annotations

import os
from typing import Any

import torch


def run(blocks: list[str], names: dict[str, Any]) -> dict[str, Any]:
    """Run the one block there is with these names; returns all it knows at its end."""
    (code,) = blocks
    if (patience := os.environ.get("PAGE_RETRY_FOR_S")) is not None:
        assert code.count("from_env()") == 1
        code = code.replace("from_env()", f"from_env(retry_for_s={patience})")
    exec(compile(code, "a page", "exec"), names)
    return names


def batches(count: int, vocab_size: int = 131) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(2, 9, dtype=torch.long)
    return [(torch.randint(vocab_size, (2, 9), generator=generator), ones, ones)] * count


_steps = 0


def ddp_step(_supervision: Any) -> None:
    """What a step of data parallel training is to a process group."""
    global _steps
    torch.distributed.all_reduce(torch.ones(1))
    print(f"step {_steps}", flush=True)
    _steps += 1
