"""What goes wrong before the first batch: ports, signals, silent or lying servers, help."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from eagle3_client import TransportError
from eagle3_client.cli import app

PATIENCE_S = 30.0


def test_a_port_in_use_ends_the_command_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # The model does not exist: were it loaded first, the message would be about it.
        result = CliRunner().invoke(app, ["serve", "/no/such/model", "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in result.output
    assert "choose another --port" in result.output


SERVER_THAT_LOADS_FOR_EVER = """
import sys, threading
import eagle3_server.serve as module
from eagle3_server import ServerSettings

def load_target(settings):
    print("loading began", flush=True)
    threading.Event().wait()

module.load_target = load_target
sys.exit(module.serve(ServerSettings(model="x", port=0)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_the_process(number: signal.Signals) -> None:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("EAGLE3_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER_THAT_LOADS_FOR_EVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading began\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (1 if number == signal.SIGINT else 0)
    assert "Traceback" not in errors


def test_waiting_for_a_server_that_never_answers_ends_in_time(connect: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        backend = connect(urls=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=600)
        started = time.monotonic()
        with pytest.raises(TransportError, match="check that the server runs"):
            backend.wait_until_ready(0.5)
        assert time.monotonic() - started < PATIENCE_S  # not timeout_s


@pytest.mark.parametrize("length", ["9" * 14, "9" * 25, "²", "-1", ""])
def test_a_length_that_lies_is_never_allocated(connect: Any, length: str) -> None:
    def answer(_request: httpx.Request) -> httpx.Response:
        headers = {"content-length": length.encode("latin-1")}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(b""))

    backend = connect(httpx.MockTransport(answer), retry_for_s=0)
    with pytest.raises(TransportError, match="expected a content-length up to"):
        backend.model_info()


def test_help_shows_the_defaults() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"]).output
    for default in ("[auto: bfloat16", "[auto: cuda", "[8001]", "[127.0.0.1]"):
        assert default in " ".join(text.split()), text
