"""Copies beside the computing on a GPU: no batch is read early, none is written over."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.gpu.conftest import DEVICE, wide_llama
from torch import Tensor

import eagle3_client.device
from eagle3_client import RemoteEagle3Backend
from eagle3_server import HFEagle3TargetModel
from eagle3_server.copying import HostCopier
from eagle3_server.engine import DeviceTensors

pytestmark = pytest.mark.gpu
V, D, B, T = 4096, 1024, 4, 256
Answer = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    return wide_llama()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randperm(V, generator=torch.Generator().manual_seed(3))[:D]


def batch_number(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged, and of another length each time, so that buffers are used again in pieces."""
    generator = torch.Generator().manual_seed(number)
    length = T - 8 * (number % 7)
    lengths = torch.randint(length // 2, length + 1, (B,), generator=generator)
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    loss_mask = attention_mask * (torch.rand(B, length, generator=generator) < 0.6)
    return torch.randint(V, (B, length), generator=generator), attention_mask, loss_mask


def beside(model: Any, ids: Tensor, batch: tuple[Tensor, ...]) -> Answer:
    """The definition on the co-located target's logits; zeros where nothing is sent."""
    found = HFEagle3TargetModel(model).generate_batch(*(tensor.to(DEVICE) for tensor in batch))
    argmax, chosen = found.logits.argmax(-1), ids.to(DEVICE)
    mask = torch.isin(argmax, chosen) & found.loss_mask.bool()
    probs = found.logits[..., chosen].float().softmax(-1) * mask[..., None]
    attended = found.attention_mask.bool()[..., None]
    return torch.where(attended, found.aux_hidden_states, 0), probs, mask[..., None]


def parts(answer: Any) -> Answer:
    return answer.aux_hidden_states, answer.target_probs, answer.position_mask


@pytest.fixture
def expected(model: Any, ids: Tensor) -> list[Answer]:
    return [beside(model, ids, batch_number(number)) for number in range(24)]


@pytest.fixture
def url(live_server: Any, model: Any) -> Any:
    return live_server(model)


def busy(milliseconds: int) -> None:
    """Queue work on the current stream that takes so long."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(1_800_000 * milliseconds)  # cycles of an H100


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def all_equal(got: list[Answer], expected: list[Answer]) -> None:
    synchronize()
    assert len(got) == len(expected)
    for number, (here, there) in enumerate(zip(got, expected, strict=True)):
        for name, mine, theirs in zip(("aux", "probs", "mask"), here, there, strict=True):
            assert torch.equal(mine, theirs), f"{name} of batch {number}"


@pytest.mark.parametrize("encoding", ["probs", "logits"])
@pytest.mark.parametrize("own_stream", [False, True], ids=["default-stream", "own-stream"])
def test_batches_dropped_with_kernels_still_queued_are_not_written_over(
    url: str, ids: Tensor, connect: Any, expected: list[Answer], encoding: str, own_stream: bool
) -> None:
    """The trainer's copies run long after it has dropped the batch they read."""
    backend = connect(urls=url, draft_ids=ids, device=DEVICE, exact=True, encoding=encoding)
    stream = torch.cuda.Stream() if own_stream and DEVICE.type == "cuda" else None
    got: list[Answer] = []
    with torch.cuda.stream(stream):
        busy(1500)  # all batches have come, and were dropped, before the first is read
        with backend.prefetch([batch_number(n) for n in range(24)], 4) as prefetch:
            for _, answer in prefetch:
                got.append(tuple(part.clone() for part in parts(answer)))  # type: ignore[arg-type]
                del answer
        synchronize()
    all_equal(got, expected)


def test_eight_trainers_at_once_get_the_bits_of_one(
    url: str, ids: Tensor, mapping: Any, expected: list[Answer]
) -> None:
    def train(rank: int) -> list[Answer]:
        numbers = [(7 * rank + n) % 24 for n in range(24)]
        with RemoteEagle3Backend(url, device=DEVICE, exact=True) as backend:
            backend.set_vocab_mapping(*mapping(ids, V))
            answers = backend.prefetch([batch_number(n) for n in numbers], 2)
            got = [parts(answer) for _, answer in answers]
        return [got[numbers.index(n)] for n in range(24)]

    with ThreadPoolExecutor(8) as threads:
        for got in threads.map(train, range(8)):
            all_equal(got, expected)


def test_gpu_tensors_may_be_given_and_are_asked_for_on_the_gpu(
    url: str, ids: Tensor, connect: Any, expected: list[Answer]
) -> None:
    backend = connect(urls=url, draft_ids=ids.to(DEVICE), device=DEVICE, exact=True)
    answer = backend.generate_batch(*(tensor.to(DEVICE) for tensor in batch_number(5)))
    assert {tensor.device.type for tensor in parts(answer)} == {DEVICE.type}
    assert answer.input_ids.device.type == DEVICE.type
    all_equal([parts(answer)], expected[5:6])


def test_a_batch_is_handed_over_when_it_is_there(
    url: str, ids: Tensor, connect: Any, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copies to the device are slow, and the trainer's stream is not told to wait."""
    inner = eagle3_client.device._stream

    def slow(device: torch.device) -> torch.cuda.Stream:
        stream = inner(device)
        with torch.cuda.stream(stream):
            busy(50)
        return stream

    monkeypatch.setattr("eagle3_client.device._stream", slow)
    backend = connect(urls=url, draft_ids=ids, device=DEVICE, exact=True)
    got = []
    for number in range(4):
        answer = backend.generate_batch(*batch_number(number))
        got.append(tuple(part.clone() for part in parts(answer)))
    all_equal(got, expected[:4])  # type: ignore[arg-type]


def test_a_result_is_copied_to_the_host_when_it_is_computed(device: torch.device) -> None:
    """Else its checksums would be those of what lay there before, and nobody would notice."""
    copier = HostCopier(device)
    for number in range(1, 4):
        result = torch.zeros(1 << 20, device=device)
        ready = torch.cuda.Event() if device.type == "cuda" else None
        busy(50)
        result.fill_(number)
        if ready is not None:
            ready.record()
        host = copier.to_host(DeviceTensors({"rows": result.view(2, -1).T}, ready=ready))
        assert host.tensors["rows"].eq(number).all()
