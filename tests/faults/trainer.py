"""A draft of one layer and its training; as a program, one trainer process among several.

The program takes URLs, a file with `(inputs, draft_ids)` and one to write the losses to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle3_client import RemoteEagle3Backend


class Draft(nn.Module):
    """One layer on the aux states, trained with the definition's loss."""

    def __init__(self, width: int, draft_vocab_size: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, draft_vocab_size)

    def loss(self, batch: Any) -> torch.Tensor:
        log_probs = self.head(batch.aux_hidden_states).log_softmax(-1)
        rows = -(batch.target_probs * log_probs).sum(-1, keepdim=True)
        return (rows * batch.position_mask).sum() / batch.position_mask.sum().clamp_min(1)


def train(batches: Any, step_done: Callable[[int], None] = lambda _: None) -> list[float]:
    """Train a new draft on batches of supervision; returns the losses."""
    torch.manual_seed(7)
    losses: list[float] = []
    draft: Draft | None = None
    optimizer: torch.optim.Optimizer | None = None
    for step, batch in enumerate(batches):
        if draft is None or optimizer is None:
            draft = Draft(batch.aux_hidden_states.shape[-1], batch.target_probs.shape[-1])
            optimizer = torch.optim.SGD(draft.parameters(), lr=0.1)
        loss = draft.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        step_done(step)
    return losses


def remote(backend: RemoteEagle3Backend, inputs: list[Any], depth: int = 3) -> Iterator[Any]:
    """Supervision of every batch in order, prefetched."""
    with backend.prefetch([tuple(each) for each in inputs], depth) as prefetch:
        for _, batch in prefetch:
            yield batch


def main() -> None:
    torch.set_num_threads(2)
    urls, given, losses = sys.argv[1:]
    inputs, draft_ids = torch.load(given)
    with RemoteEagle3Backend(urls, exact=True) as backend:
        mask = torch.zeros(backend.model_info().vocab_size, dtype=torch.bool)
        mask[draft_ids] = True
        backend.set_vocab_mapping(draft_ids, mask)
        Path(losses).write_text(json.dumps(train(remote(backend, inputs))))


if __name__ == "__main__":
    main()
