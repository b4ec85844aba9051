"""Draft vocabs against slow loops from their definitions, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagle3_client import (
    InvalidRequest,
    build_draft_vocab,
    count_token_ids,
    draft_vocab_coverage,
    from_t2d_d2t,
    to_t2d_d2t,
)

VOCAB_SIZE = 23
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
MASKS = (torch.bool, torch.int64, torch.float32, torch.uint8)


def slow_counts(batches: list[tuple[Any, Any]], vocab_size: int) -> list[int]:
    counts = [0] * vocab_size
    for input_ids, loss_mask in batches:
        for row in range(input_ids.shape[0]):
            for column in range(input_ids.shape[1]):
                if loss_mask is None or loss_mask[row, column] != 0:
                    counts[int(input_ids[row, column])] += 1
    return counts


def slow_draft_vocab(counts: list[int], size: int, special: list[int]) -> list[int]:
    chosen: list[int] = []
    for token_id in special:
        if token_id not in chosen:
            chosen.append(token_id)
    while len(chosen) < size:
        best = None
        for token_id, count in enumerate(counts):  # upwards, so a tie leaves the lowest
            if token_id not in chosen and (best is None or count > counts[best]):
                best = token_id
        assert best is not None
        chosen.append(best)
    return chosen


# --- counting ---


@given(st.data())
def test_counts_are_those_of_a_loop(data: Any) -> None:
    batches: list[tuple[Tensor, Tensor | None]] = []
    for _ in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 5)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
        ids = torch.randint(VOCAB_SIZE, shape, generator=generator)
        mask = torch.randint(2, shape, generator=generator).to(data.draw(st.sampled_from(MASKS)))
        if mask.is_floating_point():
            mask = mask * -0.5  # any number but zero counts
        ids = ids.to(data.draw(st.sampled_from(INTEGERS)))
        batches.append((ids, None if data.draw(st.booleans()) else mask))
    counts = count_token_ids(iter(batches), VOCAB_SIZE)
    assert counts.tolist() == slow_counts(batches, VOCAB_SIZE)
    assert counts.dtype is torch.int64


def test_the_columns_of_a_view_and_other_ranks_count_as_they_are() -> None:
    ids, mask = torch.arange(12).view(3, 4), torch.ones(3, 4)
    assert count_token_ids([(ids.T, mask.T)], 12).tolist() == [1] * 12
    assert count_token_ids([(ids[:, ::2], None)], 12).nonzero().squeeze(1).tolist() == [
        0, 2, 4, 6, 8, 10,
    ]  # fmt: skip
    assert count_token_ids([(torch.tensor([5, 5]), None)], 12)[5] == 2


def test_an_id_out_of_range_counts_only_if_it_is_supervised() -> None:
    """Padding may be any id, -100 among them."""
    ids = torch.tensor([[1, -100, 99]])
    assert count_token_ids([(ids, torch.tensor([[1, 0, 0]]))], 9).tolist() == [0, 1] + [0] * 7
    for mask in ([[1, 1, 0]], [[1, 0, 1]]):
        with pytest.raises(InvalidRequest, match=r"batch 1: input_ids must be in \[0, 9\); got"):
            count_token_ids([(torch.zeros(1, 1).long(), None), (ids, torch.tensor(mask))], 9)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": 1, "loss_mask": 2}, r"expected \(input_ids, loss_mask\).*got dict"),
        ((torch.ones(1, 2).long(),) * 3, r"expected \(input_ids, loss_mask\).*got tuple"),
        (torch.ones(2, 2).long(), r"expected \(input_ids, loss_mask\).*got Tensor"),
        (([1], [1]), r"expected \(input_ids, loss_mask\)"),
        ((torch.ones(1, 2), None), r"must be integers; got torch.float32"),
        ((torch.ones(1, 2).bool(), None), r"must be integers; got torch.bool"),
        ((torch.ones(1, 2).long(), torch.ones(2)), r"shape of input_ids, \[1, 2\]; got \[2\]"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_its_place(batch: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"batch 0: .*{words}"):
        count_token_ids([batch], 9)


def test_a_vocab_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="vocab_size must be >= 1"):
        count_token_ids([], 0)


# --- building, coverage ---


@given(st.data())
def test_the_draft_vocab_is_special_then_frequent_then_lowest(data: Any) -> None:
    counts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=40))
    special = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=5))
    size = data.draw(st.integers(max(1, len(set(special))), len(counts)))
    dtype = data.draw(st.sampled_from(INTEGERS))
    ids, mask = build_draft_vocab(torch.tensor(counts, dtype=dtype), size, special)
    expected = slow_draft_vocab(counts, size, special)
    assert ids.tolist() == expected
    assert mask.tolist() == [token_id in expected for token_id in range(len(counts))]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    if (total := sum(counts)) == 0:
        with pytest.raises(InvalidRequest, match="at least one token"):
            draft_vocab_coverage(ids, torch.tensor(counts))
        return
    covered = sum(counts[token_id] for token_id in expected)
    assert draft_vocab_coverage(ids, torch.tensor(counts)) == covered / total


def test_many_equal_counts_stay_in_the_order_of_their_ids() -> None:
    """An unstable sort would pass with a few ids and fail with hundreds."""
    ids, _ = build_draft_vocab(torch.tensor([3, 5] * 500), 1000)
    assert ids.tolist() == [*range(1, 1000, 2), *range(0, 1000, 2)]


@pytest.mark.parametrize("size", [0, 1, 10])
def test_a_draft_vocab_of_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"\[2, 9\].*got {size}"):
        build_draft_vocab(torch.ones(9, dtype=torch.int64), size, [0, 3])


@pytest.mark.parametrize("special", [9, -1])
def test_a_special_token_without_a_logit_is_refused(special: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"\[0, 9\).*got \[{special}\]"):
        build_draft_vocab(torch.ones(9, dtype=torch.int64), 5, [3, special])


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (torch.ones(2, 3).long(), r"must be \[V\] integers.*\[2, 3\]"),
        (torch.ones(0).long(), r"must be \[V\] integers.*\[0\]"),
        (torch.ones(3), "float32"),
        (torch.ones(3).bool(), "bool"),
        (torch.tensor([1, -2, 3]), ">= 0; got -2"),
    ],
)
def test_what_are_no_counts_is_refused(counts: Tensor, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        build_draft_vocab(counts, 1)
    with pytest.raises(InvalidRequest, match=words):
        draft_vocab_coverage(torch.tensor([0]), counts)


def test_coverage_of_ids_beyond_the_counts_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"\[0, 3\)"):
        draft_vocab_coverage(torch.tensor([0, 3]), torch.ones(3).long())


def test_a_backend_takes_what_was_built(bridge: Any, connect: Any, inputs: Any) -> None:
    backend = connect(bridge)
    counts = count_token_ids([(inputs.input_ids, inputs.loss_mask)], 131)
    backend.set_vocab_mapping(*build_draft_vocab(counts, 17, [2, 1]))
    assert backend.generate_batch(*inputs).target_probs.shape[-1] == 17


# --- t2d and d2t ---


@st.composite
def draft_ids(draw: Any, is_ascending: bool) -> tuple[Tensor, int]:
    vocab_size = draw(st.integers(1, 40))
    ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, unique=True))
    return torch.tensor(sorted(ids) if is_ascending else ids), vocab_size


@given(draft_ids(is_ascending=True))
def test_ascending_ids_survive_the_round_trip(case: tuple[Tensor, int]) -> None:
    ids, vocab_size = case
    t2d, d2t, row_order = to_t2d_d2t(ids, vocab_size)
    assert t2d.tolist() == [token_id in ids.tolist() for token_id in range(vocab_size)]
    assert d2t.tolist() == [token_id - i for i, token_id in enumerate(ids.tolist())]
    assert row_order.tolist() == list(range(len(ids)))
    assert (t2d.dtype, d2t.dtype, row_order.dtype) == (torch.bool, torch.int64, torch.int64)
    back, mask = from_t2d_d2t(t2d, d2t)
    assert back.tolist() == ids.tolist()
    assert torch.equal(mask, t2d)


@given(draft_ids(is_ascending=False))
def test_a_head_in_the_row_order_gives_every_target_id_the_same_row(
    case: tuple[Tensor, int],
) -> None:
    ids, vocab_size = case
    t2d, d2t, row_order = to_t2d_d2t(ids, vocab_size, reorder=True)
    head = torch.randn(len(ids), 3)
    trained = {token_id: head[i].tolist() for i, token_id in enumerate(ids.tolist())}
    moved = head[row_order]
    # As SpecForge's and vLLM's own code read d2t: target id = draft id + d2t[draft id].
    assert {i + int(d2t[i]): moved[i].tolist() for i in range(len(ids))} == trained
    assert t2d.nonzero().squeeze(1).tolist() == sorted(ids.tolist())
    assert from_t2d_d2t(t2d, d2t)[0].tolist() == sorted(ids.tolist())


@given(draft_ids(is_ascending=False))
def test_another_order_converts_only_if_that_is_asked_for(case: tuple[Tensor, int]) -> None:
    ids, vocab_size = case
    if ids.tolist() == sorted(ids.tolist()):
        to_t2d_d2t(ids, vocab_size)
        return
    with pytest.raises(InvalidRequest, match=r"ascending.*got \d+ before \d+.*reorder=True"):
        to_t2d_d2t(ids, vocab_size)


@given(draft_ids(is_ascending=False))
def test_a_d2t_of_another_order_than_its_t2d_is_refused(case: tuple[Tensor, int]) -> None:
    ids, vocab_size = case
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[ids] = True
    d2t = ids - torch.arange(len(ids))
    if ids.tolist() == sorted(ids.tolist()):
        assert torch.equal(from_t2d_d2t(t2d, d2t)[0], ids)
        return
    with pytest.raises(InvalidRequest, match="another order"):
        from_t2d_d2t(t2d, d2t)


@pytest.mark.parametrize(
    ("t2d", "d2t", "words"),
    [
        ([0, 1, 1, 0], [1], "the 2 ids that t2d marks.*got 1 ids, other ids"),
        ([0, 1, 1, 0], [1, 2], "other ids"),
        ([0, 1, 1, 0], [1, 2, 3], "other ids"),
        ([0, 0, 0, 1, 1], [3, 4], r"if d2t holds target ids, subtract torch.arange\(D\)"),
        ([0, 1, 1, 0], [1.0, 1.0], "d2t .* integers; got"),
        ([[0, 1]], [1], "t2d must be"),
        ([0, 1], [[1]], "t2d must be"),
        ([0, 0], [], "D >= 1|integers"),
    ],
)
def test_halves_that_do_not_fit_are_refused(t2d: Any, d2t: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        from_t2d_d2t(torch.tensor(t2d), torch.tensor(d2t))


def test_t2d_may_be_any_kind_of_mask() -> None:
    for dtype in MASKS:
        ids, mask = from_t2d_d2t(
            torch.tensor([0, 1, 0, 1]).to(dtype), torch.tensor([1, 2], dtype=torch.int32)
        )
        assert (ids.tolist(), mask.tolist()) == ([1, 3], [False, True, False, True])
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_ids_beyond_the_vocab_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"\[0, 5\)"):
        to_t2d_d2t(torch.tensor([1, 5]), 5)
