"""`host_zeros`: zeros, of any size, that are the caller's own."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch

from eagle3_schemas.host_zeros import SMALLEST_MAPPING, host_zeros
from eagle3_schemas.supervision import scatter_rows

LARGE = (SMALLEST_MAPPING // 64, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(0, 5), (3,), (1000, 7), (SMALLEST_MAPPING + 1,), LARGE])
def test_zeros_of_a_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = host_zeros(shape, dtype)
    assert found.dtype is dtype
    assert torch.equal(found, torch.zeros(shape, dtype=dtype))


def test_a_view_keeps_the_memory_and_the_last_one_gives_it_back() -> None:
    views = [host_zeros(LARGE, torch.float32)[i : i + 1] for i in range(20)]
    for number, view in enumerate(views):
        view.fill_(number)
    gc.collect()
    assert [int(view[0, 0]) for view in views] == list(range(20))
    addresses = [view.data_ptr() for view in views]
    assert all(map(is_mapped, addresses))
    del views, view
    # Another thread may have mapped something at one of them meanwhile.
    assert sum(map(is_mapped, addresses)) <= 2


def test_a_lack_of_memory_is_called_that() -> None:
    for shape in ((1 << 50,), (1 << 62, 8)):
        with pytest.raises(MemoryError, match="can't allocate"):
            host_zeros(shape, torch.uint8)


def test_a_forked_child_does_not_write_into_it() -> None:
    found = host_zeros(LARGE, torch.float32)
    pid = os.fork()
    if pid == 0:
        found[0, 0] = 1  # by this thread: torch's others are not there in a child
        os._exit(0)
    os.waitpid(pid, 0)
    assert not found.any()


def test_it_works_where_huge_pages_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    assert not host_zeros(LARGE, torch.float32).any()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert not host_zeros(LARGE, torch.float32).any()


def test_rows_are_scattered_into_zeros_of_either_kind() -> None:
    for columns in (3, SMALLEST_MAPPING // 200):
        mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) < 0.4
        rows = torch.rand(int(mask.sum()), columns)
        found = scatter_rows(rows, mask)
        for position, is_row in enumerate(mask.flatten().tolist()):
            got = found.view(100, columns)[position]
            expected = rows[int(mask.flatten()[:position].sum())] if is_row else torch.zeros(1)
            assert torch.equal(got, expected.expand_as(got))


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(start <= address < end for start, end in ranges)
