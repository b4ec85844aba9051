"""No memory left, a forward that raises, a device that is lost: who is told what, what goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.seeded_target import SeededTarget
from tests.server.sharing.conftest import PATIENCE_S, problem

from eagle3_server import ServerSettings, create_app
from eagle3_server.copying import HostCopier
from eagle3_server.device_errors import is_fatal, is_out_of_memory


class Failing:
    """Raises what it is told for the seeds it is told; `times` for each."""

    def __init__(self, errors: dict[int, Callable[[], BaseException]], times: int = 99) -> None:
        self._errors, self._times = errors, times
        self.calls: list[int] = []

    def __call__(self, job: Any) -> None:
        seed = int(job.input_ids[0, 0])
        self.calls.append(seed)
        if seed in self._errors and self.calls.count(seed) <= self._times:
            raise self._errors[seed]()


class Owner:
    """Who is told that the device is lost, and would end the process."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.told = threading.Event()

    def tell(self, failure: BaseException) -> None:
        self.failures.append(failure)
        self.told.set()


# Before torch 2.8 these are RuntimeErrors of the same words.
ACCELERATOR_ERROR: type[Exception] = getattr(torch, "AcceleratorError", RuntimeError)
OUT_OF_MEMORY: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "python": MemoryError,
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "driver": lambda: ACCELERATOR_ERROR("CUDA error: out of memory"),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}
LOST: dict[str, Callable[[], BaseException]] = {
    "assert": lambda: RuntimeError("CUDA error: device-side assert triggered"),
    "access": lambda: ACCELERATOR_ERROR("CUDA error: an illegal memory access was found"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling gemm"),
}


@pytest.mark.parametrize("status", ["CUBLAS_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_NOT_SUPPORTED"])
def test_what_a_library_does_not_do_is_neither(status: str) -> None:
    error = RuntimeError(f"CUDA error: {status} when calling something")
    assert not is_fatal(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("kind", [*OUT_OF_MEMORY, *LOST])
def test_an_error_that_comes_up_in_the_copy_is_the_same_one(
    serve_app: Any, is_right: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a GPU a kernel's error is raised where its result is waited for."""
    owner = Owner()
    error = {**OUT_OF_MEMORY, **LOST}[kind]
    inner, left = HostCopier.to_host, [True, True]

    def to_host(copier: HostCopier, result: Any) -> Any:
        if left and left.pop():
            raise error()
        return inner(copier, result)

    monkeypatch.setattr(HostCopier, "to_host", to_host)
    one = serve_app(create_app(SeededTarget(), ServerSettings(), on_failure=owner.tell))
    answer = one.ask(1)
    if is_fatal(error()):
        assert problem(answer)[:2] == (503, "not_ready")
        assert owner.told.wait(PATIENCE_S)
        assert one.http.get("/readyz").status_code == 503
    else:
        assert problem(answer)[:2] == (503, "out_of_memory")
        assert is_right(2, one.ask(2))
        assert owner.failures == []


def test_a_copy_that_finds_no_memory_once_is_repeated(
    live_server: Any, trainer: Any, is_right: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, left = HostCopier.to_host, [True]

    def to_host(copier: HostCopier, result: Any) -> Any:
        if left and left.pop():
            raise MemoryError
        return inner(copier, result)

    monkeypatch.setattr(HostCopier, "to_host", to_host)
    assert is_right(1, trainer(live_server(SeededTarget())).ask(1))


def test_forwards_that_raise_leave_room_for_the_next(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    """More of them than results may wait for the copy."""
    one = trainer(live_server(SeededTarget(Failing({1: lambda: KeyError("a bug")}))))
    for number in range(5):
        assert problem(one.ask(1, f"failing-{number}"))[:2] == (500, "target_failed")
    assert is_right(2, one.ask(2))


def test_torchs_own_error_for_the_host_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_fatal(caught.value)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_said_and_the_next_request_is_served(
    live_server: Any, trainer: Any, is_right: Any, kind: str
) -> None:
    failing = Failing({1: OUT_OF_MEMORY[kind]})
    one = trainer(live_server(SeededTarget(failing)))
    answer = one.ask(1)
    assert problem(answer)[:2] == (503, "out_of_memory")
    assert "max_tokens_per_request" in problem(answer)[2]
    assert failing.calls == [1, 1]  # once more with everything freed
    assert is_right(2, one.ask(2))
    assert one.status()["bytes_in_flight"] == 0


def test_a_repeat_with_the_memory_freed_may_do(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    one = trainer(live_server(SeededTarget(Failing({1: MemoryError}, times=1))))
    assert is_right(1, one.ask(1))


def test_a_forward_that_raises_fails_its_own_request_and_says_no_more_than_needed(
    live_server: Any, trainer: Any, is_right: Any, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "/srv/checkpoints/secret/model.py"
    one = trainer(live_server(SeededTarget(Failing({1: lambda: KeyError(secret)}))))
    answer = one.ask(1)
    assert problem(answer)[:2] == (500, "target_failed")
    assert "trainer-1" in problem(answer)[2]
    assert secret not in answer.text
    assert "Traceback" not in answer.text
    assert secret in caplog.text
    assert is_right(2, one.ask(2))


@pytest.mark.parametrize("error", LOST.values(), ids=LOST)
def test_a_lost_device_makes_the_server_unready_and_its_owner_end_it(
    error: Callable[[], BaseException], serve_app: Any
) -> None:
    owner = Owner()
    target = SeededTarget(Failing({1: error}))
    one = serve_app(create_app(target, ServerSettings(), on_failure=owner.tell))
    answer = one.ask(1)
    assert problem(answer)[:2] == (503, "not_ready")
    assert "failed for good" in problem(answer)[2]
    assert owner.told.wait(PATIENCE_S)
    assert is_fatal(owner.failures[0])
    for refused in (one.ask(2), one.http.get("/readyz")):
        assert problem(refused)[:2] == (503, "not_ready")
    assert one.http.get("/healthz").status_code == 200
    assert target.supervised == []
