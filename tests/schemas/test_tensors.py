"""Tensors as bytes: checksums against a loop from the definition, views that own what they show."""

from __future__ import annotations

import gc
import struct
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eagle3_schemas.tensors import (
    DTYPE_NAMES,
    DTYPES,
    byte_view,
    checksum,
    checksum_on_device,
    flat_bytes,
    from_flat_bytes,
)

PROPERTY = settings()  # the profile of tests/conftest.py
WORD = 8
ROW = 64 * WORD  # the checksum runs over 64 columns of words, then over the rest
BLOCK = 511 * ROW  # on the CPU over blocks of so many rows
GROUP = 64 * BLOCK  # whose sums are joined by so many


def slow_checksum(data: bytes) -> tuple[int, int]:
    """Sum and position-weighted sum of little-endian 64-bit words, zero-padded; from the page."""
    plain = weighted = 0
    padded = data + bytes(-len(data) % WORD)
    for index, (word,) in enumerate(struct.iter_unpack("<Q", padded), 1):
        plain += word
        weighted += index * word
    return plain % 2**64, weighted % 2**64


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


# --- checksum ---


@pytest.mark.parametrize("count", range(201))
def test_checksum_of_few_bytes_is_its_definition(count: int) -> None:
    data = random_bytes(count, seed=count)
    assert checksum(data) == slow_checksum(bytes(data.tolist()))


AROUND_BOUNDARIES = [
    boundary + change
    for boundary in (ROW, 2 * ROW, 7 * ROW, BLOCK, BLOCK + ROW, 2 * BLOCK)
    for change in (-WORD - 1, -WORD, -1, 0, 1, WORD - 1, WORD, WORD + 3)
] + [GROUP - 1, GROUP, GROUP + 1, GROUP + BLOCK + ROW + 3]


@pytest.mark.parametrize("count", AROUND_BOUNDARIES)
def test_checksum_is_its_definition_around_rows_and_blocks(count: int) -> None:
    data = random_bytes(count)
    assert checksum(data) == slow_checksum(bytes(byte_view(data)))


@pytest.mark.parametrize("count", [WORD, ROW + WORD, BLOCK + ROW + 5])
def test_checksum_wraps_where_every_word_is_at_its_largest(count: int) -> None:
    data = torch.full((count,), 255, dtype=torch.uint8)
    assert checksum(data) == slow_checksum(b"\xff" * count)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 67), (2, 3, 41)])
def test_checksum_of_every_dtype_is_that_of_its_bytes(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name]
    data = random_bytes(torch.Size(shape).numel() * dtype.itemsize)
    tensor = data.view(dtype).view(shape) if data.numel() else torch.empty(shape, dtype=dtype)
    assert checksum(tensor) == slow_checksum(bytes(data.tolist()))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("start", range(1, 9))
def test_checksum_of_a_slice_at_any_offset_is_that_of_its_bytes(name: str, start: int) -> None:
    """`x[1:]` is contiguous but need not start at a word of its storage."""
    dtype = DTYPES[name]
    data = random_bytes(100 * dtype.itemsize)
    tensor = data.view(dtype)[start:]
    assert checksum(tensor) == slow_checksum(bytes(data[start * dtype.itemsize :].tolist()))


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[::3],
        lambda t: t[1:, 1:],
        lambda t: t[:1].expand(4, -1),
    ],
    ids=["transposed", "columns", "rows", "inner", "expanded"],
)
def test_checksum_reads_a_strided_tensor_in_row_major_order(layout: object) -> None:
    tensor = layout(torch.arange(77.0).reshape(7, 11))  # type: ignore[operator]
    packed = struct.pack(f"<{tensor.numel()}f", *(x for line in tensor.tolist() for x in line))
    assert checksum(tensor) == slow_checksum(packed)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("count", [0, 1])
def test_one_element_or_none_may_have_any_stride(name: str, count: int) -> None:
    """Such tensors count as contiguous, so nothing puts their stride right on the way."""
    tensor = torch.ones(8).to(DTYPES[name])[3 : 3 + count : 2]
    assert tensor.is_contiguous()
    assert tensor.stride() == (2,)
    expected = bytes(torch.ones(count).to(DTYPES[name]).view(torch.uint8).tolist())
    assert bytes(byte_view(tensor)) == bytes(flat_bytes(tensor).tolist()) == expected
    assert checksum(tensor) == slow_checksum(expected)


def test_checksum_on_device_gives_the_same_words_as_signed_integers() -> None:
    tensor = torch.tensor([-1, 5])
    sums = checksum_on_device(tensor)
    assert sums.dtype is torch.int64
    assert sums.tolist() == [4, 9]
    assert checksum(torch.tensor([-1])) == (2**64 - 1, 2**64 - 1)


