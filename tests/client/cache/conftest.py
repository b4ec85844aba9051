"""What the tests of the disk cache share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.servers import PATIENCE_S

from eagle3_client.disk_cache import FrameCache
from eagle3_schemas.frame import Frame
from eagle3_server import TransformersTarget


class Counted:
    """A real target that counts, and takes its time over, what is downloaded from it."""

    def __init__(self, model: Any, seconds: float = 0.0) -> None:
        self.inner = TransformersTarget(model, model_id="tiny")
        self.seconds = seconds
        self.embeddings = self.heads = 0

    def describe(self) -> Any:
        return self.inner.describe()

    def supervise(self, job: Any) -> Any:
        return self.inner.supervise(job)

    def input_embeddings(self) -> Any:
        self.embeddings += 1
        time.sleep(self.seconds)
        return self.inner.input_embeddings()

    def draft_head(self, draft_vocab: Any) -> Any:
        self.heads += 1
        time.sleep(self.seconds)
        return self.inner.draft_head(draft_vocab)


@pytest.fixture
def target(model: Any) -> Counted:
    return Counted(model)


@pytest.fixture
def frame() -> Frame:
    generator = torch.Generator().manual_seed(3)
    return Frame(
        {"fingerprint": "f", "upcast": False}, {"weight": torch.randn(40, 5, generator=generator)}
    )


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path, wait_s=PATIENCE_S)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse() -> Frame:
    raise AssertionError("a second download")


def same_frame(one: Frame, other: Frame) -> None:
    assert one.fields == other.fields
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name])
        assert tensor.dtype is other.tensors[name].dtype
