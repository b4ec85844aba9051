"""A target without a model: its answers are random numbers, seeded by the batch's first token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.supervision import pack_bits, shift_left_with_zero
from eagle3_server.engine import DeviceTensors, SupervisionJob, TargetDescription

V, D, H = 2048, 1400, 192
B, T = 2, 900

DESCRIPTION = TargetDescription(
    model_id="seeded",
    revision=None,
    architecture="Seeded",
    fingerprint="seeded",
    num_hidden_layers=8,
    hidden_size=H,
    vocab_size=V,
    input_vocab_size=V,
    max_sequence_length=None,
    dtype="bfloat16",
    device="cpu",
    device_name="cpu",
    attn_implementation=None,
    aux_layer_ids=(1, 3, 4),
    num_threads=1,
    head="full",
    head_reason=None,
    encodings=("probs",),
    transform=LogitsTransform(),
)


def inputs_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch that asks for the answer of `seed`: about 8 MiB, of another size for each seed."""
    input_ids = torch.full((B, T), seed)
    loss_mask = torch.zeros(B, T, dtype=torch.bool)
    loss_mask[:, 1 : T // 2 + 11 * (seed % 40)] = True
    return input_ids, torch.ones(B, T, dtype=torch.bool), loss_mask


def answer_of(seed: int, loss_mask: Tensor) -> dict[str, Tensor]:
    """Every loss-mask position supervised; 2 + 6 random megabytes."""
    generator = torch.Generator().manual_seed(seed)
    position_mask = shift_left_with_zero(loss_mask)
    rows = int(position_mask.sum())
    return {
        "aux_hidden_states": torch.randn(B * T, 3 * H, generator=generator).bfloat16(),
        "position_mask": pack_bits(position_mask),
        "target_probs": torch.rand(rows, D, generator=generator),
    }


def is_answer_of(seed: int, batch: Any) -> bool:
    """Whether a batch is that answer, byte for byte."""
    mask = shift_left_with_zero(inputs_of(seed)[2])
    expected = answer_of(seed, inputs_of(seed)[2])
    return (
        torch.equal(batch.position_mask[..., 0], mask)
        and torch.equal(batch.aux_hidden_states.flatten(0, 1), expected["aux_hidden_states"])
        and torch.equal(batch.target_probs[mask], expected["target_probs"])
    )


class SeededTarget:
    """Answers at once, on the compute thread; `before` is called with each job first."""

    def __init__(self, before: Callable[[SupervisionJob], object] = lambda _job: None) -> None:
        self._before = before
        self.supervised: list[int] = []
        self.changed = threading.Condition()

    def describe(self) -> TargetDescription:
        return DESCRIPTION

    def supervise(self, job: SupervisionJob) -> DeviceTensors:
        self._before(job)
        seed = int(job.input_ids[0, 0])
        result = DeviceTensors.queued(answer_of(seed, job.loss_mask), torch.device("cpu"))
        with self.changed:
            self.supervised.append(seed)
            self.changed.notify_all()
        return result

    def wait_for(self, count: int, timeout_s: float = 60) -> None:
        """Wait until `count` jobs were computed."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.supervised) >= count, timeout_s)

    def input_embeddings(self) -> DeviceTensors:
        raise AssertionError("no test of this target asks for weights, which it has not")

    def draft_head(self, draft_vocab: object) -> DeviceTensors:
        raise AssertionError("no test of this target asks for weights, which it has not")
