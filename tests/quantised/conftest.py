"""Targets of one tiny model in every form that runs on the CPU, loaded as users load them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantised.checkpoints import save_compressed, save_plain, save_quantised

from eagle3_server import ServerSettings, TransformersTarget
from eagle3_server.loading import load_target

AT_LOAD = ("bnb-nf4", "bnb-int8", "torchao-int8")
SAVED = (
    "bnb-nf4 saved",
    "bnb-nf4 nested saved",
    "bnb-fp4 saved",
    "bnb-int8 saved",
    "torchao-int8 saved",
    "torchao-int8-dynamic saved",
    "compressed token",
    "compressed tensor",
)
FORMS = (*AT_LOAD, *SAVED)


@pytest.fixture(scope="session", autouse=True)
def packages() -> Iterator[None]:
    """They say more while they are imported than a test may; oracles compute alike on every CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("bitsandbytes", "compressed_tensors", "torchao"):
            if importlib.util.find_spec(name) is not None:  # slow tests alone need them
                importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patched:
        if importlib.util.find_spec("bitsandbytes") is not None:
            patched.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture(scope="session")
def checkpoint_of(
    plain: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, str | None]]:
    """`checkpoint_of(form)`: a checkpoint, and the `--quantization` that gives the form."""
    import transformers

    folder = tmp_path_factory.mktemp("quantised")

    @lru_cache
    def build(form: str) -> tuple[Path, str | None]:
        if form in AT_LOAD:
            return plain, form
        path = folder / form.replace(" ", "-") / "tiny"  # one name: it is in the fingerprint
        path.parent.mkdir()
        kind, _, rest = form.partition(" ")
        if kind == "compressed":
            return save_compressed(plain, path, rest), None
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
        )

        bits_and_bytes: Any = transformers.BitsAndBytesConfig
        config = {
            "bnb-nf4": lambda: bits_and_bytes(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=rest.startswith("nested"),
                bnb_4bit_compute_dtype=torch.float32,
            ),
            "bnb-fp4": lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
            "bnb-int8": lambda: bits_and_bytes(load_in_8bit=True),
            "torchao-int8": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2)),
            "torchao-int8-dynamic": lambda: transformers.TorchAoConfig(
                Int8DynamicActivationInt8WeightConfig()
            ),
        }[kind]()
        return save_quantised(plain, path, config), None

    return build


@pytest.fixture(scope="session")
def load(checkpoint_of: Any) -> Callable[..., TransformersTarget]:
    """`load(form, dtype)`: a target; each has a model of its own."""

    def build(form: str, dtype: str = "float32") -> TransformersTarget:
        path, quantization = checkpoint_of(form)
        settings = ServerSettings(
            model=str(path), quantization=quantization, dtype=dtype, device="cpu"
        )
        return load_target(settings)

    return build
