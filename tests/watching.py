"""Watches what a model is given during its forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class HeadCall:
    """One matmul with the head's weight, or a part of it."""

    shape: torch.Size  # of what it was applied to, without H
    ids: int  # how many of the head's ids it gave

    @property
    def rows(self) -> int:
        return self.shape.numel()


class HeadCalls(TorchFunctionMode):
    """Records what the head is applied to, by its module or by functions of its weight alike."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.storage = head.weight.untyped_storage().data_ptr()  # type: ignore[operator]
        self.calls: list[HeadCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            states, weight = args[0], args[1]
            if weight.untyped_storage().data_ptr() == self.storage:
                self.calls.append(HeadCall(states.shape[:-1], weight.shape[0]))
        return func(*args, **(kwargs or {}))


@contextmanager
def columns_seen(embeddings: nn.Module) -> Iterator[list[int]]:
    """Record how many columns of ids each forward embeds."""
    seen: list[int] = []

    def note(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    handle = embeddings.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
