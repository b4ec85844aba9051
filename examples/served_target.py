"""A target server as a process of its own, for the time of a ``with`` block."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def served_target(
    checkpoint: Path,
    *,
    log_file: Path,
    threads: int,
    timeout_s: float = 120,
    token: str | None = None,
) -> Iterator[str]:
    """Run ``eagle3-remote serve`` on a free local port and yield its URL once it is ready.

    The server is stopped when the block ends, however it ends.

    Args:
        checkpoint: the target, served in float32.
        log_file: where the server's output goes.
        threads: the server's CPU threads; equal bits need as many as the trainer's.
        timeout_s: how long loading may take.
        token: that trainers must send; None asks for none.

    Raises:
        RuntimeError: the server died or was not ready in time; the message ends with its log.
    """
    url = f"http://127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "eagle3_client.cli", "serve", str(checkpoint)]
    command += ["--port", url.rpartition(":")[2], "--dtype", "float32"]
    # Settings of another server in this shell are not meant for this one.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("EAGLE3_")}
    environment["OMP_NUM_THREADS"] = str(threads)
    if token is not None:
        environment["EAGLE3_TOKEN"] = token
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        _wait_until_ready(process, url, log_file, timeout_s)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, log_file: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    # The server is on this machine: a proxy from the environment would not find it.
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(
                    f"the server exited with {process.returncode}:\n{_tail(log_file)}"
                )
            try:
                if client.get(f"{url}/readyz").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {timeout_s:.0f} s:\n{_tail(log_file)}")


def _tail(log_file: Path, lines: int = 40) -> str:
    return "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
