"""Aux states on the wire: as they are, or in fp8, against a loop written from the protocol page."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eagle3_schemas.aux_states import aux_shapes, decode_aux, encode_aux
from eagle3_schemas.frame import decode, encode

FP8 = "float8_e4m3"
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 63, 64, 65, 128, 144, 130]


def random_rows(count: int, width: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (scale * torch.randn(count, width, generator=generator)).to(dtype)


def through_a_frame(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return decode(encode({}, tensors).to_bytes()).tensors


# The finite float8 e4m3 numbers that are not negative, by definition: 4 bits of exponent with bias
# 7, 3 bits of mantissa, no infinities, and 0x7F is NaN. Entry i has the bits i.
E4M3 = [
    (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:-1]


def nearest_e4m3(value: float) -> float:
    """Round to the nearest, ties to the even code."""
    magnitude = abs(value)
    best = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - magnitude), i % 2))
    return math.copysign(E4M3[best], value)


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def slow_fp8(rows: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Codes and scales from the protocol page, one number after another."""
    codes, scales = [], []
    for row in rows.float().tolist():
        codes.append([])
        scales.append([])
        for start in range(0, len(row), 64):
            group = row[start : start + 64]
            scale = float32(max(abs(x) for x in group) / 448)
            scales[-1].append(scale)
            codes[-1].extend(nearest_e4m3(float32(x / (scale or 1.0))) for x in group)
    return codes, scales


def test_the_table_of_fp8_numbers_is_right() -> None:
    assert torch.tensor(range(127), dtype=torch.uint8).view(torch.float8_e4m3fn).tolist() == E4M3
    assert E4M3[-1] == 448


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_fp8_is_what_the_protocol_page_says(count: int, width: int, dtype: torch.dtype) -> None:
    rows = random_rows(count, width, dtype)
    tensors = encode_aux(rows, FP8)
    codes, scales = slow_fp8(rows)
    assert tensors["aux_codes"].float().tolist() == codes
    assert tensors["aux_scales"].tolist() == scales
    received = decode_aux(through_a_frame(tensors), FP8, dtype)
    assert received.dtype is dtype
    assert received.shape == rows.shape
    for r in range(count):
        for c in range(width):
            exact = torch.tensor(float32(codes[r][c] * scales[r][c // 64])).to(dtype)
            assert received[r, c] == exact, (r, c)


@pytest.mark.parametrize("aux_dtype", ["model", FP8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 3])
def test_shapes_and_dtypes_are_those_a_client_checks(
    aux_dtype: str, count: int, width: int, dtype: torch.dtype
) -> None:
    tensors = encode_aux(random_rows(count, width, dtype), aux_dtype)
    expected = aux_shapes(count, width, aux_dtype, dtype)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == expected
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_model_dtype_is_sent_as_it_is(dtype: torch.dtype) -> None:
    rows = random_rows(4, 70, dtype)
    tensors = encode_aux(rows, "model")
    assert tensors["aux_hidden_states"] is rows
    assert torch.equal(decode_aux(through_a_frame(tensors), "model", dtype), rows)


def test_fp8_halves_bf16_but_for_a_scale_in_64() -> None:
    tensors = encode_aux(random_rows(8, 12288, torch.bfloat16), FP8)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert nbytes == 8 * (12288 + 4 * 192)


def assert_within_bound(rows: Tensor, received: Tensor) -> None:
    """2**-4 of the number itself, or half the smallest code where it is too small for that."""
    exact, got = rows.double(), received.double()
    assert got.isfinite().all()
    for start in range(0, rows.shape[1], 64):
        x, y = exact[:, start : start + 64], got[:, start : start + 64]
        largest = x.abs().amax(-1, keepdim=True)
        error = (x - y).abs()
        rounding = 2.0**-8 if rows.dtype is torch.bfloat16 else 2.0**-22  # of what comes out
        bound = torch.maximum(x.abs() * 2.0**-4, largest / 448 * 2.0**-10) + rounding * y.abs()
        assert (error <= bound).all()
        assert (error <= largest * 2.0**-4).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 2.4e4, 1e30])
def test_the_error_is_bounded_for_numbers_of_any_size(scale: float, dtype: torch.dtype) -> None:
    rows = random_rows(40, 200, dtype, scale)
    assert_within_bound(rows, decode_aux(encode_aux(rows, FP8), FP8, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_state_costs_its_own_group_alone(dtype: torch.dtype) -> None:
    """Real targets have states of 2.4e4 among states of 1."""
    rows = random_rows(3, 192, dtype, 1.0)
    rows[1, 70] = -2.4e4
    received = decode_aux(encode_aux(rows, FP8), FP8, dtype)
    assert_within_bound(rows, received)
    assert abs(received[1, 70].item() + 2.4e4) <= 2.4e4 * 2**-7
    plain = random_rows(3, 192, dtype, 1.0)
    untouched = torch.ones(3, 192, dtype=torch.bool)
    untouched[1, 64:128] = False
    alone = decode_aux(encode_aux(plain, FP8), FP8, dtype)
    assert torch.equal(received[untouched], alone[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    rows = random_rows(3, 130, dtype)
    rows[0, :64] = 0
    rows[1, 128:] = 0
    rows[2] = 0
    received = decode_aux(encode_aux(rows, FP8), FP8, dtype)
    assert received.isfinite().all()
    assert torch.equal(received == 0, rows == 0)


def test_the_largest_of_a_group_comes_back_whole() -> None:
    rows = torch.zeros(1, 64)
    rows[0, 3], rows[0, 9] = -7.0, 3.5
    received = decode_aux(encode_aux(rows, FP8), FP8, torch.float32)
    assert received[0, 3] == -7
    assert received[0, 9] == 3.5


@pytest.mark.parametrize("largest", [1e-45, 3e-43, 8.8e-43, 1e-40, 1e-38])
def test_numbers_too_small_for_a_scale_are_lost_but_never_nan(largest: float) -> None:
    rows = largest * torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    received = decode_aux(encode_aux(rows, FP8), FP8, torch.float32)
    assert received.isfinite().all()
    assert ((received - rows).abs() <= largest).all()


def test_encoding_changes_nothing_of_the_callers() -> None:
    rows = random_rows(3, 128, torch.float32)
    before = rows.clone()
    encode_aux(rows, FP8)
    assert torch.equal(rows, before)
