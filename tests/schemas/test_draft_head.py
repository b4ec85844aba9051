"""The draft vocab's head and what follows it, bit for bit what the whole head gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from eagle3_schemas.draft_head import DraftHead, LogitsTransform, pad_rows

IDENTITY = LogitsTransform()
DTYPES = [torch.float32, torch.bfloat16]


def values(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (20 * torch.randn(7, 33, generator=generator)).to(dtype)


# --- what follows the head ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_default_logits_are_the_heads_output_itself(dtype: torch.dtype) -> None:
    x = values(dtype)
    assert IDENTITY(x) is x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upcast", [False, True])
def test_each_step_is_its_formula(dtype: torch.dtype, upcast: bool) -> None:
    x = values(dtype)
    y = x.to(torch.float32) if upcast else x
    capped = y / 30.0
    capped = torch.tanh(capped)
    capped = capped * 30.0
    for transform, expected in (
        (LogitsTransform(upcast), y),
        (LogitsTransform(upcast, multiply=0.0625), y * 0.0625),
        (LogitsTransform(upcast, divide=13.0), y / 13.0),
        (LogitsTransform(upcast, softcap=30.0), capped),
    ):
        got = transform(x)
        assert got.dtype is (torch.float32 if upcast else dtype)
        assert torch.equal(got, expected), transform


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_steps_come_in_order(dtype: torch.dtype) -> None:
    x = values(dtype)
    y = x.float()
    y = y * 0.7
    y = y / 13.0
    y = y / 1.5
    y = torch.tanh(y)
    y = y * 1.5
    assert torch.equal(LogitsTransform(True, 0.7, 13.0, 1.5)(x), y)
    # Any other order is another function.
    capped_first = torch.tanh(x.float() / 1.5) * 1.5 * 0.7 / 13.0
    assert (y - capped_first).abs().max() > 0.1
    if dtype is torch.bfloat16:
        late = LogitsTransform(False, 0.7, 13.0, 1.5)(x).float()
        assert not torch.equal(late, y), "where the upcast comes would not show"


def test_a_bf16_softcap_rounds_after_each_of_its_three_steps() -> None:
    x = values(torch.bfloat16)
    got = LogitsTransform(softcap=30.0)(x)
    slow = [
        (torch.tensor(v) / 30.0).bfloat16().float().tanh().bfloat16().float().mul(30.0).bfloat16()
        for v in x.flatten().tolist()
    ]
    assert torch.equal(got.flatten(), torch.stack(slow))
    fused = (torch.tanh(x.float() / 30.0) * 30.0).bfloat16()
    assert not torch.equal(got, fused), "a fused softcap would not show"


@pytest.mark.parametrize(
    ("transform", "is_upcast_only"),
    [
        (IDENTITY, True),
        (LogitsTransform(True), True),
        (LogitsTransform(True, multiply=2.0), False),
        (LogitsTransform(True, divide=2.0), False),
        (LogitsTransform(True, softcap=2.0), False),
    ],
)
def test_only_an_upcast_can_be_undone(transform: LogitsTransform, is_upcast_only: bool) -> None:
    assert transform.is_upcast_only is is_upcast_only


# --- the rows of the head ---


@pytest.mark.parametrize("count", range(50))
def test_rows_are_padded_with_zeros_to_a_multiple_of_16(count: int) -> None:
    rows = torch.ones(count, 3, dtype=torch.bfloat16)
    padded = pad_rows(rows)
    assert padded.shape == ((count + 15) // 16 * 16, 3)
    assert padded.dtype is torch.bfloat16
    assert torch.equal(padded[:count], rows)
    assert not padded[count:].any()


@pytest.mark.parametrize("size", [1, 15, 16, 17])
def test_a_head_is_padded_to_16_rows_and_still_gives_its_own_columns(size: int) -> None:
    weight, bias = torch.eye(size, 20), torch.arange(float(size))
    head = DraftHead.build(weight, bias, LogitsTransform(multiply=2.0))
    assert head.draft_vocab_size == size
    assert head.weight.shape == (max(size, 16), 20)
    assert torch.equal(head.logits(torch.ones(3, 20)), (2 + 2 * bias).expand(3, size))


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_logits_are_those_of_the_whole_head_for_any_count_of_rows_and_ids(
    threads: int, dtype: torch.dtype, with_bias: bool
) -> None:
    """Every D and every N from 1 to 64, against the full vocab over at least 16 rows."""
    generator = torch.Generator().manual_seed(1)
    vocab_size, hidden_size, most = 311, 96, 64
    weight = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
    bias = torch.randn(vocab_size, generator=generator).to(dtype) if with_bias else None
    rows = torch.randn(most + 13, hidden_size, generator=generator).to(dtype)
    whole = linear(rows, weight, bias)
    assert torch.equal(whole[:16], linear(rows[:16], weight, bias))
    ids = torch.randperm(vocab_size, generator=generator)
    for size in range(1, most + 1):
        chosen = ids[:size]
        head = DraftHead.build(weight[chosen], None if bias is None else bias[chosen], IDENTITY)
        expected = whole.index_select(-1, chosen)
        for count in range(1, most + 1):
            start = count % 13  # not always the same rows
            got = head.logits(rows[start : start + count])
            assert torch.equal(got, expected[start : start + count]), (size, count)


def test_no_rows_give_no_logits() -> None:
    head = DraftHead.build(torch.ones(5, 8), None, LogitsTransform(True, softcap=3.0))
    assert head.logits(torch.ones(0, 8)).shape == (0, 5)
