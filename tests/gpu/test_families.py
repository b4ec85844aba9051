"""On a GPU every family's `exact` supervision has the bits of the co-located full path."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tests.families.configs import FAMILIES, Family
from tests.families.full_path import LAYER_SETS, draft_vocab, make_job, run_full_path
from tests.families.packing import AMPLIFIED, alone, difference, packed_job
from tests.gpu.conftest import DEVICE, OnDevice

from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.supervision import unpack_bits
from eagle3_server import TransformersTarget
from eagle3_server.engine import SupervisionJob

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)
PACKED = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""The CPU's are 1e-5 and 3e-2. On an H100 bfloat16 gave 0.0314: with a mask, attention takes other
kernels than a document alone, and the models here make three hundredths of rounding."""


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def on_device(job: SupervisionJob) -> SupervisionJob:
    """The same job for an oracle, which moves nothing itself."""
    moved = {
        field.name: value.to(DEVICE)
        for field in fields(job)
        if isinstance(value := getattr(job, field.name), torch.Tensor)
    }
    return replace(job, **moved)


def definition(logits: torch.Tensor, job: SupervisionJob) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probs [B, T, D] and position_mask [B, T] of unshifted logits, spelt out."""
    shifted, vocab = shift_left_with_zero(logits), job.draft_vocab.selected_token_ids
    probs = shifted[..., vocab.to(logits.device)].float().softmax(-1)
    argmax = torch.tensor(
        [[row.index(max(row)) for row in rows] for rows in shifted.tolist()]  # ties: the lowest
    )
    supervised = shift_left_with_zero(job.loss_mask)
    return probs, torch.isin(argmax, vocab) & supervised


@pytest.mark.parametrize("left_padded", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_exact_is_bit_equal_to_the_full_path(
    family: Family, dtype: torch.dtype, left_padded: bool
) -> None:
    placed: Any = OnDevice(family)
    target = TransformersTarget(placed.build(dtype), model_id="tiny")
    oracle = placed.build(dtype).requires_grad_(False)
    job = make_job(left_padded=left_padded)
    full = run_full_path(oracle, family, on_device(job))
    probs, mask = definition(full.logits, job)
    assert mask.sum() > 8
    for layers in LAYER_SETS:
        for encoding in ("probs", "logits"):
            asked = replace(job, encoding=encoding, aux_layer_ids=layers)
            tensors = target.supervise(asked).tensors
            assert all(tensor.device.type == DEVICE.type for tensor in tensors.values())
            assert torch.equal(unpack_bits(tensors["position_mask"].cpu(), mask.shape), mask)
            aux = full.aux(layers)[job.attention_mask]
            torch.testing.assert_close(tensors["aux_hidden_states"], aux, rtol=0, atol=0)
            form = ENCODINGS[encoding]
            got = form.decode(tensors[form.tensor_name], None)
            torch.testing.assert_close(got, probs[mask], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_default_mode_is_exact_but_for_rounding(family: Family, dtype: torch.dtype) -> None:
    """Rows alone through the head, the end trimmed, `hidden` rebuilt on the device."""
    from eagle3_schemas.draft_head import DraftHead

    placed: Any = OnDevice(family)
    target = TransformersTarget(placed.build(dtype), model_id="tiny")
    job = make_job(rows="loss_mask", exact=False)
    full = run_full_path(placed.build(dtype).requires_grad_(False), family, on_device(job))
    probs, _ = definition(full.logits, job)
    attended = shift_left_with_zero(job.attention_mask)
    supervised = shift_left_with_zero(job.loss_mask)
    for encoding in target.describe().encodings:
        tensors = target.supervise(replace(job, encoding=encoding)).tensors
        form, head = ENCODINGS[encoding], None
        if form.needs_draft_head:
            parts = target.draft_head(draft_vocab()).tensors
            head = DraftHead.build(parts["weight"], parts.get("bias"), target.describe().transform)
        got = form.decode(tensors[form.tensor_name], head)[attended[supervised]]
        worst = float((got - probs[supervised & attended]).abs().max())
        print(f"{family.name} {dtype} {encoding}: {worst:.1e}")
        # The CPU's bound is 2e-5 and 0.08: see docs/encodings.md.
        assert worst <= (1e-4 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_packed_documents_are_each_as_alone(family: Family, dtype: torch.dtype) -> None:
    placed: Any = OnDevice(family)
    target = TransformersTarget(placed.build(dtype), model_id="tiny")
    job = packed_job()
    oracle = placed.build(dtype).requires_grad_(False)
    aux, logits = alone(oracle, family, on_device(job))
    probs, _ = definition(logits, job)
    rows = shift_left_with_zero(job.loss_mask)
    for exact in (True, False):
        tensors = target.supervise(replace(job, exact=exact)).tensors
        worst = max(
            difference(tensors["aux_hidden_states"], aux.flatten(0, 1)),
            difference(tensors["target_probs"], probs[rows]),
        )
        print(f"{family.name} {dtype} {target.describe().packing}, exact={exact}: {worst:.1e}")
        assert worst <= AMPLIFIED.get((family.name, dtype), PACKED[dtype])
