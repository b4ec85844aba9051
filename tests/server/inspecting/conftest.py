"""A tiny target with a tokenizer, served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny_tokenizer import save_with_tokenizer

from eagle3_server import ServerSettings
from eagle3_server.loading import load_target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny", [" two", "unused"])


@pytest.fixture(scope="module")
def target(checkpoint: Path) -> Any:
    return load_target(ServerSettings(model=str(checkpoint), device="cpu"))


@pytest.fixture
def bridge(serve: Any, target: Any, checkpoint: Path) -> Any:
    return serve(target, model=str(checkpoint))
