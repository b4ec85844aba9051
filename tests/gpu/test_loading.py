"""Quantised and offloaded targets on a GPU, against the same model without our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.families.full_path import make_job
from tests.gpu.conftest import DEVICE
from tests.gpu.test_streams import all_equal, beside, parts
from tests.quantised.checkpoints import L, V, save_plain

from eagle3_schemas import DraftVocab
from eagle3_server import ServerSettings
from eagle3_server.loading import load_target
from eagle3_server.quantization import quantization_config

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.mark.parametrize("form", ["bnb-nf4", "bnb-int8", "torchao-int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_quantised_target_has_its_own_models_bits(
    plain: Path, form: str, dtype: torch.dtype, serve: Any, connect: Any, batch_of: Any,
    frequency_ordered: Any,
) -> None:  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    settings = ServerSettings(model=str(plain), quantization=form, dtype=name, device=str(DEVICE))
    target = load_target(settings)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        plain,
        dtype=dtype,
        device_map={"": DEVICE},
        quantization_config=quantization_config(form, dtype),
    )
    ids, inputs = frequency_ordered(V, 53), batch_of(V, (24, 17, 9))
    backend = connect(serve(target), ids, exact=True, device=DEVICE)
    answer = backend.generate_batch(*inputs)
    all_equal([parts(answer)], [beside(model.eval(), ids, tuple(inputs))])


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_offloaded_from_the_gpu_supervise_bit_equal(
    plain: Path, place: str, frequency_ordered: Any
) -> None:
    from dataclasses import replace

    here = str(DEVICE) if DEVICE.type == "cpu" else 0
    device_map = {
        "model.embed_tokens": here,
        "model.rotary_emb": here,
        "model.norm": here,
        "lm_head": place,
        **{f"model.layers.{i}": place if i % 2 else here for i in range(L)},
    }
    settings = ServerSettings(model=str(plain), device_map=json.dumps(device_map))
    split = load_target(settings)
    whole = load_target(ServerSettings(model=str(plain), device=str(DEVICE)))
    assert split.describe().weights_digest == whole.describe().weights_digest
    vocab = DraftVocab.from_ids(frequency_ordered(V, 53))
    for encoding in ("probs", "logits", "hidden"):
        job = make_job(encoding=encoding, aux_layer_ids=(6, 1, 2), exact=encoding != "hidden")
        job = replace(job, input_ids=job.input_ids % V, draft_vocab=vocab)
        got, expected = (target.supervise(job).tensors for target in (split, whole))
        for key, tensor in expected.items():
            assert torch.equal(got[key], tensor), f"{key} of {encoding}"
