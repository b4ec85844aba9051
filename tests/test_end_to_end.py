"""The whole path: what a trainer gets from a server is, bit for bit, what the definition says.

Everything here compares with the oracles of conftest.py and with `HFEagle3TargetModel`, without
tolerance: one machine, one torch, equal thread counts, `exact=True`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

from eagle3_client import FingerprintMismatch, InvalidRequest, RemoteEagle3Error
from eagle3_schemas import Eagle3TargetBatch
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


# --- several trainers, several mappings ---


class Trainer:
    """One trainer's settings, its backend, and the check of what it gets."""

    def __init__(
        self, backend: Any, model: Any, expect: Any, draft_ids: Tensor, layers: tuple[int, ...]
    ) -> None:
        self.backend, self.model, self.expect = backend, model, expect
        self.draft_ids, self.layers = draft_ids, layers

    def expected(self, inputs: Any) -> Any:
        return self.expect(self.model, inputs, self.draft_ids, self.layers)


@pytest.fixture
def two_trainers(
    model: Any, serve: Any, connect: Any, expect: Any, frequency_ordered: Any
) -> list[Trainer]:
    """Two draft vocabs of different size and order, two sets of layers, one server."""
    bridge = serve(model)
    trainers = []
    for seed, size, layers in ((5, 53, (1, 2, 3)), (6, 31, (5, 0, 4))):
        draft_ids = frequency_ordered(model.config.vocab_size, size, seed)
        backend = connect(bridge, draft_ids, aux_layer_ids=layers, exact=True, max_in_flight=3)
        trainers.append(Trainer(backend, model, expect, draft_ids, layers))
    return trainers


def test_two_trainers_in_turns_get_their_own_supervision(
    two_trainers: list[Trainer], model: Any, batch_of: Any, matches: Any
) -> None:
    for seed in range(3):
        inputs = batch_of(model.config.vocab_size, seed=seed)
        for trainer in two_trainers:
            matches(trainer.backend.generate_batch(*inputs), trainer.expected(inputs))


def test_two_trainers_at_once_get_their_own_supervision(
    two_trainers: list[Trainer], model: Any, batch_of: Any, matches: Any
) -> None:
    batches = [batch_of(model.config.vocab_size, seed=seed) for seed in range(6)]
    start = threading.Barrier(len(two_trainers))

    def train(trainer: Trainer) -> list[Eagle3TargetBatch]:
        start.wait()
        handles = [trainer.backend.generate_batch_async(*inputs) for inputs in batches]
        return [handle.result(60) for handle in handles]

    with ThreadPoolExecutor(len(two_trainers)) as pool:
        results = list(pool.map(train, two_trainers))
    for trainer, got in zip(two_trainers, results, strict=True):
        for inputs, batch in zip(batches, got, strict=True):
            matches(batch, trainer.expected(inputs))


@pytest.fixture
def llama(build_model: Any) -> nn.Module:
    return build_model("llama")


