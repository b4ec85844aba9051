"""The whole head and the final norm, downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.capture.definition import V

from eagle3_client import (
    FingerprintMismatch,
    InvalidRequest,
)
from eagle3_server import TransformersTarget


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_the_whole_head_and_norm(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, family: str, same: Any
) -> None:
    model, inputs = build_model(family), batch_of(V[family])
    backend = connect(serve(build_model(family)), exact=True)
    got = backend.capture(*inputs, outputs=("last_hidden", "last_hidden_prenorm"))
    head = backend.get_target_head()
    assert head is backend.get_target_head()
    same(head.weight, model.lm_head.weight.detach())
    assert head.norm is not None
    torch.testing.assert_close(
        head.norm(got.last_hidden_prenorm)[0], got.last_hidden[0], rtol=1e-6, atol=1e-6
    )
    with torch.no_grad():
        logits = model(inputs.input_ids, attention_mask=inputs.attention_mask).logits
    same(head.logits(got.last_hidden)[0], logits[0])  # a row without padding
    with pytest.raises(InvalidRequest, match=r"last_hidden must be \[\.\.\., "):
        head.logits(torch.zeros(2, 3))
    assert head.logits(got.last_hidden[:0]).shape == (0, 10, V[family])


def test_the_whole_head_comes_from_the_cache(
    build_model: Any, serve: Any, connect: Any, tmp_path: Any, same: Any
) -> None:
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")
    asked: list[int] = []
    give = target.target_head
    target.target_head = lambda: (asked.append(1), give())[1]  # type: ignore[method-assign]
    bridge = serve(target)
    first = connect(bridge, cache_dir=tmp_path).get_target_head()
    second = connect(bridge, cache_dir=tmp_path).get_target_head()
    assert asked == [1]
    same(second.weight, first.weight)
    assert first.norm is not None
    assert second.norm is not None
    assert second.norm.form == first.norm.form


def test_a_head_of_another_target_is_refused(build_model: Any, serve: Any, connect: Any) -> None:
    bridge = serve(build_model("llama"))
    backend = connect(bridge, retry_for_s=0.5)
    backend.model_info()
    bridge.app_client = serve(build_model("llama", seed=1)).app_client
    with pytest.raises(FingerprintMismatch):
        backend.get_target_head()
