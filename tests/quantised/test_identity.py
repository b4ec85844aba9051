"""Two servers of different quantisation are different targets, and so are other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantised.checkpoints import save_compressed, save_plain
from tests.quantised.conftest import FORMS

from eagle3_server import ServerSettings
from eagle3_server.fingerprint import weights_digest
from eagle3_server.loading import load_target

pytestmark = pytest.mark.slow

WORDS = {
    "bnb-nf4": "bitsandbytes nf4",
    "bnb-int8": "bitsandbytes int8",
    "torchao-int8": "torchao Int8WeightOnlyConfig",
    "bnb-nf4 saved": "bitsandbytes nf4",
    "bnb-nf4 nested saved": "bitsandbytes nf4 nested",
    "bnb-fp4 saved": "bitsandbytes fp4",
    "bnb-int8 saved": "bitsandbytes int8",
    "torchao-int8 saved": "torchao Int8WeightOnlyConfig",
    "torchao-int8-dynamic saved": "torchao Int8DynamicActivationInt8WeightConfig",
    "compressed token": "compressed-tensors int-quantized w int8 a int8",
    "compressed tensor": "compressed-tensors int-quantized w int8 a int8",
}


@pytest.fixture(scope="module")
def described(load: Any) -> dict[str, Any]:
    return {form: load(form).describe() for form in FORMS}


def test_model_info_names_the_form(described: dict[str, Any]) -> None:
    assert {form: found.quantization for form, found in described.items()} == WORDS


def test_every_form_has_a_fingerprint_of_its_own(described: dict[str, Any], plain: Path) -> None:
    whole = load_target(ServerSettings(model=str(plain), dtype="float32", device="cpu"))
    prints = {form: found.fingerprint for form, found in described.items()}
    prints["plain"] = whole.describe().fingerprint
    # Quantised at load and saved quantised is the same target twice.
    for name in ("bnb-nf4", "bnb-int8", "torchao-int8"):
        assert prints.pop(f"{name} saved") == prints[name]
    assert len(set(prints.values())) == len(prints)


def test_a_second_load_has_the_same_fingerprint(described: dict[str, Any], load: Any) -> None:
    for form in ("bnb-nf4", "bnb-int8", "torchao-int8", "compressed token"):
        assert load(form).describe().fingerprint == described[form].fingerprint


@pytest.mark.parametrize("form", ["bnb-nf4", "bnb-int8", "torchao-int8", "compressed"])
def test_the_weights_digest_changes_with_the_weights(form: str, tmp_path: Path, load: Any) -> None:
    digests = set()
    for seed in (0, 1):
        path = save_plain(tmp_path / f"{seed}" / "tiny", seed=seed)
        settings = {"quantization": form}
        if form == "compressed":
            path, settings = save_compressed(path, tmp_path / f"c{seed}", "token"), {}
        target = load_target(ServerSettings(model=str(path), device="cpu", **settings))
        digests.add(target.describe().weights_digest)
    assert len(digests) == 2


def test_the_digest_reads_what_a_quantised_tensor_is_made_of(load: Any) -> None:
    model = load("torchao-int8")._model
    before = weights_digest(model)
    weight = model.model.layers[3].mlp.up_proj.weight
    with torch.no_grad():
        weight.data.scale.mul_(2)
    assert weights_digest(model) != before
