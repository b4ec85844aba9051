"""Families, dtypes, thread counts and jobs for the head's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.server.head.jobs import (
    AUX,
    DTYPES,
    TRANSFORMS,
    V,
)
from torch import Tensor

from eagle3_schemas import DraftVocab
from eagle3_server.engine import SupervisionJob


@pytest.fixture(params=TRANSFORMS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def job_of(batch_of: Any) -> Callable[..., SupervisionJob]:
    """`job_of(draft_ids, lengths, **fields)`: a validated request."""

    def build(
        draft_ids: Tensor,
        lengths: tuple[int, ...] = (10, 7, 4),
        vocab_size: int = V,
        **fields: Any,
    ) -> SupervisionJob:
        inputs = batch_of(vocab_size, lengths)
        job = SupervisionJob(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.bool(),
            loss_mask=inputs.loss_mask.bool(),
            aux_layer_ids=AUX,
            draft_vocab=DraftVocab.from_ids(draft_ids),
            encoding="probs",
            rows="position_mask",
            aux_dtype="model",
            exact=True,
        )
        return replace(job, **fields)

    return build
