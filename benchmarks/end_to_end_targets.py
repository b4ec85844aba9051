"""What the end-to-end benchmark serves: checkpoints, batches and draft vocabs.

Letters: B batch, T sequence, H hidden size, L layers, V target vocab, D draft vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from head_model import AUX_LAYER_IDS, ModelShape, Vocab, make_batch, make_model
from transformers import AutoConfig, AutoTokenizer

from eagle3_client import build_draft_vocab, count_token_ids
from eagle3_schemas import default_aux_layer_ids
from smollm2 import smollm2_checkpoint
from text import (
    HELD_OUT_MODULES,
    TRAINING_MODULES,
    TokenBatch,
    chunk,
    every_token,
    make_batches,
    module_documents,
    tokenize,
)

REAL, REAL_DRAFT_VOCAB_SIZE = "SmolLM2", 12288
BATCH_SIZE, LENGTH = 4, 512
RANDOM_BATCHES = 2  # whose top ids, 4,096 at most, all fit a draft vocab of 8,000
SHAPES = {
    "H512/V32k": ModelShape(512, 8, 32000, 8000, BATCH_SIZE),
    "H1024/V128k": ModelShape(1024, 6, 128256, 32000, BATCH_SIZE),
}


@dataclass(frozen=True)
class Prepared:
    """A target on disk, and what is asked of it."""

    name: str
    directory: Path
    checkpoint: Path
    batches: Path  # a file of batches by the share that is supervised
    num_batches: int
    aux_layer_ids: tuple[int, ...]
    model_shape: ModelShape
    length: int
    vocab: Vocab | None = None
    """None: any that has the top ids of all batches."""

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.model_shape.batch_size * self.length

    @property
    def shape(self) -> str:
        """Say the batches' shape."""
        return f"B {self.model_shape.batch_size}, T {self.length}"


def prepare(name: str, directory: Path, levels: Sequence[float], rounds: int) -> Prepared:
    """Make a target's checkpoint and batches; the real one is downloaded the first time."""
    if name == REAL:
        return prepare_real(directory, levels, rounds)
    return prepare_random(name, SHAPES[name], LENGTH, directory, levels)


def prepare_quick(name: str, directory: Path, levels: Sequence[float], rounds: int) -> Prepared:
    """Make a target of no size."""
    return prepare_random(name, ModelShape(64, 6, 2000, 900, 2), 64, directory, levels)


def prepare_random(
    name: str, shape: ModelShape, length: int, directory: Path, levels: Sequence[float]
) -> Prepared:
    """Save a random Llama in bfloat16, as checkpoints come; both servers widen it alike."""
    checkpoint = directory / "checkpoint"
    make_model(shape, torch.bfloat16).save_pretrained(checkpoint)

    def batches(level: float) -> list[TokenBatch]:
        ids, *masks = make_batch(replace(shape, supervised=level), length)
        return [TokenBatch((ids + i) % shape.vocab_size, *masks) for i in range(RANDOM_BATCHES)]

    file = save({str(level): batches(level) for level in levels}, directory)
    return Prepared(name, directory, checkpoint, file, RANDOM_BATCHES, AUX_LAYER_IDS, shape, length)


def prepare_real(directory: Path, levels: Sequence[float], rounds: int) -> Prepared:
    """Cut held-out text into full sequences; the first part of each is the prompt."""
    checkpoint = smollm2_checkpoint()
    config, tokenizer = (kind.from_pretrained(checkpoint) for kind in (AutoConfig, AutoTokenizer))
    training, held_out = (
        tokenize(chain.from_iterable(map(module_documents, modules)), tokenizer)
        for modules in (TRAINING_MODULES, HELD_OUT_MODULES)
    )
    counts = count_token_ids(every_token(training), config.vocab_size)
    full = [piece for piece in chunk(held_out, LENGTH) if len(piece) == LENGTH]
    file = save(
        {
            str(level): make_batches(
                full,
                num_batches=rounds,
                batch_size=BATCH_SIZE,
                sequence_length=LENGTH,
                prompt_tokens=round((1 - level) * LENGTH),
            )
            for level in levels
        },
        directory,
    )
    sizes = (config.hidden_size, config.num_hidden_layers, config.vocab_size)
    return Prepared(
        REAL,
        directory,
        checkpoint,
        file,
        rounds,
        default_aux_layer_ids(config.num_hidden_layers),
        ModelShape(*sizes, REAL_DRAFT_VOCAB_SIZE, BATCH_SIZE),
        LENGTH,
        build_draft_vocab(counts, REAL_DRAFT_VOCAB_SIZE, tokenizer.all_special_ids),
    )


def save(batches: dict[str, list[TokenBatch]], directory: Path) -> Path:
    file = directory / "batches.pt"
    torch.save({level: [tuple(batch) for batch in some] for level, some in batches.items()}, file)
    return file
