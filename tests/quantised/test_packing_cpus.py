"""CPUs for which bitsandbytes packs 4-bit weights anew in the first forward: that is kept off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families.full_path import make_job
from tests.quantised.checkpoints import V

from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import InvalidRequest
from eagle3_server import HFEagle3TargetModel, ServerSettings, TransformersTarget
from eagle3_server.loading import load_target

pytestmark = pytest.mark.slow


@pytest.fixture
def packing_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every CPU be one with AVX512-BF16, as bitsandbytes asks for it."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def loaded(checkpoint_of: Any) -> TransformersTarget:
    path, quantization = checkpoint_of("bnb-nf4")
    return load_target(ServerSettings(model=str(path), quantization=quantization, device="cpu"))


def test_supervision_and_identity_are_those_of_other_cpus(
    checkpoint_of: Any, frequency_ordered: Any, request: pytest.FixtureRequest
) -> None:
    from dataclasses import replace

    job = make_job(aux_layer_ids=(6, 1, 2))
    vocab = DraftVocab.from_ids(frequency_ordered(V, 53))
    job = replace(job, input_ids=job.input_ids % V, draft_vocab=vocab)
    other = loaded(checkpoint_of)
    expected = other.supervise(job).tensors
    request.getfixturevalue("packing_cpu")
    target = loaded(checkpoint_of)
    got = target.supervise(job).tensors
    assert target.describe() == other.describe()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("make", [HFEagle3TargetModel, TransformersTarget])
def test_weights_that_a_forward_has_packed_are_refused(
    checkpoint_of: Any, packing_cpu: None, make: Any
) -> None:
    import transformers
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    from eagle3_server.quantization import quantization_config

    path, quantization = checkpoint_of("bnb-nf4")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, device_map={"": "cpu"},
        quantization_config=quantization_config(quantization, torch.float32),
    )  # fmt: skip
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(InvalidRequest, match=r"layers\.2\.mlp\.up_proj.*load the model again"):
        make(model, **({} if make is HFEagle3TargetModel else {"model_id": "packed"}))
