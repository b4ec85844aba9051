"""Several trainers, several draft vocabs, and servers that forgot or changed between requests."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

from eagle3_client import FingerprintMismatch, InvalidRequest, RemoteEagle3Error
from eagle3_schemas import Eagle3TargetBatch


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


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
