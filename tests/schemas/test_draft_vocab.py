"""`DraftVocab`: any order, checked once, addressed by a digest that pins the order."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import InvalidRequest

PROPERTY = settings()  # the profile of tests/conftest.py
V = 31
IDS = [17, 3, 30, 0, 8]
GOLDEN_DIGEST = "6fdc06c819bbd29d5ad559b39f9a6bbfb41641345ab3090f1a265c22c5e70407"


def mask_of(ids: list[int], size: int = V) -> torch.Tensor:
    return torch.tensor([i in ids for i in range(size)])


def slow_digest(ids: list[int]) -> str:
    """From docs/protocol.md: a domain line, then the ordered ids as little-endian int64."""
    return hashlib.sha256(
        b"eagle3-draft-vocab-v1\0" + struct.pack(f"<{len(ids)}q", *ids)
    ).hexdigest()


# --- the digest ---


def test_golden_digest() -> None:
    """Both sides compute it, so it may change only with PROTOCOL_VERSION."""
    assert DraftVocab.from_ids(torch.tensor(IDS)).digest == GOLDEN_DIGEST
    assert slow_digest(IDS) == GOLDEN_DIGEST


@PROPERTY
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=40, unique=True))
def test_digest_is_that_of_the_ordered_ids(ids: list[int]) -> None:
    assert DraftVocab.from_ids(torch.tensor(ids)).digest == slow_digest(ids)


def test_digest_tells_orders_apart() -> None:
    digests = {
        DraftVocab.from_ids(torch.tensor(ids)).digest
        for ids in (IDS, sorted(IDS), IDS[::-1], [*IDS[1:], IDS[0]], IDS[:-1])
    }
    assert len(digests) == 5


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_digest_and_ids_do_not_depend_on_the_callers_dtype(dtype: torch.dtype) -> None:
    vocab = DraftVocab.from_ids(torch.tensor(IDS, dtype=dtype))
    assert vocab.digest == slow_digest(IDS)
    assert vocab.selected_token_ids.dtype is torch.int64
    assert vocab.selected_token_ids.tolist() == IDS


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[i, -1] for i in IDS])[:, 0],
        torch.tensor([-1, -1, *IDS])[2:],
        torch.tensor(IDS[::-1]).flip(0),
        torch.nn.Parameter(torch.tensor(IDS), requires_grad=False),
    ],
    ids=["strided", "offset", "flipped", "parameter"],
)
def test_digest_does_not_depend_on_layout(ids: torch.Tensor) -> None:
    assert DraftVocab.from_ids(ids).digest == slow_digest(IDS)


# --- order and immutability ---


@PROPERTY
@given(st.permutations(range(V)), st.integers(1, V))
def test_ids_keep_the_callers_order(order: list[int], size: int) -> None:
    ids = list(order)[:size]
    vocab = DraftVocab.from_ids(torch.tensor(ids), mask_of(ids))
    assert vocab.selected_token_ids.tolist() == ids
    assert vocab.draft_vocab_size == size


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_later_change_of_the_callers_tensor_does_not_reach_the_mapping(
    dtype: torch.dtype,
) -> None:
    ids = torch.tensor(IDS, dtype=dtype)
    vocab = DraftVocab.from_ids(ids)
    ids.zero_()
    assert vocab.selected_token_ids.tolist() == IDS
    assert vocab.digest == slow_digest(IDS)


def test_a_mapping_cannot_be_reassigned() -> None:
    vocab = DraftVocab.from_ids(torch.tensor(IDS))
    with pytest.raises(AttributeError):
        vocab.digest = "0" * 64  # type: ignore[misc]


# --- refusals ---


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([], dtype=torch.int64), r"must be \[D\] with D >= 1; got shape \[0\]"),
        (torch.tensor(3), r"must be \[D\] with D >= 1; got shape \[\]"),
        (torch.tensor([IDS]), r"must be \[D\] with D >= 1; got shape \[1, 5\]"),
        (torch.tensor([1.0, 2.0]), "must be integer ids; got torch.float32"),
        (torch.tensor([1, 2], dtype=torch.bfloat16), "must be integer ids; got torch.bfloat16"),
        (torch.tensor([1, 2], dtype=torch.complex64), "must be integer ids; got torch.complex64"),
        (torch.tensor([True, False]), "must be integer ids; got torch.bool"),
        (torch.tensor([4, 2, 9, 2]), "must be distinct; id 2 appears twice"),
        (torch.tensor([5, 5]), "must be distinct; id 5 appears twice"),
        (torch.tensor([4, -1, 2]), "must be >= 0; got -1"),
    ],
    ids=["empty", "rank 0", "rank 2", "float", "bf16", "complex", "bool", "twice", "pair", "minus"],
)
def test_ids_that_are_no_mapping_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"selected_token_ids {message}"):
        DraftVocab.from_ids(ids)


OTHER_SETS = {
    "one missing": mask_of(IDS[1:]),
    "one more": mask_of([*IDS, 1]),
    "another of the same size": mask_of([*IDS[1:], 1]),
    "none": torch.zeros(V, dtype=torch.bool),
    "all": torch.ones(V, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", OTHER_SETS.values(), ids=OTHER_SETS)
def test_a_mask_that_marks_another_set_is_refused(mask: torch.Tensor) -> None:
    message = f"must mark exactly the 5 selected_token_ids; it marks {int(mask.sum())} ids"
    with pytest.raises(InvalidRequest, match=message):
        DraftVocab.from_ids(torch.tensor(IDS), mask)


@pytest.mark.parametrize("size", [0, 30])
def test_an_id_beyond_the_mask_is_named(size: int) -> None:
    message = rf"selected_token_ids must be in \[0, {size}\), the length of .*; got {max(IDS)}"
    with pytest.raises(InvalidRequest, match=message):
        DraftVocab.from_ids(torch.tensor(IDS), mask_of(IDS, size=size))


@pytest.mark.parametrize("mask", [mask_of(IDS)[None], torch.tensor(True)], ids=["rank 2", "rank 0"])
def test_a_mask_that_is_no_row_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(InvalidRequest, match=r"selected_token_mask must be \[V\]; got shape"):
        DraftVocab.from_ids(torch.tensor(IDS), mask)


@pytest.mark.parametrize(
    "mask",
    [
        mask_of(IDS),
        mask_of(IDS).long(),
        mask_of(IDS).float() * -0.5,
        mask_of(IDS).to(torch.uint8) * 255,
        torch.stack((mask_of(IDS), ~mask_of(IDS)), dim=1)[:, 0],
        mask_of(IDS, size=100),
    ],
    ids=["bool", "int64", "float", "uint8", "strided", "longer than the vocab"],
)
def test_a_mask_of_any_dtype_that_marks_the_ids_is_accepted(mask: torch.Tensor) -> None:
    assert DraftVocab.from_ids(torch.tensor(IDS), mask).digest == slow_digest(IDS)


def test_an_id_outside_the_targets_vocab_is_refused_with_the_vocabs_size() -> None:
    vocab = DraftVocab.from_ids(torch.tensor(IDS))
    vocab.check_range(31)
    with pytest.raises(InvalidRequest, match=r"must be in \[0, 30\), the target's vocab; got 30"):
        vocab.check_range(30)


def test_the_mask_is_derived_from_the_ids() -> None:
    mask = DraftVocab.from_ids(torch.tensor(IDS)).mask(V)
    assert mask.dtype is torch.bool
    assert torch.equal(mask, mask_of(IDS))
