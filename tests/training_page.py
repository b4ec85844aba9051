"""Runs the code of docs/training.md; imported by processes too, so it needs no pytest."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"


def code_of(heading: str) -> str:
    """The one block of Python under a heading."""
    (section,) = [
        part for part in re.split(r"\n(?=## )", PAGE.read_text()) if part.startswith(heading)
    ]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


def run(heading: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a block with these names; returns all it knows at its end."""
    code = code_of(heading)
    if (patience := os.environ.get("PAGE_RETRY_FOR_S")) is not None:
        assert code.count("from_env()") == 1
        code = code.replace("from_env()", f"from_env(retry_for_s={patience})")
    exec(compile(code, str(PAGE), "exec"), names)
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
