"""The progress of a download: on a terminal, from a size on, and only there."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest

from eagle3_client import receiving

WEIGHT_BYTES = 131 * 48 * 4


class Terminal(io.StringIO):
    """A stderr that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """`watch()`: a terminal from now on. (pytest takes stderr after a test's fixtures.)"""

    def start() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    monkeypatch.setattr(receiving, "SHOWN_FROM_BYTES", WEIGHT_BYTES)
    monkeypatch.setattr(receiving, "_SHOWN_PIECE_BYTES", 1000)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    return start


@pytest.mark.parametrize("link", ["socket", "transport"])
def test_a_large_download_shows_its_progress(
    model: Any, serve: Any, live_server: Any, connect: Any, watch: Any, link: str, same: Any
) -> None:
    is_socket = link == "socket"
    backend = connect(urls=live_server(model)) if is_socket else connect(serve(model))
    terminal = watch()
    weight = backend.get_input_embeddings().weight
    same(weight, model.get_input_embeddings().weight.detach())
    shown = terminal.getvalue()
    assert "input-embeddings" in shown
    assert "25." in shown  # kB, whole and of the whole
    assert "kB" in shown


def test_a_smaller_download_shows_none(
    bridge: Any, connect: Any, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "SHOWN_FROM_BYTES", WEIGHT_BYTES + 4096)
    terminal = watch()
    connect(bridge).get_input_embeddings()
    assert terminal.getvalue() == ""


def test_supervision_shows_none_however_large(
    bridge: Any, connect: Any, watch: Any, inputs: Any, draft_ids: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    backend = connect(bridge, draft_ids)
    monkeypatch.setattr(receiving, "SHOWN_FROM_BYTES", 0)
    terminal = watch()
    backend.generate_batch(*inputs)
    assert terminal.getvalue() == ""


def test_a_log_shows_none(bridge: Any, connect: Any, watch: Any, monkeypatch: Any) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    connect(bridge).get_input_embeddings()
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    connect(bridge).get_input_embeddings()
    assert log.getvalue() == ""


def test_a_download_is_large_from_64_mib() -> None:
    assert receiving.SHOWN_FROM_BYTES == 64 * 1024 * 1024
