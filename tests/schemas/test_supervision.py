"""Supervision math against slow loops written from the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_schemas import project_to_draft_vocab, shift_left_with_zero
from eagle3_schemas.supervision import pack_bits, scatter_rows, unpack_bits

PROPERTY = settings()  # the profile of tests/conftest.py
MASK_DTYPES = [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16]
# The loop sums in float64, torch in float32: a few roundings of 2**-24 per term.
ROUNDING = 1e-6


# --- shift ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(2, 5), (3, 1), (1, 4, 3), (2, 3, 2, 2)])
def test_shift_drops_the_first_column_and_appends_zeros(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.arange(1, 1 + math.prod(shape)).reshape(shape).to(dtype)
    before = tensor.clone()
    shifted = shift_left_with_zero(tensor)
    assert (shifted.dtype, shifted.shape) == (tensor.dtype, tensor.shape)
    for row in range(shape[0]):
        for column in range(shape[1] - 1):
            assert torch.equal(shifted[row, column], tensor[row, column + 1])
        assert not shifted[row, -1].any()
    shifted.zero_()
    assert torch.equal(tensor, before)


def test_shift_example() -> None:
    assert shift_left_with_zero(torch.tensor([[7, 8, 9], [4, 5, 6]])).tolist() == [
        [8, 9, 0],
        [5, 6, 0],
    ]


# --- projection ---


def slow_projection(
    logits: torch.Tensor, ids: list[int], loss_mask: torch.Tensor
) -> tuple[list[list[list[float]]], list[list[list[bool]]]]:
    """The definition: softmax over the draft vocab, supervised where the argmax is in it."""
    probs, position_mask = [], []
    for row, mask_row in zip(logits.tolist(), loss_mask.tolist(), strict=True):
        probs.append([])
        position_mask.append([])
        for z, m in zip(row, mask_row, strict=True):
            top = 0
            for token in range(len(z)):
                if z[token] > z[top]:  # a tie keeps the lower id
                    top = token
            largest = max(z[token] for token in ids)
            terms = [math.exp(z[token] - largest) for token in ids]
            probs[-1].append([term / sum(terms) for term in terms])
            position_mask[-1].append([top in ids and m != 0])
    return probs, position_mask


def project(
    logits: torch.Tensor, ids: list[int], loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
    mask[ids] = True
    return project_to_draft_vocab(logits, torch.tensor(ids), mask, loss_mask)


def assert_is_the_slow_projection(
    logits: torch.Tensor, ids: list[int], loss_mask: torch.Tensor
) -> None:
    probs, position_mask = project(logits, ids, loss_mask)
    slow_probs, slow_mask = slow_projection(logits, ids, loss_mask)
    assert (probs.dtype, position_mask.dtype) == (torch.float32, torch.bool)
    assert probs.shape == (*logits.shape[:2], len(ids))
    assert position_mask.tolist() == slow_mask
    torch.testing.assert_close(probs, torch.tensor(slow_probs), rtol=ROUNDING, atol=ROUNDING)


@st.composite
def projections(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    batch, length, vocab = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    ids = draw(st.permutations(range(vocab)))[: draw(st.integers(1, vocab))]
    # Few distinct values, exact in every dtype, so that ties at the top are common.
    count = batch * length * vocab
    values = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    logits = torch.tensor(values, dtype=dtype).reshape(batch, length, vocab)
    count = batch * length
    marks = draw(st.lists(st.sampled_from([0, 0, 1, 2, 255]), min_size=count, max_size=count))
    mask = torch.tensor(marks).reshape(batch, length).to(draw(st.sampled_from(MASK_DTYPES)))
    return logits, list(ids), mask


@PROPERTY
@given(projections())
def test_projection_is_the_definition(
    case: tuple[torch.Tensor, list[int], torch.Tensor],
) -> None:
    logits, ids, loss_mask = case
    assert_is_the_slow_projection(logits, ids, loss_mask)
    shifted, mask = shift_left_with_zero(logits), shift_left_with_zero(loss_mask)
    assert_is_the_slow_projection(shifted, ids, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 40], ids=["D=1", "D<V", "D=V"])
def test_projection_of_real_valued_logits_is_the_definition(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(2, 5, 40, generator=generator) * 8).to(dtype)
    ids = torch.randperm(40, generator=generator)[:size].tolist()
    loss_mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    assert_is_the_slow_projection(logits, ids, loss_mask)


def test_a_tie_goes_to_the_lowest_id_whatever_the_draft_vocabs_order() -> None:
    logits = torch.tensor([[[0.0, 5.0, 1.0, 5.0, 5.0]]])
    everywhere = torch.ones(1, 1)
    for ids, expected in (([4, 3, 1], True), ([1], True), ([4, 3, 2, 0], False), ([3], False)):
        assert project(logits, ids, everywhere)[1].item() is expected


def test_the_full_draft_vocab_supervises_every_loss_mask_position() -> None:
    logits = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0))
    loss_mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1]])
    probs, position_mask = project(logits, list(range(11)), loss_mask)
    assert torch.equal(position_mask.squeeze(-1), loss_mask.bool())
    assert torch.equal(probs, torch.softmax(logits, -1))


def test_a_draft_vocab_of_one_has_probability_one() -> None:
    logits = torch.tensor([[[9.0, -50.0, 3.0], [0.0, 1.0, 0.5]]])
    probs, position_mask = project(logits, [1], torch.ones(1, 2))
    assert probs.tolist() == [[[1.0], [1.0]]]
    assert position_mask.tolist() == [[[False], [True]]]


def test_the_draft_vocabs_order_numbers_the_probabilities() -> None:
    logits = torch.tensor([[[1.0, 4.0, 2.0, 3.0]]])
    ascending = project(logits, [0, 1, 3], torch.ones(1, 1))[0]
    shuffled = project(logits, [3, 0, 1], torch.ones(1, 1))[0]
    expected = ascending[..., [2, 0, 1]]
    torch.testing.assert_close(shuffled, expected, rtol=ROUNDING, atol=0)  # sums in another order
    assert (ascending.argmax(), shuffled.argmax()) == (1, 2)


def test_the_last_column_is_uniform_and_never_supervised() -> None:
    """Shifting appends zeros: argmax 0, which may well be in the draft vocab."""
    logits = shift_left_with_zero(torch.randn(3, 4, 9))
    loss_mask = shift_left_with_zero(torch.ones(3, 4))
    probs, position_mask = project(logits, [0, 5, 2, 7], loss_mask)
    assert torch.equal(probs[:, -1], torch.full((3, 4), 0.25))
    assert not position_mask[:, -1].any()


def test_probabilities_are_taken_in_float32_from_a_narrow_head() -> None:
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = list(range(0, 50, 2))
    probs, _ = project(logits, ids, torch.ones(1, 3))
    assert torch.equal(probs, torch.softmax(logits[..., ids].float(), -1))


# --- masks as bits ---


def slow_bits(flags: list[bool]) -> list[int]:
    packed = [0] * math.ceil(len(flags) / 8)
    for index, flag in enumerate(flags):
        packed[index // 8] |= int(flag) << (index % 8)
    return packed


@PROPERTY
@given(st.lists(st.booleans(), max_size=70))
def test_bits_are_packed_lowest_first_and_come_back(flags: list[bool]) -> None:
    packed = pack_bits(torch.tensor(flags, dtype=torch.bool))
    assert packed.dtype is torch.uint8
    assert packed.tolist() == slow_bits(flags)
    assert unpack_bits(packed, (len(flags),)).tolist() == flags


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (2, 4), (3, 7), (2, 3, 5), (1, 257)])
def test_bits_of_any_shape_are_those_of_its_row_major_elements(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    packed = pack_bits(mask)
    assert packed.tolist() == slow_bits(mask.reshape(-1).tolist())
    back = unpack_bits(packed, shape)
    assert (back.dtype, back.shape) == (torch.bool, mask.shape)
    assert torch.equal(back, mask)


def test_bits_of_a_strided_mask_are_row_major() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(pack_bits(mask.T), pack_bits(mask.T.contiguous()))


def test_unused_bits_are_written_as_zeros_and_ignored_when_read() -> None:
    assert pack_bits(torch.ones(3, dtype=torch.bool)).tolist() == [0b111]
    assert unpack_bits(torch.tensor([0xFA], dtype=torch.uint8), (3,)).tolist() == [
        False,
        True,
        False,
    ]


# --- rows ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["no row", "some rows", "all rows"])
def test_rows_go_where_the_mask_is_true_and_zeros_elsewhere(
    dtype: torch.dtype, share: float
) -> None:
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(4)) < share
    rows = torch.arange(1, 1 + int(mask.sum()) * 2).reshape(-1, 2).to(dtype)
    placed = scatter_rows(rows, mask)
    assert (placed.dtype, placed.shape) == (dtype, (3, 5, 2))
    following = iter(rows.tolist())
    for row in range(3):
        for column in range(5):
            expected = next(following) if mask[row, column] else [0, 0]
            assert placed[row, column].tolist() == expected


def test_rows_for_every_position_are_not_copied() -> None:
    rows = torch.zeros(6, 4)
    placed = scatter_rows(rows, torch.ones(2, 3, dtype=torch.bool))
    assert placed.data_ptr() == rows.data_ptr()
