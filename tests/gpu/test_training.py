"""A draft trained on a GPU from a remote target has the losses of one trained beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.conftest import DEVICE, wide_llama
from tests.gpu.test_streams import D, V, batch_number
from torch import Tensor

from eagle3_server import HFEagle3TargetModel

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from text import TokenBatch
from training import make_trainer, supervise, train

pytestmark = pytest.mark.gpu


def losses(backend: Any, embeddings: Tensor, vocab: tuple[Tensor, Tensor]) -> list[float]:
    trainer = make_trainer(embeddings.float(), *vocab, ttt_steps=3, seed=1, device=DEVICE)
    backend.set_vocab_mapping(*vocab)
    batches = [TokenBatch(*(t.to(DEVICE) for t in batch_number(n))) for n in range(12)]
    return train(trainer, supervise(backend, batches), steps=12, learning_rate=1e-3)


def test_remote_losses_are_the_co_located_ones(
    live_server: Any, connect: Any, mapping: Any, frequency_ordered: Any
) -> None:
    model = wide_llama(torch.float32)
    vocab = mapping(frequency_ordered(V, D), V)
    embeddings = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    beside = losses(HFEagle3TargetModel(model), embeddings, vocab)
    remote = connect(urls=live_server(model), device=DEVICE, exact=True)
    fetched = remote.get_input_embeddings().weight
    assert torch.equal(fetched.to(DEVICE), embeddings)
    assert losses(remote, fetched, vocab) == beside
    assert beside[-1] < beside[0]
