"""A small target, and a trainer of examples/ that trains a few steps against a backend of it."""

from __future__ import annotations

import sys

import torch
from engine import ROOT
from torch import Tensor

from eagle3_schemas import Eagle3TargetBackend

sys.path.append(str(ROOT / "examples"))

from text import TokenBatch
from training import make_trainer, supervise, train

DRAFT_VOCAB_SIZE, STEPS = 200, 8
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}


def small_target() -> torch.nn.Module:
    """Return a random Llama, the same each time."""
    import transformers

    torch.manual_seed(0)
    model: torch.nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return model.eval()


def draft_vocab() -> tuple[Tensor, Tensor]:
    """Return ids in no numeric order, and their mask."""
    order = torch.randperm(SIZES["vocab_size"], generator=torch.Generator().manual_seed(1))
    ids = order[:DRAFT_VOCAB_SIZE]
    return ids, torch.zeros(len(order), dtype=torch.bool).index_fill(0, ids, True)


def random_batch(batch_size: int, length: int, seed: int) -> TokenBatch:
    """Return random ids, padded on the right, all real ones but the first ten supervised."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (batch_size, 1), generator=generator)
    columns = torch.arange(length).expand(batch_size, length)
    attention_mask = (columns < lengths).long()
    ids = torch.randint(0, SIZES["vocab_size"], (batch_size, length), generator=generator)
    return TokenBatch(ids * attention_mask, attention_mask, attention_mask * (columns >= 10))


def train_against(backend: Eagle3TargetBackend, embeddings: Tensor) -> list[float]:
    """Train a new draft and return its losses."""
    trainer = make_trainer(embeddings, *draft_vocab(), ttt_steps=2, seed=0)
    batches = [random_batch(3, 48, seed=seed) for seed in range(STEPS)]
    return train(trainer, supervise(backend, batches), steps=STEPS, learning_rate=1e-3)