@PROPERTY
@given(st.binary(min_size=1, max_size=700), st.data())
def test_any_single_changed_byte_changes_both_or_the_plain_sum(
    data: bytes, draw: st.DataObject
) -> None:
    position = draw.draw(st.integers(0, len(data) - 1))
    value = draw.draw(st.integers(0, 255).filter(lambda v: v != data[position]))
    changed = data[:position] + bytes([value]) + data[position + 1 :]
    assert checksum(tensor_of(changed))[0] != checksum(tensor_of(data))[0]


@PROPERTY
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=140), st.data())
def test_two_swapped_words_change_the_weighted_sum(words: list[int], draw: st.DataObject) -> None:
    first = draw.draw(st.integers(0, len(words) - 2))
    second = draw.draw(st.integers(first + 1, len(words) - 1))
    # All that a modular sum can miss: see "Checksums" in docs/protocol.md.
    assume((second - first) * (words[first] - words[second]) % 2**64 != 0)
    swapped = list(words)
    swapped[first], swapped[second] = words[second], words[first]
    before, after = (checksum(tensor_of(struct.pack(f"<{len(w)}Q", *w))) for w in (words, swapped))
    assert before[0] == after[0]
    assert before[1] != after[1]


@PROPERTY
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=140), st.data())
def test_two_swapped_neighbours_that_differ_always_change_it(
    words: list[int], draw: st.DataObject
) -> None:
    first = draw.draw(st.integers(0, len(words) - 2))
    assume(words[first] != words[first + 1])
    swapped = [*words[:first], words[first + 1], words[first], *words[first + 2 :]]
    before, after = (checksum(tensor_of(struct.pack(f"<{len(w)}Q", *w))) for w in (words, swapped))
    assert before != after


@pytest.mark.parametrize("distance", [WORD, ROW, BLOCK, GROUP])
def test_swapped_rows_and_blocks_change_it(distance: int) -> None:
    data = random_bytes(3 * distance)
    swapped = torch.cat((data[distance : 2 * distance], data[:distance], data[2 * distance :]))
    assert checksum(swapped) != checksum(data)


# --- byte views ---


@pytest.mark.parametrize("name", DTYPES)
def test_byte_view_shows_and_changes_the_tensors_own_bytes(name: str) -> None:
    tensor = torch.zeros(2, 3).to(DTYPES[name])
    view = byte_view(tensor)
    assert (view.nbytes, view.format, view.readonly) == (6 * tensor.element_size(), "B", False)
    tensor[1, 2] = 1
    assert any(view[-tensor.element_size() :])
    view[:] = bytes(view.nbytes)
    assert not tensor.to(torch.float32).any()


def test_byte_view_of_nothing_and_of_a_scalar() -> None:
    assert byte_view(torch.empty(3, 0)).nbytes == 0
    assert bytes(byte_view(torch.tensor(258, dtype=torch.int16))) == b"\2\1"


def test_byte_view_of_a_slice_starts_at_the_slice() -> None:
    assert bytes(byte_view(torch.arange(6, dtype=torch.uint8)[2:4])) == b"\2\3"


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4).T, torch.zeros(8)[::2], torch.zeros(2, device="meta")],
    ids=["transposed", "strided", "other device"],
)
def test_byte_view_of_what_has_no_plain_bytes_is_a_value_error(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected a contiguous CPU tensor, got"):
        byte_view(tensor)


def test_byte_view_keeps_the_tensor_alive_and_lets_it_go() -> None:
    tensor = torch.arange(100_000)
    expected = slow_checksum(struct.pack("<100000q", *range(100_000)))
    gone = weakref.ref(tensor)
    view = byte_view(tensor)
    part = view[8:]
    del tensor
    gc.collect()
    other = torch.full((100_000,), -1)  # would take over memory that was freed
    assert slow_checksum(bytes(view)) == expected
    del view
    gc.collect()
    assert gone() is not None
    assert bytes(part[:8]) == (1).to_bytes(8, "little")
    del part, other
    gc.collect()
    assert gone() is None


# --- the dtype table and flat bytes ---


def test_the_dtype_table_is_one_to_one_and_named_as_torch_does() -> None:
    assert list(DTYPES) == [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ]
    for name, dtype in DTYPES.items():
        assert str(dtype) == f"torch.{name}"
        assert DTYPE_NAMES[dtype] == name
    assert len(DTYPE_NAMES) == len(DTYPES)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 0), (3, 5)])
def test_flat_bytes_and_back_is_a_view_of_the_tensor(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(DTYPES[name])
    data = flat_bytes(tensor)
    back = from_flat_bytes(data, tensor.dtype, shape)
    assert (data.dtype, data.ndim, data.numel()) == (torch.uint8, 1, tensor.nbytes)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    if tensor.numel():
        assert back.data_ptr() == data.data_ptr() == tensor.data_ptr()
