"""`BenchPlan`: what a benchmark measures, checked once, and the batches it is measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from eagle3_client.preflight_measure import spread_mask
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest

FEWEST_BATCHES: Final = 2
"""Batches worth measuring."""
_BATCHES = 4  # that differ
_SEQUENCE_LENGTH = 512
_DRAFT_VOCAB_SIZE = 32_000


@dataclass(frozen=True)
class BenchPlan:
    """What is to be measured.

    Raises:
        InvalidRequest: a value that cannot work, with what would.
    """

    encodings: tuple[str, ...] | None = None
    """None: those that the servers offer."""
    depths: tuple[int, ...] = (1, 2, 4)
    batch_size: int = 1
    sequence_length: int | None = None
    """None: 512, or what the servers take if that is less."""
    steps: int = 30
    """Measured batches of a cell, at most; but in each round a multiple of its depth."""
    supervised_share: float = 0.6
    step_s: float = 0.0
    """What the trainer computes for a batch, spent asleep as if on a GPU."""
    draft_vocab_size: int | None = None
    """None: 32000, or V if that is less."""
    time_limit_s: float = 60.0
    token_ids: torch.Tensor | None = None
    """[n] ids of a text, repeated as needed; None: random ones."""

    def __post_init__(self) -> None:
        """Check every value."""
        for name, least in (("batch_size", 1), ("sequence_length", 2), ("draft_vocab_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidRequest(f"{name} must be >= {least}; got {value}")
        if not self.depths or min(self.depths) < 1:
            raise InvalidRequest(f"prefetch depths must be >= 1; got {list(self.depths)}")
        if self.steps < FEWEST_BATCHES:
            raise InvalidRequest(f"steps must be >= {FEWEST_BATCHES}; got {self.steps}")
        if self.encodings is not None and not set(self.encodings) <= set(ENCODINGS):
            raise InvalidRequest(
                f"encodings must be some of {', '.join(ENCODINGS)}; got {', '.join(self.encodings)}"
            )
        if not 0 < self.supervised_share <= 1:
            raise InvalidRequest(f"supervised_share must be in (0, 1]; got {self.supervised_share}")
        if not 0 <= self.step_s < 1e6:
            raise InvalidRequest(f"step_s must be >= 0 and finite, seconds; got {self.step_s}")
        if not 0 < self.time_limit_s < 1e6:
            raise InvalidRequest(
                f"time_limit_s must be > 0 and finite, seconds; got {self.time_limit_s}"
            )

    def draft_vocab(self, info: ModelInfo) -> DraftVocab:
        """Return random distinct ids, in no order; the same each time.

        Raises:
            InvalidRequest: more than the target has.
        """
        size, most = self.draft_vocab_size, info.vocab_size
        if size is not None and size > most:
            raise InvalidRequest(
                f"a draft vocab of {size} is larger than the target's vocab; name at most {most}"
            )
        ids = torch.randperm(most, generator=torch.Generator().manual_seed(0))
        return DraftVocab.from_ids(ids[: size or _DRAFT_VOCAB_SIZE])

    def batches(self, info: ModelInfo) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return a few `input_ids`, `attention_mask`, `loss_mask`, [B, T]; no position is padding.

        Raises:
            InvalidRequest: the text's ids are not the target's, or a batch is more than the server
                takes, and perhaps more than fits here.
        """
        limits, length = info.limits, self.sequence_length
        if length is None:
            fitting = limits.max_tokens_per_request // self.batch_size
            length = min(_SEQUENCE_LENGTH, limits.max_sequence_length or fitting, fitting)
        if self.batch_size * max(length, 2) > limits.max_tokens_per_request:
            raise InvalidRequest(
                f"a batch of {self.batch_size} x {max(length, 2)} tokens is more than the server "
                f"takes; name at most {limits.max_tokens_per_request} (max_tokens_per_request)"
            )
        bound = min(info.vocab_size, info.input_vocab_size)
        shape = _BATCHES, self.batch_size, max(length, 2)
        if self.token_ids is None:
            ids = torch.randint(bound, shape, generator=torch.Generator().manual_seed(0))
        else:
            if (largest := int(self.token_ids.max())) >= bound:
                raise InvalidRequest(
                    f"the tokenizer makes ids up to {largest} of the text, and the target has "
                    f"{bound}; name the target's own tokenizer"
                )
            count = shape[0] * shape[1] * shape[2]
            repeats = -(-count // len(self.token_ids))
            ids = self.token_ids.repeat(repeats)[:count].view(shape)
        attended = torch.ones(shape[1:], dtype=torch.bool)
        supervised = spread_mask(shape[1], shape[2], self.supervised_share)
        return [(each, attended, supervised) for each in ids]
