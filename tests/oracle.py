"""The definition, written without the code under test: what a batch's supervision must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from eagle3_schemas import Eagle3TargetBatch


@dataclass(frozen=True)
class Expected:
    """What the definition says of one batch."""

    aux_hidden_states: Tensor  # [B, T, 3H], attended positions only, zeros elsewhere
    target_probs: Tensor  # [B, T, D], rows asked for, zeros elsewhere
    position_mask: Tensor  # [B, T, 1]


def _expected_aux(model: Any, inputs: Any, aux_layer_ids: tuple[int, ...]) -> Tensor:
    """Layer i is `output_hidden_states[i + 1]`, the last layer what the final norm is fed."""
    before_norm: list[Tensor] = []
    norm = next(
        module
        for name in ("norm", "ln_f", "norm_f", "final_layer_norm")
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == name and ".layers." not in path
    )
    handle = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    try:
        with torch.no_grad():
            states = model(
                input_ids=inputs.input_ids,
                attention_mask=(inputs.attention_mask != 0).long(),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
    finally:
        handle.remove()
    assert len(before_norm) == 1, "a server runs this model meanwhile"
    last = len(states) - 2
    return torch.cat([before_norm[0] if i == last else states[i + 1] for i in aux_layer_ids], -1)


def _expected_supervision(
    logits: Tensor, loss_mask: Tensor, draft_ids: Tensor, rows: str
) -> tuple[Tensor, Tensor]:
    """The definition, one position after another."""
    batch_size, length, vocab_size = logits.shape
    target_probs = torch.zeros(batch_size, length, len(draft_ids))
    position_mask = torch.zeros(batch_size, length, 1, dtype=torch.bool)
    selected = set(draft_ids.tolist())
    for row in range(batch_size):
        for position in range(length):
            is_last = position + 1 == length
            z = torch.zeros(vocab_size) if is_last else logits[row, position + 1]
            is_supervised = not is_last and bool(loss_mask[row, position + 1] != 0)
            values = z.tolist()
            is_trained = is_supervised and values.index(max(values)) in selected  # lowest id
            position_mask[row, position, 0] = is_trained
            if {"position_mask": is_trained, "loss_mask": is_supervised, "all": True}[rows]:
                chosen = torch.stack([z[i] for i in draft_ids.tolist()])
                target_probs[row, position] = torch.softmax(chosen.float(), dim=0)
    return target_probs, position_mask


@pytest.fixture
def expect() -> Callable[..., Expected]:
    """`expect(model, inputs, draft_ids, aux_layer_ids, rows)`: the oracle for one batch.

    Not while a server computes with `model`: its hooks would change the oracle's own forwards.
    """

    def compute(
        model: Any,
        inputs: Any,
        draft_ids: Tensor,
        aux_layer_ids: tuple[int, ...] | None = None,
        rows: str = "position_mask",
    ) -> Expected:
        if aux_layer_ids is None:
            depth = model.config.num_hidden_layers
            aux_layer_ids = (1, depth // 2 - 1, depth - 4)
        attended = inputs.attention_mask != 0
        aux = _expected_aux(model, inputs, aux_layer_ids)
        with torch.no_grad():
            logits = model(
                input_ids=inputs.input_ids, attention_mask=attended.long(), use_cache=False
            ).logits
        assert logits.shape[:2] == inputs.input_ids.shape, "a server runs this model meanwhile"
        supervision = _expected_supervision(logits, inputs.loss_mask, draft_ids, rows)
        return Expected(torch.where(attended[..., None], aux, aux.new_zeros(())), *supervision)

    return compute


def _same(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def same() -> Callable[[Tensor | None, Tensor], None]:
    """Assert equal values, shapes and dtypes, without any tolerance."""
    return _same


@pytest.fixture
def matches() -> Callable[[Eagle3TargetBatch, Expected], None]:
    """Assert that a remote batch's supervision is exactly what the oracle says."""

    def check(batch: Eagle3TargetBatch, expected: Expected) -> None:
        _same(batch.aux_hidden_states, expected.aux_hidden_states)
        _same(batch.position_mask, expected.position_mask)
        _same(batch.target_probs, expected.target_probs)

    return check
