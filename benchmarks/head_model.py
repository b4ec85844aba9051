"""The random target of the head benchmark, its batches, and the co-located path it is held against.

Letters: B batch, T sequence, H hidden size, V target vocab, D draft vocab.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3_schemas import project_to_draft_vocab
from eagle3_server import HFEagle3TargetModel
from text import TokenBatch

AUX_LAYER_IDS = (0, 2, 4)
Vocab = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the target and of its batches."""

    hidden_size: int = 1024
    layers: int = 6
    vocab_size: int = 128256
    draft_vocab_size: int = 32000
    batch_size: int = 4
    supervised: float = 0.6

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add one option per size."""
        for name, value in asdict(cls()).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)

    @classmethod
    def parse(cls, argv: Sequence[str]) -> ModelShape:
        """Parse what `arguments` gives."""
        parser = argparse.ArgumentParser()
        cls.add_to(parser)
        return cls(**vars(parser.parse_args(argv)))

    def arguments(self) -> list[str]:
        """Return the options that give this shape."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]


def make_model(shape: ModelShape, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a random Llama: heads of 64, two or three queries a key, an MLP of 2.75 H."""
    torch.manual_seed(0)
    heads = max(1, shape.hidden_size // 64)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=11 * shape.hidden_size // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else max(1, heads // 2),
        vocab_size=shape.vocab_size,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def draft_vocab(shape: ModelShape) -> Vocab:
    """Return D random ids and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(shape.vocab_size, generator=generator)[: shape.draft_vocab_size]
    mask = torch.zeros(shape.vocab_size, dtype=torch.bool)
    mask[ids] = True
    return ids, mask


def covering_vocab(shape: ModelShape, top_ids: Tensor) -> Vocab:
    """Return a draft vocab with these ids in it: then every supervised row is sent."""
    ids = torch.cat([top_ids.unique(), draft_vocab(shape)[0]])
    kept = torch.tensor(list(dict.fromkeys(ids.tolist()))[: shape.draft_vocab_size])
    mask = torch.zeros(shape.vocab_size, dtype=torch.bool)
    mask[kept] = True
    return kept, mask


def make_batch(shape: ModelShape, length: int, real: float = 1.0) -> TokenBatch:
    """Return random ids [B, T], the first `real` of each row attended, the last part supervised."""
    generator = torch.Generator().manual_seed(length)
    size = (shape.batch_size, length)
    input_ids = torch.randint(shape.vocab_size, size, generator=generator)
    columns = torch.arange(length).expand(size)
    end = round(real * length)
    attention_mask = (columns < end).long()
    loss_mask = attention_mask * (columns >= round((1 - shape.supervised) * end))
    return TokenBatch(input_ids.masked_fill(columns >= end, 0), attention_mask, loss_mask)


def colocated_name() -> str:
    """Say which co-located path `colocated` runs."""
    try:
        peer = version("nemo-automodel")  # `__version__` adds a commit of the working folder
    except PackageNotFoundError:
        return "eagle3_server.HFEagle3TargetModel + project_to_draft_vocab (the peer's rule)"
    return f"nemo-automodel {peer}, HFEagle3TargetModel + its trainer's rule"


def colocated(
    model: Any, vocab: Vocab, aux_layer_ids: Sequence[int] = AUX_LAYER_IDS
) -> Callable[[TokenBatch], Any]:
    """Return the full-logits path: the peer's own code if it is installed, else the same in ours.

    The returned function keeps the batch, as a trainer does, while it projects it.
    """
    project: Callable[..., object] = project_to_draft_vocab
    target: Any
    try:
        from nemo_automodel.components.speculative.eagle import core
        from nemo_automodel.components.speculative.eagle.target import (
            HFEagle3TargetModel as PeerTargetModel,
        )
    except ImportError:
        target = HFEagle3TargetModel(model, aux_layer_ids)
    else:
        target, project = PeerTargetModel(model, aux_layer_ids), core._compute_target_distribution

    def run(batch: TokenBatch) -> tuple[Any, Any]:
        answer = target.generate_batch(*batch)
        return answer, project(answer.logits, *vocab, answer.loss_mask)

    return run
