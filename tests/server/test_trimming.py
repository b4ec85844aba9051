"""Padding: what is not computed, and that it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.server.padding import ENCODINGS, PADDING, ROWS, V, columns_of, widen
from torch import Tensor


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["llama", "gemma2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_trailing_padding_is_trimmed_but_never_under_exact_nor_for_all_rows(
    build_model: Any, batch_of: Any, draft_ids: Tensor, serve: Any, connect: Any, encoding: str
) -> None:
    model, inputs = build_model("llama"), widen(batch_of(V), PADDING)
    bridge, width = serve(model), inputs.input_ids.shape[1]
    for rows in ROWS:
        for exact in (False, True):
            backend = connect(bridge, draft_ids, encoding=encoding, rows=rows, exact=exact)
            is_trimmed = not exact and rows != "all"
            expected = width - PADDING if is_trimmed else width
            assert columns_of(model, backend, inputs) == expected, (rows, exact)


def test_a_column_that_any_row_uses_is_kept(
    build_model: Any, batch_of: Any, draft_ids: Tensor, serve: Any, connect: Any, expect: Any,
    same: Any,
) -> None:  # fmt: skip
    """Attended in one row, or supervised in one row without being attended."""
    model, plain = build_model("llama"), widen(batch_of(V), PADDING)
    backend = connect(serve(model), draft_ids)
    for name in ("attention_mask", "loss_mask"):
        inputs = replace(plain, **{name: getattr(plain, name).clone()})
        getattr(inputs, name)[2, 13] = 1
        assert columns_of(model, backend, inputs) == 14
        trimmed = replace(inputs, **{n: t[:, :14] for n, t in vars(inputs).items()})
        batch, expected = backend.generate_batch(*inputs), expect(model, trimmed, draft_ids)
        same(batch.position_mask[:, :14], expected.position_mask)
        same(batch.target_probs[:, :14], expected.target_probs)
        same(batch.aux_hidden_states[:, :14], expected.aux_hidden_states)
        for tensor in (batch.position_mask, batch.target_probs, batch.aux_hidden_states):
            assert not tensor[:, 14:].any()


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_leading_padding_stays_and_is_right(
    model: Any, family: str, dtype: torch.dtype, batch_of: Any, draft_ids: Tensor, serve: Any,
    connect: Any, expect: Any, matches: Any, encoding: str, exact: bool,
) -> None:  # fmt: skip
    """Without explicit positions its removal would move every token."""
    inputs = widen(batch_of(V, left=True), PADDING, left=True)
    backend = connect(serve(model), draft_ids, encoding=encoding, exact=exact)
    assert columns_of(model, backend, inputs) == 10 + PADDING
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_batch_of_nothing_but_padding_is_answered(
    build_model: Any, batch_of: Any, draft_ids: Tensor, serve: Any, connect: Any, encoding: str,
    rows: str,
) -> None:  # fmt: skip
    model, inputs = build_model("llama"), batch_of(V)
    for mask in (inputs.attention_mask, inputs.loss_mask):
        mask.zero_()
    backend = connect(serve(model), draft_ids, encoding=encoding, rows=rows)
    batch = backend.generate_batch(*inputs)
    assert not batch.position_mask.any()
    assert not batch.aux_hidden_states.any()
    assert bool(batch.target_probs.any()) == (rows == "all")
    assert batch.target_probs.shape == (3, 10, 53)
