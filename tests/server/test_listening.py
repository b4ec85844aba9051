"""Where a server listens: sockets it may have, and what it says of those it may not."""

from __future__ import annotations

import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from eagle3_schemas.errors import InvalidRequest
from eagle3_server import ServerSettings
from eagle3_server.listening import (
    hold_unix,
    is_loopback,
    listen_tcp,
    listen_unix,
    remove_unix,
)
from eagle3_server.serve import serve


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "eagle3.sock"


def test_only_this_user_may_connect_to_a_unix_socket(path: Path) -> None:
    before = os.umask(0)
    try:
        listener = listen_unix(path)
    finally:
        assert os.umask(before) == 0  # left as it was
    with listener, socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client.connect(str(path))
        listener.accept()[0].close()


def test_a_socket_that_a_dead_server_left_is_replaced(path: Path) -> None:
    listen_unix(path).close()
    assert path.exists()
    with listen_unix(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.accept()[0].close()


def test_the_socket_of_a_living_server_is_left_alone(path: Path) -> None:
    with listen_unix(path) as listener:
        with pytest.raises(InvalidRequest, match="Address already in use; choose another"):
            listen_unix(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            listener.accept()[0].close()


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("somebody's notes")
    with pytest.raises(InvalidRequest, match="cannot listen on the Unix socket"):
        listen_unix(path)
    assert path.read_text() == "somebody's notes"


@pytest.mark.parametrize("name", ["no/such/directory.sock", "x" * 120])
def test_a_path_that_cannot_be_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="choose another --unix-socket"):
        listen_unix(tmp_path / name)


def test_a_socket_is_removed(path: Path) -> None:
    listen_unix(path).close()
    held = hold_unix(path)
    remove_unix(path, held)
    assert not path.exists()


def test_a_port_in_use_is_said() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"port {port}: Address already in use"):
            listen_tcp("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("gpu-host", False),
    ],
)  # fmt: skip
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tls_key": "k.pem"}, "--tls-key needs --tls-certificate"),
        ({"tls_certificate": "no-such.pem"}, "cannot use --tls-certificate no-such.pem"),
        (
            {"tls_certificate": "c.pem", "unix_socket": "s.sock"},
            "--unix-socket and --tls-certificate cannot be had together",
        ),
    ],
)
def test_settings_that_cannot_be_served_are_refused_before_loading(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        serve(ServerSettings(model="never-loaded", port=0, **settings))


def test_a_certificate_that_is_none_is_said(tmp_path: Path) -> None:
    certificate = tmp_path / "c.pem"
    certificate.write_text("not a certificate")
    with pytest.raises(InvalidRequest, match="give a PEM certificate chain"):
        serve(ServerSettings(model="never-loaded", port=0, tls_certificate=certificate))


def test_a_socket_that_another_server_put_there_meanwhile_is_left(tmp_path: Path) -> None:
    """A server drains, its successor takes the path, the first one tidies up."""
    path = tmp_path / "eagle3.sock"
    first = listen_unix(path)
    held = hold_unix(path)
    first.close()
    second = listen_unix(path)
    remove_unix(path, held)
    with second, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    remove_unix(path, hold_unix(path))
    assert not path.exists()


def test_of_servers_that_start_at_once_on_one_path_one_listens(tmp_path: Path) -> None:
    for trial in range(100):
        path = tmp_path / f"{trial}.sock"
        if trial % 2:
            listen_unix(path).close()  # a dead server's
        start = threading.Barrier(4)

        def listen(start: threading.Barrier = start, path: Path = path) -> socket.socket | None:
            start.wait(60)
            try:
                return listen_unix(path)
            except InvalidRequest:
                return None

        with ThreadPoolExecutor(4) as pool:
            found = [each.result() for each in [pool.submit(listen) for _ in range(4)]]
        listening = [sock for sock in found if sock is not None]
        for sock in listening:
            sock.close()
        assert len(listening) == 1
