"""A target that cannot be loaded, and what transformers' own words leave out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.servers import save_tiny_llama

from eagle3_schemas.errors import InvalidRequest
from eagle3_server import ServerSettings
from eagle3_server.loading import load_target


def test_weights_that_the_user_may_not_read_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As user 10001 of a container; root may read all, so the system's answer is pretended."""
    folder = save_tiny_llama(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.unlink()  # what safetensors says of both is the same
    weights.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != weights)
    with pytest.raises(InvalidRequest, match=r"may not read .*model.safetensors; .*chmod -R a\+rX"):
        load_target(ServerSettings(model=str(folder), device="cpu"))


def test_without_a_folder_for_temporary_files_the_model_is_not_blamed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_llama(tmp_path / "tiny")

    def none(*_arguments: Any, **_named: Any) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", none)
    with pytest.raises(InvalidRequest, match="in a container add --tmpfs /tmp"):
        load_target(ServerSettings(model=str(folder), device="cpu"))


def test_a_path_that_looks_like_a_hub_id_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_arguments: Any, **_named: Any) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(InvalidRequest, match=r"No folder 'models/nope' is here, so the hub was"):
        load_target(ServerSettings(model="models/nope", device="cpu"))
