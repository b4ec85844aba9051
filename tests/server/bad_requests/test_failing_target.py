"""A target that raises, or gives what is not finite: typed, logged, nothing sent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.server.bad_requests.frames import DRAFT_IDS, VOCAB_SIZE
from torch import Tensor

from eagle3_client import (
    InvalidRequest,
    LimitExceeded,
    MalformedPayload,
    RemoteEagle3Error,
    TargetFailed,
    Unauthorized,
)


class FailingTarget:
    """A real target whose next `supervise` raises."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.error: BaseException | None = None

    def describe(self) -> Any:
        return self.inner.describe()

    def supervise(self, job: Any) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.inner.supervise(job)


def test_a_forward_that_raises_is_target_failed_and_says_where_to_look(
    build_model: Any, gated: Any, serve: Any, connect: Any, batch_of: Any, caplog: Any
) -> None:
    """The traceback stays in the server's log, under the id that the client is told."""
    target = FailingTarget(gated(build_model("llama")).inner)
    backend = connect(serve(target), DRAFT_IDS)
    target.error = RuntimeError("secret: /home/me/weights.bin")
    with caplog.at_level(logging.ERROR), pytest.raises(TargetFailed) as caught:
        backend.generate_batch(*batch_of(VOCAB_SIZE))
    error = caught.value
    assert error.attempts == 1
    assert error.request_id is not None
    assert f"request id {error.request_id}" in error.detail
    assert "RuntimeError" in error.detail
    for leak in ("secret", "/home/me", "Traceback", ".py", 'File "'):
        assert leak not in str(error)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert error.request_id in record.getMessage()
    assert "secret" in str(record.exc_info[1])
    backend.generate_batch(*batch_of(VOCAB_SIZE))


def poison(row: int, position: int, value: float) -> Callable[[Any, Any, Tensor], Tensor]:
    """A forward hook that puts a value into one position of whatever is long enough."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if output.shape[0] > row and output.shape[1] > position:
            output = output.clone()
            output[row, position, 0] = value
        return output

    return hook


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_aux_states_name_their_layer_and_row(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, value: float
) -> None:
    model = build_model("llama")
    backend = connect(serve(model), DRAFT_IDS)
    model.model.layers[2].register_forward_hook(poison(1, 4, value))
    with pytest.raises(TargetFailed, match=r"layer 2 gave non-finite.*row 1, position 4"):
        backend.generate_batch(*batch_of(VOCAB_SIZE))
    backend.generate_batch(*batch_of(VOCAB_SIZE, (4, 4)))


def test_non_finite_states_of_padding_are_nobodys_business(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    model = build_model("llama")
    backend = connect(serve(model), DRAFT_IDS, aux_layer_ids=(1, 2, 6))
    model.model.layers[6].register_forward_hook(poison(1, 9, float("nan")))
    batch = backend.generate_batch(*batch_of(VOCAB_SIZE, (10, 7)))
    assert batch.aux_hidden_states.isfinite().all()
    assert batch.target_probs.isfinite().all()


def spoil(model: Any, token_id: int, value: float) -> None:
    """Make the model give `value` as the logit of one id wherever `mark` is called for.

    There, and only there, products overflow: to inf, -inf, or inf - inf.
    """
    with torch.no_grad():
        model.lm_head.weight[token_id, :2] = torch.tensor(
            {"inf": [1e30, 0.0], "-inf": [-1e30, 0.0], "nan": [1e30, -1e30]}[str(value)]
        )


def mark(row: int, position: int) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook on the final norm; only once the target is loaded, which refuses such a probe."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[row, position, :2] = 1e30
        return output

    return hook


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token_id", [0, 90, 128], ids=["outside", "in-the-draft-vocab", "high"])
def test_non_finite_supervision_names_its_row(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, token_id: int, value: float,
    encoding: str, exact: bool,
) -> None:  # fmt: skip
    """Also when the bad logit is not of the draft vocab: the row must not look unsupervised.

    The position named is that of input_ids, as for aux states: one after the one it supervises.
    """
    model, draft_ids = build_model("llama"), torch.tensor([90, 5])
    spoil(model, token_id, value)
    bridge = serve(model)
    model.model.norm.register_forward_hook(mark(1, 4))
    backend = connect(bridge, draft_ids, encoding=encoding, exact=exact)
    assert backend.model_info().head == "rows"
    inputs = batch_of(VOCAB_SIZE)
    inputs.loss_mask[:] = inputs.attention_mask
    with pytest.raises(TargetFailed, match=r"non-finite.*row 1, position 4 of input_ids"):
        backend.generate_batch(*inputs)
    inputs.loss_mask[1, 4] = 0
    assert backend.generate_batch(*inputs).target_probs.isfinite().all()


@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_non_finite_draft_logits_are_found_below_a_finite_top_logit(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, encoding: str
) -> None:
    model, inputs = build_model("llama"), batch_of(VOCAB_SIZE)
    spoil(model, 5, -float("inf"))
    bridge = serve(model)
    model.model.norm.register_forward_hook(mark(0, 3))
    backend = connect(bridge, DRAFT_IDS, rows="loss_mask", encoding=encoding)
    assert backend.model_info().head == "rows"
    inputs.loss_mask[:] = inputs.attention_mask
    with pytest.raises(TargetFailed, match="non-finite logits at row 0, position 3 of input_ids"):
        backend.generate_batch(*inputs)


def test_every_error_of_the_client_has_one_root() -> None:
    for kind in (InvalidRequest, MalformedPayload, TargetFailed, Unauthorized, LimitExceeded):
        assert issubclass(kind, RemoteEagle3Error)
