"""Errors that tests plant in a target, as its requests are served by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.packing import Document
from eagle3_server import TransformersTarget, forward, packing
from eagle3_server.head import RowsHead
from eagle3_server.layout import decoder_layers

Order = Callable[[list[nn.Module]], list[nn.Module]]


def hook_layers(monkeypatch: pytest.MonkeyPatch, order: Order) -> None:
    """Have captures take other modules for the decoder layers."""
    monkeypatch.setattr(forward, "decoder_layers", lambda model: order(decoder_layers(model)))


def swap(layers: list[nn.Module]) -> list[nn.Module]:
    return [*layers[:2], layers[3], layers[2], *layers[4:]]


def one_back(layers: list[nn.Module]) -> list[nn.Module]:
    """Layer i's hook on layer i - 1; the first stays."""
    return [layers[0], *layers[:-1]]


def one_on(layers: list[nn.Module]) -> list[nn.Module]:
    return [*layers[1:], layers[-1]]


def change_runner(target: TransformersTarget, **changes: Any) -> None:
    target._runner = replace(target._runner, **changes)


def forget_transform(target: TransformersTarget) -> None:
    """Rows without what the model does to its logits."""
    head = target._runner.head
    assert head is not None
    change_runner(target, head=replace(head, transform=LogitsTransform()))


def spoil_row(monkeypatch: pytest.MonkeyPatch, token_id: int) -> None:
    """Rows whose logit of one id is that of its neighbour."""
    tiles = RowsHead.tiles

    def spoilt(self: RowsHead, head_input: torch.Tensor) -> Any:
        for start, logits in tiles(self, head_input):
            place = token_id - start
            if 0 <= place < logits.shape[1]:
                logits = logits.clone()
                logits[:, place] = logits[:, place - 1]
            yield start, logits

    monkeypatch.setattr(RowsHead, "tiles", spoilt)


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask under which packed documents see those before them."""
    monkeypatch.setattr(packing, "_block_causal_masks", lambda _m, ids, _p: torch.ones_like(ids))


def join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows taken for one document each."""

    def whole(seq_lens: torch.Tensor) -> list[Document]:
        return [Document(row, 0, int(lens.sum())) for row, lens in enumerate(seq_lens)]

    monkeypatch.setattr(packing, "documents_of", whole)


def add_noise(model: nn.Module, size: float) -> Any:
    """Have a layer give something else each time."""

    def noisy(_module: nn.Module, _args: object, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        state = state + size * torch.randn(state.shape)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    return decoder_layers(model)[1].register_forward_hook(noisy)
