"""The stages: the next forward runs while a result is copied; few results wait; none is lost."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.seeded_target import SeededTarget, inputs_of, is_answer_of

from eagle3_client import RemoteEagle3Backend, RemoteEagle3Error, TargetFailed
from eagle3_schemas.tensors import checksum
from eagle3_server.copying import HostCopier
from eagle3_server.engine import DeviceTensors

PATIENCE_S = 60.0
DRAFT_IDS = torch.arange(1400)


class Copies:
    """Stands before the copier: each copy waits for the gate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        inner = HostCopier.to_host

        def to_host(copier: HostCopier, result: DeviceTensors) -> Any:
            self.entered.release()
            assert self.gate.wait(PATIENCE_S), "nobody opened the gate"
            return inner(copier, result)

        monkeypatch.setattr(HostCopier, "to_host", to_host)

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S), "no copy began"


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Any:
    copies = Copies(monkeypatch)
    yield copies
    copies.gate.set()


@pytest.fixture
def backend(serve: Any, connect: Any) -> Callable[..., RemoteEagle3Backend]:
    return lambda target, **kwargs: connect(
        serve(target), DRAFT_IDS, encoding="probs", max_in_flight=6, **kwargs
    )


def test_the_next_forward_runs_while_a_result_is_copied(copies: Copies, backend: Any) -> None:
    target = SeededTarget()
    client = backend(target)
    first = client.generate_batch_async(*inputs_of(1))
    copies.wait_until_entered()
    second = client.generate_batch_async(*inputs_of(2))
    target.wait_for(2)  # computed, and the first is still being copied
    assert not copies.gate.is_set()
    copies.gate.set()
    assert is_answer_of(1, first.result(PATIENCE_S))
    assert is_answer_of(2, second.result(PATIENCE_S))


def test_no_more_than_two_results_wait_on_the_device(copies: Copies, backend: Any) -> None:
    """With a third the device's memory would grow with the clients; the forward waits instead."""
    begun: list[int] = []
    target = SeededTarget(before=lambda job: begun.append(int(job.input_ids[0, 0])))
    client = backend(target)
    handles = [client.generate_batch_async(*inputs_of(seed)) for seed in range(6)]
    copies.wait_until_entered()
    target.wait_for(2)
    with pytest.raises(TimeoutError):
        handles[-1].result(0.3)
    assert len(begun) == 2
    copies.gate.set()
    assert all(is_answer_of(seed, handle.result(60)) for seed, handle in enumerate(handles))


@pytest.mark.parametrize("error", [RuntimeError("a bus fell off"), TargetFailed("a typed reason")])
def test_a_copy_that_fails_is_told_to_its_client_and_the_next_are_served(
    backend: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """More failures than results may wait: none of them keeps its place."""
    inner, left = HostCopier.to_host, [error] * 5

    def to_host(copier: HostCopier, result: DeviceTensors) -> Any:
        if left:
            raise left.pop()
        return inner(copier, result)

    monkeypatch.setattr(HostCopier, "to_host", to_host)
    client = backend(SeededTarget())
    for _ in range(5):
        with pytest.raises(TargetFailed):
            client.generate_batch(*inputs_of(1))
    assert is_answer_of(2, client.generate_batch(*inputs_of(2)))


def test_forwards_that_fail_keep_no_place(backend: Any) -> None:
    def fail(job: Any) -> None:
        if int(job.input_ids[0, 0]) == 1:
            raise RuntimeError("this forward fails")

    client = backend(SeededTarget(before=fail))
    for _ in range(5):
        with pytest.raises(RemoteEagle3Error):
            client.generate_batch(*inputs_of(1))
    assert is_answer_of(2, client.generate_batch(*inputs_of(2)))


def test_a_copy_has_the_checksums_of_what_was_computed() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 33, generator=generator).bfloat16(),
        "none": torch.empty(0, 5),
        "turned": torch.randn(5, 9, generator=generator).T,
        "bits": torch.randint(0, 255, (13,), dtype=torch.uint8, generator=generator),
    }
    result = HostCopier(torch.device("cpu")).to_host(DeviceTensors(tensors))
    assert list(result.tensors) == list(tensors)
    for name, tensor in tensors.items():
        copy = result.tensors[name]
        assert torch.equal(copy, tensor)
        assert copy.dtype is tensor.dtype
        assert result.checksums[name] == checksum(tensor.contiguous())
        assert copy.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_weights_in_host_memory_are_not_copied() -> None:
    weight = torch.randn(50, 8)
    result = HostCopier(torch.device("cpu")).to_host(
        DeviceTensors({"weight": weight}, is_constant=True)
    )
    assert result.tensors["weight"].data_ptr() == weight.data_ptr()
    assert result.checksums["weight"] == checksum(weight)


def test_a_buffer_is_used_again_and_never_while_its_copies_live() -> None:
    copier = HostCopier(torch.device("cpu"))

    def copied(value: float) -> torch.Tensor:
        return copier.to_host(DeviceTensors({"a": torch.full((500, 700), value)})).tensors["a"]

    held = copied(1.0)
    other = copied(2.0)
    assert other.data_ptr() != held.data_ptr()
    address = other.data_ptr()
    del other
    assert copied(3.0).data_ptr() == address
    assert bool((held == 1.0).all())


def test_an_idle_server_keeps_no_result(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would keep the last answer's device memory until the next one."""
    inner, results = HostCopier.to_host, []

    def to_host(copier: HostCopier, result: DeviceTensors) -> Any:
        copied = inner(copier, result)
        results.extend(weakref.ref(tensor) for tensor in result.tensors.values())
        results.extend(weakref.ref(tensor) for tensor in copied.tensors.values())
        return copied

    monkeypatch.setattr(HostCopier, "to_host", to_host)
    client = backend(SeededTarget())
    assert is_answer_of(1, client.generate_batch(*inputs_of(1)))
    client.model_info()
    assert len(results) == 6
    deadline = time.monotonic() + PATIENCE_S  # the threads may not have left what they did
    while [reference for reference in results if reference() is not None]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        gc.collect()
