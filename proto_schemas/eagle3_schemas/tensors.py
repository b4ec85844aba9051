"""torch.Tensor <-> raw little-endian bytes, without copying; the only dtype table.

A tensor's checksum is taken on the device where it lies, so that it covers every later copy.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Final

import torch

if sys.byteorder != "little":  # pragma: no cover - no such machine runs CUDA or this torch
    raise ImportError("eagle3-remote needs a little-endian machine: tensors travel as they lie")

DTYPES: Final[dict[str, torch.dtype]] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

Checksum = tuple[int, int]
"""(sum, position-weighted sum) of a tensor's bytes as 64-bit words, both modulo 2**64."""

_WORD = 8
_MASK64 = (1 << 64) - 1
_COLUMNS = 64
# torch uses one thread below 32,768 elements. More would gain little, as one core reads at nearly
# memory speed, and lose a lot on a busy machine, where threads spin while they wait for each other
# (0.1 GB/s instead of 10). 256 KiB also stay in the cache for the second of two passes.
_CPU_ROWS = 511
_CPU_BLOCKS = 64


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return a writable memoryview of a contiguous CPU tensor's bytes; it keeps the tensor alive.

    Raises:
        ValueError: the tensor is not contiguous or not on the CPU; call `.cpu().contiguous()`.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous CPU tensor, got {tensor.device} with strides {tensor.stride()}"
        )
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(b"")
    # Through ctypes rather than numpy, which knows neither bfloat16 nor float8 and is no
    # dependency of torch; the attribute ties the tensor's life to the view's.
    array = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes as a 1-D uint8 tensor on its device: a view if contiguous."""
    # Not reshape(-1), which keeps any stride that one element has, such as that of x[:1:2].
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def from_flat_bytes(data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """View a 1-D uint8 tensor of exactly the right length as a tensor; no copy."""
    if data.numel() == 0:
        return torch.empty(shape, dtype=dtype, device=data.device)
    return data.view(dtype).view(shape)


def _sums(words: torch.Tensor) -> torch.Tensor:
    """[2] int64: sum of the words, and sum of (index + 1) * word, wrapping."""
    count = words.numel()
    whole = count // _COLUMNS * _COLUMNS
    result = torch.zeros(2, dtype=torch.int64, device=words.device)
    if whole:
        # Σ (row * K + column + 1) * w  =  K * Σ row * (row sum)  +  Σ (column + 1) * (column sum):
        # two plain reductions at memory speed instead of a product per word.
        grid = words[:whole].view(-1, _COLUMNS)
        row_sums, column_sums = grid.sum(1), grid.sum(0)
        rows = torch.arange(row_sums.numel(), device=words.device)
        columns = torch.arange(1, _COLUMNS + 1, device=words.device)
        result[0] = row_sums.sum()
        result[1] = (rows * row_sums).sum() * _COLUMNS + (columns * column_sums).sum()
    if whole < count:
        rest = words[whole:]
        result[0] += rest.sum()
        result[1] += (rest * torch.arange(whole + 1, count + 1, device=words.device)).sum()
    return result


def _add_block_sums(words: torch.Tensor, total: torch.Tensor) -> None:
    """Add the sums of whole blocks of CPU memory to `total`, on the calling thread alone."""
    blocks = words.view(-1, _CPU_ROWS, _COLUMNS)
    columns = torch.arange(1, _COLUMNS + 1)
    for start in range(0, blocks.shape[0], _CPU_BLOCKS):
        some = blocks[start : start + _CPU_BLOCKS]
        row_sums = words.new_empty(some.shape[0], _CPU_ROWS)
        column_sums = words.new_empty(some.shape[0], _COLUMNS)
        for block, rows_out, columns_out in zip(some, row_sums, column_sums, strict=True):
            torch.sum(block, 1, out=rows_out)
            torch.sum(block, 0, out=columns_out)
        first_row = start * _CPU_ROWS
        rows = torch.arange(first_row, first_row + row_sums.numel()).view_as(row_sums)
        total[0] += row_sums.sum()
        total[1] += (rows * row_sums).sum() * _COLUMNS + (columns * column_sums).sum()


def checksum_on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's checksum as [2] int64 on its own device, without synchronising.

    The bytes are read as little-endian 64-bit words, the last one padded with zeros.
    """
    data = flat_bytes(tensor)
    if data.storage_offset() % _WORD:  # a slice such as x[1:]: torch views words only when aligned
        data = data.clone()
    whole = data.numel() // _WORD * _WORD
    words = data[:whole].view(torch.int64) if whole else data.new_empty(0, dtype=torch.int64)
    count = words.numel()
    in_blocks = 0
    total = torch.zeros(2, dtype=torch.int64, device=data.device)
    if data.device.type == "cpu":
        in_blocks = count - count % (_CPU_ROWS * _COLUMNS)
        _add_block_sums(words[:in_blocks], total)
    rest = _sums(words[in_blocks:])
    rest[1] += rest[0] * in_blocks
    total += rest
    if whole < data.numel():
        last = torch.zeros(_WORD, dtype=torch.uint8, device=data.device)
        last[: data.numel() - whole] = data[whole:]
        word = last.view(torch.int64)[0]
        total += torch.stack((word, word * (count + 1)))
    return total


def checksum(tensor: torch.Tensor) -> Checksum:
    """Return a tensor's checksum as two unsigned 64-bit integers (waits for the device)."""
    return checksums([tensor])[0]


def checksums(tensors: Sequence[torch.Tensor]) -> list[Checksum]:
    """Return the checksums of tensors on one device; waits for it once."""
    if not tensors:
        return []
    sums = torch.stack([checksum_on_device(tensor) for tensor in tensors]).tolist()
    return [(plain & _MASK64, weighted & _MASK64) for plain, weighted in sums]
