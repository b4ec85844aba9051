"""Connections that are only half there: silent, half closed, or gone without a word."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack
from typing import Any

from tests.seeded_target import SeededTarget
from tests.server.sharing.conftest import PATIENCE_S


def everything_read(sock: socket.socket) -> bytes:
    """What comes until the other end closes, or resets."""
    found = b""
    try:
        while chunk := sock.recv(1 << 20):
            found += chunk
    except ConnectionResetError:
        pass
    return found


def is_all_given_back(trainer: Any) -> bool:
    held = ("bytes_in_flight", "tokens_in_flight", "queued_requests")
    for _ in range(6000):
        status = trainer.status()
        if all(status[name] == 0 for name in held):
            return True
        threading.Event().wait(0.01)
    return False


def test_connections_that_never_speak_are_closed_and_cost_no_place(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    url = live_server(SeededTarget(), header_timeout_s=0.5, max_connections=12)
    one = trainer(url)
    with ExitStack() as stack:
        for _ in range(3):  # more than there are places, were they not given back
            silent = [stack.enter_context(one.connect()) for _ in range(10)]
            assert [everything_read(sock) for sock in silent] == [b""] * 10
        assert is_right(1, one.ask(1))
    assert is_all_given_back(one)


def test_a_client_that_closed_its_half_costs_nothing(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    one = trainer(live_server(SeededTarget()))
    for seed in range(1, 6):
        with one.open(seed, f"half-{seed}") as sock:
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(PATIENCE_S)
            everything_read(sock)
    assert is_right(6, one.ask(6))
    assert is_all_given_back(one)


def test_a_client_that_resets_in_the_middle_of_an_answer_costs_nothing(
    live_server: Any, trainer: Any, is_right: Any
) -> None:
    one = trainer(live_server(SeededTarget()))
    for seed in range(1, 6):
        with one.open(seed, f"reset-{seed}", receive_bytes=4096) as sock:
            assert sock.recv(1000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert is_right(6, one.ask(6))
    assert is_all_given_back(one)
