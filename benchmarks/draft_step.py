"""The gradient of a draft's training step, to compare supervision by what it does to training."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from eagle3_schemas import Eagle3TargetBatch
from text import chunk, make_batches
from training import Eagle3Trainer, make_trainer, train


def start_trainer(
    embeddings: Tensor,
    vocab: tuple[Tensor, Tensor],
    training: list[list[int]],
    answers: Any,
    arguments: argparse.Namespace,
) -> Eagle3Trainer:
    """Train a draft for a few steps, so that its gradient is not that of random weights."""
    trainer = make_trainer(embeddings, *vocab, ttt_steps=3, seed=0)
    steps = arguments.draft_steps
    batches = make_batches(
        chunk(training, arguments.sequence_length),
        num_batches=steps,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
    )
    if steps:
        train(trainer, answers(batches, encoding="probs")[0], steps=steps, learning_rate=2e-3)
    return trainer


def gradients(trainer: Eagle3Trainer, batches: list[Eagle3TargetBatch]) -> Tensor:
    """Return the gradient of one draft step on the batches, as one float64 vector."""
    trainer.zero_grad()
    for batch in batches:
        trainer(**batch.to_trainer_inputs()).loss.backward()
    parts = [p.grad.double().flatten() for p in trainer.parameters() if p.grad is not None]
    return torch.cat(parts)


def cosine(left: Tensor, right: Tensor) -> float:
    if torch.equal(left, right):
        return 1.0
    return float(left @ right / (left.norm() * right.norm()))
