"""The whole path: what a trainer gets from a server is, bit for bit, what the definition says.

Everything here compares with the oracles of conftest.py and with `HFEagle3TargetModel`, without
tolerance: one machine, one torch, equal thread counts, `exact=True`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eagle3_client import InvalidRequest
from eagle3_server import HFEagle3TargetModel

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(
    params=[
        "right-padded",
        "left-padded",
        "pads-that-differ",
        "no-padding",
        "loss-mask-on-unattended",
        "row-without-supervision",
        "row-of-padding",
        "batch-without-supervision",
        "one-token",
    ]
)
def inputs(request: pytest.FixtureRequest, model: Any, batch_of: Any) -> Any:
    vocab_size = model.config.vocab_size
    batch = batch_of(vocab_size)
    match request.param:
        case "left-padded":
            return batch_of(vocab_size, left=True)
        case "pads-that-differ":
            noise = torch.randint(1, vocab_size, batch.input_ids.shape)
            padded = batch.attention_mask == 0
            return replace(batch, input_ids=torch.where(padded, noise, batch.input_ids))
        case "no-padding":
            return batch_of(vocab_size, (11, 11))
        case "loss-mask-on-unattended":
            return replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
        case "row-without-supervision":
            loss_mask = batch.loss_mask.clone()
            loss_mask[1] = 0
            return replace(batch, loss_mask=loss_mask)
        case "row-of-padding":
            return batch_of(vocab_size, (10, 0, 4))
        case "batch-without-supervision":
            return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
        case "one-token":
            return batch_of(vocab_size, (1, 1))
    return batch


@pytest.fixture(params=["frequency-ordered", "ascending", "whole-vocab", "one-id"])
def draft_ids(request: pytest.FixtureRequest, model: Any, frequency_ordered: Any) -> Tensor:
    vocab_size = model.config.vocab_size
    size = {"whole-vocab": vocab_size, "one-id": 1}.get(request.param, 53)
    ids: Tensor = frequency_ordered(vocab_size, size)
    return ids.sort().values if request.param == "ascending" else ids


def test_a_remote_batch_is_what_the_definition_says(
    model: Any, inputs: Any, draft_ids: Tensor, serve: Any, connect: Any, expect: Any, matches: Any
) -> None:
    backend = connect(serve(model), draft_ids, exact=True)
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))


@pytest.mark.parametrize("rows", ["position_mask", "loss_mask", "all"])
def test_the_rows_asked_for_come_and_no_others(
    model: Any,
    inputs: Any,
    frequency_ordered: Any,
    rows: str,
    serve: Any,
    connect: Any,
    expect: Any,
    matches: Any,
) -> None:
    """Aux layers out of order and with the last one: they come in the order asked for."""
    draft_ids = frequency_ordered(model.config.vocab_size, 53)
    aux_layer_ids = (model.config.num_hidden_layers - 1, 0, 3)
    backend = connect(serve(model), draft_ids, exact=True, rows=rows, aux_layer_ids=aux_layer_ids)
    batch = backend.generate_batch(*inputs)
    matches(batch, expect(model, inputs, draft_ids, aux_layer_ids, rows))


def test_a_remote_batch_equals_the_co_located_one(
    model: Any, inputs: Any, frequency_ordered: Any, serve: Any, connect: Any, same: Any
) -> None:
    draft_ids = frequency_ordered(model.config.vocab_size, 53)
    remote = connect(serve(model), draft_ids, exact=True).generate_batch(*inputs)
    local = HFEagle3TargetModel(model).generate_batch(*inputs)
    attended = inputs.attention_mask.bool()
    same(remote.aux_hidden_states[attended], local.aux_hidden_states[attended])
    same(remote.input_ids, local.input_ids)
    same(remote.attention_mask, local.attention_mask)
    same(remote.loss_mask, local.loss_mask)
    assert local.logits is not None
    assert remote.position_mask is not None
    assert remote.target_probs is not None
    trained = remote.position_mask.squeeze(-1)
    probs = torch.softmax(local.logits[..., draft_ids].float(), -1)
    same(remote.target_probs[trained], probs[trained])


def test_supervised_and_unsupervised_positions_both_occur(
    model: Any, batch_of: Any, frequency_ordered: Any, serve: Any, connect: Any
) -> None:
    """Else the comparisons of this file would compare nothing."""
    inputs = batch_of(model.config.vocab_size)
    backend = connect(serve(model), frequency_ordered(model.config.vocab_size, 53))
    position_mask = backend.generate_batch(*inputs).position_mask
    supervised = int((inputs.loss_mask[:, 1:] != 0).sum())
    assert 0 < int(position_mask.sum()) < supervised


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    "mask_dtype", [torch.int64, torch.bool, torch.int32, torch.float32, torch.uint8], ids=str
)
def test_inputs_come_back_shifted_and_in_their_own_dtypes(
    build_model: Any,
    batch_of: Any,
    frequency_ordered: Any,
    serve: Any,
    connect: Any,
    same: Any,
    ids_dtype: torch.dtype,
    mask_dtype: torch.dtype,
) -> None:
    plain = batch_of(131)
    inputs = replace(
        plain,
        input_ids=plain.input_ids.to(ids_dtype),
        attention_mask=plain.attention_mask.to(mask_dtype),
        loss_mask=plain.loss_mask.to(mask_dtype),
    )
    model = build_model("llama")
    backend = connect(serve(model), frequency_ordered(131, 53), exact=True)
    batch = backend.generate_batch(*inputs)
    same(batch.attention_mask, inputs.attention_mask)
    for shifted, before in (
        (batch.input_ids, inputs.input_ids),
        (batch.loss_mask, inputs.loss_mask),
    ):
        same(shifted[:, :-1], before[:, 1:])
        same(shifted[:, -1:], torch.zeros_like(before[:, :1]))
    other = backend.generate_batch(*plain)
    same(batch.aux_hidden_states, other.aux_hidden_states)
    same(batch.position_mask, other.position_mask)
    same(batch.target_probs, other.target_probs)


def test_a_mask_of_any_non_zero_values_means_true(
    build_model: Any, batch_of: Any, frequency_ordered: Any, serve: Any, connect: Any, same: Any
) -> None:
    inputs = batch_of(131)
    backend = connect(serve(build_model("llama")), frequency_ordered(131, 53), exact=True)
    scaled = replace(
        inputs, attention_mask=inputs.attention_mask * -3, loss_mask=inputs.loss_mask * 0.25
    )
    batch, other = backend.generate_batch(*scaled), backend.generate_batch(*inputs)
    same(batch.aux_hidden_states, other.aux_hidden_states)
    same(batch.position_mask, other.position_mask)
    same(batch.target_probs, other.target_probs)
    same(batch.attention_mask, scaled.attention_mask)


def test_argmax_ties_go_to_the_lowest_id(
    build_model: Any, batch_of: Any, serve: Any, connect: Any
) -> None:
    model = build_model("llama")
    nn.init.zeros_(model.lm_head.weight)  # every logit is 0: all ids tie, 0 is the lowest
    inputs, bridge = batch_of(131), serve(model)
    with_it = connect(bridge, torch.tensor([7, 0])).generate_batch(*inputs)
    without_it = connect(bridge, torch.tensor([7, 1])).generate_batch(*inputs)
    assert torch.equal(with_it.position_mask.squeeze(-1), with_it.loss_mask != 0)
    assert not without_it.position_mask.any()


def test_input_embeddings_are_the_targets(model: Any, serve: Any, connect: Any, same: Any) -> None:
    backend = connect(serve(model))
    weight = backend.get_input_embeddings().weight
    same(weight, model.get_input_embeddings().weight.detach())
    assert backend.get_input_embeddings().weight is weight, "downloaded twice"


def test_output_dtype_casts_aux_states_and_nothing_else(
    model: Any, dtype: torch.dtype, batch_of: Any, frequency_ordered: Any, serve: Any, connect: Any,
    expect: Any, same: Any,
) -> None:  # fmt: skip
    draft_ids = frequency_ordered(model.config.vocab_size, 53)
    inputs, bridge = batch_of(model.config.vocab_size), serve(model)
    expected = expect(model, inputs, draft_ids)
    for output_dtype in (torch.float32, torch.bfloat16):
        backend = connect(bridge, draft_ids, output_dtype=output_dtype)
        batch = backend.generate_batch(*inputs)
        same(batch.aux_hidden_states, expected.aux_hidden_states.to(output_dtype))
        same(batch.target_probs, expected.target_probs)
        same(batch.input_ids[:, :-1], inputs.input_ids[:, 1:])


def test_exact_refuses_an_output_dtype_that_loses_bits(
    model: Any, dtype: torch.dtype, batch_of: Any, frequency_ordered: Any, serve: Any, connect: Any
) -> None:
    inputs, bridge = batch_of(model.config.vocab_size), serve(model)
    draft_ids = frequency_ordered(model.config.vocab_size, 53)
    lossy = connect(bridge, draft_ids, exact=True, output_dtype=torch.float16)
    with pytest.raises(InvalidRequest, match=r"exact=True forbids output_dtype torch\.float16"):
        lossy.generate_batch(*inputs)
    wider = connect(bridge, draft_ids, exact=True, output_dtype=torch.float32)
    assert wider.generate_batch(*inputs).aux_hidden_states.dtype is torch.float32


def test_rows_that_were_not_sent_give_the_trainer_no_gradient(
    model: Any, batch_of: Any, frequency_ordered: Any, serve: Any, connect: Any
) -> None:
    """A uniform fill would train the draft on noise wherever a trainer forgets the mask."""
    draft_ids = frequency_ordered(model.config.vocab_size, 53)
    batch = connect(serve(model), draft_ids).generate_batch(*batch_of(model.config.vocab_size))
    draft_logits = torch.randn(*batch.target_probs.shape, requires_grad=True)
    loss = -(batch.target_probs * draft_logits.log_softmax(-1)).sum()
    loss.backward()
    trained = batch.position_mask.squeeze(-1)
    has_gradient = draft_logits.grad.ne(0).any(-1)
    assert trained.any()
    assert torch.equal(has_gradient, trained)


def test_a_repeat_of_a_request_has_the_same_bits(
    model: Any, batch_of: Any, frequency_ordered: Any, serve: Any, connect: Any, same: Any
) -> None:
    inputs = batch_of(model.config.vocab_size)
    backend = connect(serve(model), frequency_ordered(model.config.vocab_size, 53))
    first = backend.generate_batch(*inputs)
    backend.generate_batch(*batch_of(model.config.vocab_size, (12, 5), seed=9))
    again = backend.generate_batch(*inputs)
    same(again.aux_hidden_states, first.aux_hidden_states)
    same(again.target_probs, first.target_probs)