def test_a_changed_mapping_leaves_requests_in_flight_theirs(
    llama: Any, gated: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any,
    mapping: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    """One request is on the server and two wait on the client while the mapping changes."""
    target, inputs = gated(llama), batch_of(131)
    old, new = frequency_ordered(131, 53, 5), frequency_ordered(131, 31, 6)
    backend = connect(serve(target), old, max_in_flight=1)
    # While no forward runs: the target hooks the model it owns.
    expected_before, expected_after = (expect(llama, inputs, ids) for ids in (old, new))
    before = [backend.generate_batch_async(*inputs) for _ in range(3)]
    target.wait_until_entered()
    backend.set_vocab_mapping(*mapping(new, 131))
    after = backend.generate_batch_async(*inputs)
    target.gate.set()
    for handle in before:
        matches(handle.result(60), expected_before)
    matches(after.result(60), expected_after)


@pytest.mark.parametrize("reason", ["repeated", "out-of-range", "another-set", "short-mask"])
def test_a_mapping_that_is_refused_leaves_the_former_one(
    llama: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, mapping: Any,
    expect: Any, matches: Any, reason: str,
) -> None:  # fmt: skip
    former = frequency_ordered(131, 53)
    backend, inputs = connect(serve(llama), former), batch_of(131)
    ids, mask = mapping(torch.tensor([3, 1, 2]), 131)
    match reason:
        case "repeated":
            ids = torch.tensor([3, 1, 3])
        case "out-of-range":
            ids, mask = mapping(torch.tensor([3, 1, 131]), 132)
        case "another-set":
            mask[77] = True
        case "short-mask":
            mask = mask[:-1]
    with pytest.raises(InvalidRequest):
        backend.set_vocab_mapping(ids, mask)
    matches(backend.generate_batch(*inputs), expect(llama, inputs, former))


def test_a_mapping_the_server_did_not_take_leaves_the_former_one(
    llama: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, mapping: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    bridge, former, inputs = serve(llama), frequency_ordered(131, 53), batch_of(131)
    is_down = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT" and is_down.is_set():
            raise httpx.ConnectError("refused")
        return bridge.handle_request(request)

    backend = connect(httpx.MockTransport(answer), former, max_retries=0)
    is_down.set()
    with pytest.raises(RemoteEagle3Error, match="refused"):
        backend.set_vocab_mapping(*mapping(torch.tensor([3, 1, 2]), 131))
    matches(backend.generate_batch(*inputs), expect(llama, inputs, former))


def test_a_mask_of_integers_and_ids_of_int32_are_a_mapping_too(
    llama: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, mapping: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    draft_ids, inputs = frequency_ordered(131, 53), batch_of(131)
    ids, mask = mapping(draft_ids, 131)
    backend = connect(serve(llama))
    backend.set_vocab_mapping(ids.int(), mask.long())
    matches(backend.generate_batch(*inputs), expect(llama, inputs, draft_ids))


def test_a_caller_may_overwrite_its_mapping_afterwards(
    llama: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, mapping: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    draft_ids, inputs = frequency_ordered(131, 53), batch_of(131)
    ids, mask = mapping(draft_ids.clone(), 131)
    bridge = serve(llama)
    backend = connect(bridge)
    backend.set_vocab_mapping(ids, mask)
    ids.zero_()
    mask.zero_()
    matches(backend.generate_batch(*inputs), expect(llama, inputs, draft_ids))
    bridge.app_client = serve(llama).app_client  # it must be told the mapping once more
    matches(backend.generate_batch(*inputs), expect(llama, inputs, draft_ids))


# --- servers that come back ---


def test_a_server_that_forgot_the_mapping_is_told_it_again(
    llama: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    draft_ids, inputs, bridge = frequency_ordered(131, 53), batch_of(131), serve(llama)
    backend = connect(bridge, draft_ids)
    bridge.app_client = serve(llama).app_client
    matches(backend.generate_batch(*inputs), expect(llama, inputs, draft_ids))


def test_a_server_that_dropped_the_least_used_mapping_is_told_it_again(
    llama: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    bridge, inputs = serve(llama, max_draft_vocabs=1), batch_of(131)
    trainers = [
        (connect(bridge, ids), ids)
        for ids in (frequency_ordered(131, 53, 5), frequency_ordered(131, 31, 6))
    ]
    for backend, draft_ids in trainers * 2:
        matches(backend.generate_batch(*inputs), expect(llama, inputs, draft_ids))


@pytest.mark.parametrize("other", ["other-weights", "other-vocab"])
def test_a_server_that_comes_back_with_another_model_is_refused(
    llama: Any, build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any,
    other: str,
) -> None:  # fmt: skip
    bridge = serve(llama)
    backend = connect(bridge, frequency_ordered(131, 53))
    backend.generate_batch(*batch_of(131))
    replacement = build_model("llama", seed=1) if other == "other-weights" else build_model("qwen3")
    bridge.app_client = serve(replacement).app_client
    with pytest.raises(FingerprintMismatch, match="another model"):
        backend.generate_batch(*batch_of(131))


def test_embeddings_of_another_model_are_refused(
    llama: Any, build_model: Any, serve: Any, connect: Any
) -> None:
    bridge = serve(llama)
    backend = connect(bridge)
    backend.model_info()
    bridge.app_client = serve(build_model("llama", seed=1)).app_client
    with pytest.raises(FingerprintMismatch, match="another model"):
        backend.get_input_embeddings()
