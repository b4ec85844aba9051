"""No tensor of all positions by the whole vocab is ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3_server import TransformersTarget
from eagle3_server.engine import SupervisionJob


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation inside gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


WIDE_V, ROWS_B, ROWS_T = 4001, 4, 24


@pytest.fixture(scope="module")
def wide_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WIDE_V, hidden_size=16, intermediate_size=24, num_hidden_layers=7,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def largest_numel(target: TransformersTarget, job: SupervisionJob) -> int:
    with Largest() as largest:
        target.supervise(job)
    return largest.numel


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("rows", ["position_mask", "loss_mask", "all"])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_no_tensor_of_all_positions_by_the_vocab_is_ever_made(
    wide_model: Any, job_of: Any, frequency_ordered: Any, encoding: str, rows: str, exact: bool
) -> None:
    target = TransformersTarget(wide_model, model_id="tiny", head_chunk_bytes=16 * WIDE_V * 4)
    job = job_of(
        frequency_ordered(WIDE_V, 53), (ROWS_T,) * ROWS_B, WIDE_V,
        encoding=encoding, rows=rows, exact=exact,
    )  # fmt: skip
    budget = 16 * WIDE_V  # elements of float32; also the head's weight, of which views are taken
    assert largest_numel(target, job) <= 1.1 * budget < ROWS_B * ROWS_T * WIDE_V / 5


def test_memory_grows_with_rows_not_with_t_times_v(
    wide_model: Any, job_of: Any, frequency_ordered: Any
) -> None:
    target = TransformersTarget(wide_model, model_id="tiny", head_chunk_bytes=16 * WIDE_V * 4)
    short, long = (
        largest_numel(target, job_of(frequency_ordered(WIDE_V, 53), (length,) * 4, WIDE_V))
        for length in (16, 64)
    )
    assert long <= 1.1 * short, "four times the T"


def test_the_full_path_does_make_one(
    wide_model: Any, job_of: Any, frequency_ordered: Any, monkeypatch: Any
) -> None:
    """Else the tests above would see nothing."""
    monkeypatch.setattr(wide_model, "get_output_embeddings", lambda: None)
    target = TransformersTarget(wide_model, model_id="tiny", head_chunk_bytes=16 * WIDE_V * 4)
    job = job_of(frequency_ordered(WIDE_V, 53), (ROWS_T,) * ROWS_B, WIDE_V)
    assert largest_numel(target, job) >= ROWS_B * ROWS_T * WIDE_V
