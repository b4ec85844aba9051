"""A pooled buffer is lent once, comes back when its last view dies, and not before."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from eagle3_schemas.host_buffers import MAX_IDLE_BUFFERS, HostBuffers
from eagle3_schemas.tensors import byte_view

SIZE = 100_000


def address_of(buffer: torch.Tensor) -> int:
    return buffer.data_ptr()


@pytest.mark.parametrize("nbytes", [1, 63, 64, 65_536, 65_537, 1_000_000, 33_000_001])
def test_a_buffer_has_exactly_the_bytes_asked_for(nbytes: int) -> None:
    buffer = HostBuffers().take(nbytes)
    assert buffer.shape == (nbytes,)
    assert buffer.dtype is torch.uint8
    assert address_of(buffer) % 64 == 0
    buffer.fill_(7)
    assert int(buffer.sum(dtype=torch.int64)) == 7 * nbytes


def test_no_bytes_need_no_buffer() -> None:
    assert HostBuffers().take(0).shape == (0,)


@pytest.mark.parametrize(
    "view_of",
    [
        pytest.param(lambda buffer: buffer[64:128].view(torch.float32), id="tensor"),
        pytest.param(lambda buffer: byte_view(buffer)[5:9], id="memoryview"),
        pytest.param(lambda buffer: byte_view(buffer[64:128].view(torch.int16)), id="both"),
    ],
)
def test_a_buffer_comes_back_when_its_last_view_dies(view_of: Any) -> None:
    buffers = HostBuffers()
    buffer = buffers.take(SIZE)
    address, view = address_of(buffer), view_of(buffer)
    del buffer
    other = buffers.take(SIZE)
    assert address_of(other) != address  # lent: the view can still be read
    del view
    gc.collect()
    assert address_of(buffers.take(SIZE)) == address


def test_what_a_view_shows_outlives_the_pool() -> None:
    buffers = HostBuffers()
    buffer = buffers.take(SIZE)
    buffer.fill_(3)
    view = byte_view(buffer)
    del buffers, buffer
    gc.collect()
    torch.full((SIZE,), 9, dtype=torch.uint8)  # would take over memory that was freed
    assert bytes(view) == b"\3" * SIZE


def test_sizes_a_little_apart_share_a_buffer_and_others_do_not() -> None:
    buffers = HostBuffers()
    address = address_of(buffers.take(10_000_000))
    assert address_of(buffers.take(10_100_000)) == address
    larger = buffers.take(12_000_000)
    assert larger.shape == (12_000_000,)
    assert address_of(buffers.take(10_000_000)) == address


def test_few_idle_buffers_are_kept() -> None:
    buffers = HostBuffers()
    lent = [buffers.take(SIZE) for _ in range(MAX_IDLE_BUFFERS + 5)]
    storages = [weakref.ref(tensor) for tensor in lent]
    addresses = {address_of(tensor) for tensor in lent}
    lent.clear()
    assert all(storage() is None for storage in storages)
    buffers.take(5 * SIZE)  # another size: tidies up, and takes none of them
    again = [buffers.take(SIZE) for _ in range(MAX_IDLE_BUFFERS)]
    assert {address_of(tensor) for tensor in again} <= addresses
    assert len({address_of(tensor) for tensor in again}) == MAX_IDLE_BUFFERS
    assert len(buffers._idle) <= MAX_IDLE_BUFFERS


def test_a_view_may_die_inside_the_collector_while_the_lock_is_held() -> None:
    """The collector runs wherever Python allocates, in `take` too: a lock there would deadlock."""
    buffers = HostBuffers()
    cycle: list[Any] = [buffers.take(SIZE)]
    cycle.append(cycle)
    del cycle

    def collect_inside() -> None:
        with buffers._lock:
            gc.collect()

    thread = threading.Thread(target=collect_inside, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_no_two_threads_are_lent_the_same_memory() -> None:
    buffers = HostBuffers()
    failures: list[str] = []

    def use(number: int) -> None:
        for step in range(300):
            mine = buffers.take(SIZE + 17 * (step % 5))
            value = (number * 31 + step) % 251
            mine.fill_(value)
            if step % 3 == 0:
                buffers.take(SIZE)
            if not bool((mine == value).all()):
                failures.append(f"thread {number}, step {step}")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
