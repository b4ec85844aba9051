"""What cannot go together is refused in words; none of it needs the packages that quantise."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.quantised.checkpoints import save_plain

from eagle3_schemas.errors import InvalidRequest
from eagle3_server import ServerSettings
from eagle3_server.loading import load_target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("models") / "tiny")


def quantised(checkpoint: Path, path: Path, **config: Any) -> Path:
    """A checkpoint whose config says that it is quantised."""
    path.mkdir()
    said = json.loads((checkpoint / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
    return path


class OfTwo:
    size, rank, device = 2, 0, torch.device("cpu")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="bnb-nf4"):
        ServerSettings(model="x", quantization="int3")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            r"quantised already \(bitsandbytes nf4\); serve it without --quantization bnb-int8",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"quantised already \(gptq 4-bit\)"),
        ({"quant_method": "fp8"}, r"quantised already \(fp8\)"),
    ],
)
def test_a_quantised_checkpoint_is_not_quantised_again(
    checkpoint: Path, tmp_path: Path, config: dict[str, Any], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = ServerSettings(
        model=str(quantised(checkpoint, tmp_path / "q", **config)), quantization="bnb-int8"
    )
    monkeypatch.setattr("eagle3_server.loading.quantization_config", lambda *_: None)
    with pytest.raises(InvalidRequest, match=words):
        load_target(settings)


def test_a_gguf_file_is_not_quantised_again(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    with pytest.raises(InvalidRequest, match=r"\.gguf file is quantised already.*without --quant"):
        load_target(ServerSettings(model=str(tmp_path / "x.gguf"), quantization="bnb-nf4"))


def test_quantised_weights_are_not_sharded(checkpoint: Path) -> None:
    settings = ServerSettings(model=str(checkpoint), quantization="torchao-int8", tp=2)
    group: Any = OfTwo()
    with pytest.raises(InvalidRequest, match=r"quantised weights cannot be sharded.*--device-map"):
        load_target(settings, group)


def test_neither_is_a_checkpoint_that_is_quantised(checkpoint: Path, tmp_path: Path) -> None:
    path, group = quantised(checkpoint, tmp_path / "q", quant_method="gptq", bits=4), OfTwo()
    with pytest.raises(InvalidRequest, match=r"cannot be sharded, be it .* in the checkpoint"):
        load_target(ServerSettings(model=str(path), tp=2), group)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantization", "method"),
    [("bnb-nf4", "bitsandbytes"), ("bnb-int8", "bitsandbytes"), ("torchao-int8", "torchao")],
)
def test_a_missing_package_is_named_with_what_installs_it(
    checkpoint: Path, quantization: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = rf'{method} is not installed.*\n  pip install "eagle3-remote\[server,{method}\]"'
    with pytest.raises(InvalidRequest, match=words):
        load_target(ServerSettings(model=str(checkpoint), quantization=quantization))


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "compressed-tensors"])
def test_a_checkpoint_that_needs_a_missing_package_says_so(
    checkpoint: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantised(checkpoint, tmp_path / "q", quant_method=method)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=rf"pip install .eagle3-remote\[server,{method}\]"):
        load_target(ServerSettings(model=str(path)))


@pytest.mark.slow
def test_a_quantisation_that_reaches_nothing_is_refused(tmp_path: Path, build_model: Any) -> None:
    """Falcon's linear layers are of a class of their own, which bitsandbytes passes by."""
    build_model("falcon").save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match=r"bnb-nf4 reaches none of FalconForCausalLM's layers"):
        load_target(ServerSettings(model=str(tmp_path), device="cpu", quantization="bnb-nf4"))


@pytest.mark.slow
def test_a_quantisation_that_reaches_little_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.families.configs import FAMILIES

    next(f for f in FAMILIES if f.name == "Mixtral").build(torch.float32).save_pretrained(tmp_path)
    load_target(ServerSettings(model=str(tmp_path), device="cpu", quantization="bnb-nf4"))
    assert "bnb-nf4 reaches 14 % of MixtralForCausalLM's layers alone" in caplog.text
