"""The warm-up: what it runs, when it lowers the limit, and what it says of the bits."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from eagle3_schemas.errors import InvalidRequest, TargetFailed
from eagle3_server import ServerSettings, TransformersTarget, create_app
from eagle3_server.warm_up import WarmUp, warm_up


class Device:
    """A real target that calls itself another device, with room for so many tokens."""

    def __init__(self, model: Any, *, room: int = 1 << 30, device: str = "meta") -> None:
        self.inner = TransformersTarget(model, model_id="tiny")
        self.room, self.device = room, device
        self.jobs: list[Any] = []
        self.error: Exception | None = None
        self.noise = 0.0

    def describe(self) -> Any:
        return dataclasses.replace(self.inner.describe(), device=self.device)

    def supervise(self, job: Any) -> Any:
        self.jobs.append(job)
        if self.error is not None:
            raise self.error
        if job.input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("no room for so many")
        result = self.inner.supervise(job)
        result.tensors["aux_hidden_states"] += self.noise * len(self.jobs)
        return result


@pytest.mark.parametrize(("family", "shape"), [("llama", (1, 100)), ("gpt2", (6, 16))])
def test_the_largest_shape_is_run_twice_all_of_it_supervised(
    build_model: Any, family: str, shape: tuple[int, int]
) -> None:
    target = Device(build_model(family))
    assert warm_up(target, 100) == WarmUp(100, deterministic=True)
    first, second, *exact = target.jobs
    assert first.input_ids.shape == second.input_ids.shape == shape
    assert not first.exact
    assert [(job.exact, job.input_ids.numel()) for job in exact] == [(True, 64)] * 2
    job = target.jobs[0]
    assert job.rows == "loss_mask"
    assert job.loss_mask.all()
    assert job.attention_mask.all()


def test_on_the_cpu_the_limit_is_kept_and_little_is_run(build_model: Any) -> None:
    target = Device(build_model("llama"), device="cpu")
    assert warm_up(target, 16384) == WarmUp(16384, deterministic=True)
    assert [job.input_ids.numel() for job in target.jobs] == [64] * 4


def test_the_limit_is_lowered_aloud_to_what_fits(build_model: Any, caplog: Any) -> None:
    target = Device(build_model("llama"), room=30)
    with caplog.at_level(logging.WARNING):
        assert warm_up(target, 100) == WarmUp(25, deterministic=True)
    assert [job.input_ids.numel() for job in target.jobs] == [100, 50, 25, 25, 25, 25]
    said = [record.getMessage() for record in caplog.records]
    assert "max_tokens_per_request is lowered to 50" in said[0]
    assert "max_tokens_per_request is lowered to 25" in said[1]
    assert "EAGLE3_MAX_TOKENS_PER_REQUEST" in said[1]
    assert "no room for so many" in said[1]


def test_a_device_without_room_for_one_token_is_no_device_to_serve_on(build_model: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"no memory for a single token.*larger device"):
        warm_up(Device(build_model("llama"), room=0), 100)


def test_bits_that_do_not_repeat_are_told(build_model: Any, caplog: Any) -> None:
    target = Device(build_model("llama"))
    target.noise = 1e-3
    assert warm_up(target, 100).deterministic is False
    assert "`exact` is refused" in caplog.text


def test_bits_that_do_not_repeat_in_exact_requests_alone_are_told(build_model: Any) -> None:
    class Exact(Device):
        def supervise(self, job: Any) -> Any:
            self.noise = 1e-3 if job.exact else 0.0
            return super().supervise(job)

    assert warm_up(Exact(build_model("llama")), 100).deterministic is False


def test_states_that_are_not_finite_are_told_and_served(build_model: Any, caplog: Any) -> None:
    target = Device(build_model("llama"))
    target.error = TargetFailed("layer 3 gave non-finite states")
    assert warm_up(target, 100) == WarmUp(100, deterministic=None)
    assert "layer 3 gave non-finite states" in caplog.text


@pytest.mark.parametrize("message", ["CUDA error: device-side assert triggered", "a bug"])
def test_other_errors_end_the_loading(build_model: Any, message: str) -> None:
    target = Device(build_model("llama"))
    target.error = RuntimeError(message)
    with pytest.raises(RuntimeError, match=message):
        warm_up(target, 100)
    assert len(target.jobs) == 1


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_server_is_ready_after_it_and_says_what_it_found(
    build_model: Any, connect: Any, batch_of: Any, deterministic: bool
) -> None:
    from tests.servers import Bridge

    target = Device(build_model("llama"), room=30)
    target.noise = 0.0 if deterministic else 1e-3
    ready: list[int] = []
    app = create_app(
        lambda: target,  # type: ignore[arg-type,return-value]
        ServerSettings(max_tokens_per_request=100),
        on_ready=lambda: ready.append(len(target.jobs)),
    )
    with TestClient(app) as client:
        backend = connect(Bridge(client), torch.arange(5), exact=True)
        info = backend.model_info()
        assert ready == [6 if deterministic else 4]
        assert info.limits.max_tokens_per_request == 25
        assert info.deterministic is deterministic
        inputs = batch_of(131, (10, 7))
        if deterministic:
            assert backend.generate_batch(*inputs).target_probs is not None
        else:
            with pytest.raises(InvalidRequest, match="two runs of one batch differed"):
                backend.generate_batch(*inputs)


def test_a_target_given_loaded_is_not_warmed_up(serve: Any, build_model: Any, connect: Any) -> None:
    assert connect(serve(build_model("llama"))).model_info().deterministic is None
