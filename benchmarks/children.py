"""Processes a benchmark starts: servers and clients, their memory and the bytes they exchange.

Linux only: memory is read from /proc and bytes from TCP_INFO.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from common import REPOSITORY

HERE = REPOSITORY / "benchmarks"
LOOPBACK = "127.0.0.1"
OUR_READY_PATH, PEER_READY_PATH = "/readyz", "/health"
_TCP_INFO_BYTES = 192
_BYTES_ACKED = struct.Struct("@120xQQ")  # tcpi_bytes_acked, tcpi_bytes_received in linux/tcp.h


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    pid: int


@contextmanager
def server(
    arguments: Sequence[str], ready_path: str, *, threads: int, timeout_s: float = 300
) -> Iterator[Server]:
    """Run `python ARGUMENTS --port N` until the block ends; yields it once it answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its output.
    """
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = str(probe.getsockname()[1])
    url = f"http://{LOOPBACK}:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--port", port],
            env=environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + timeout_s
            while not _answers(url + ready_path):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    tail = "".join(log.readlines()[-30:])
                    raise RuntimeError(f"no answer of {' '.join(arguments)}:\n{tail}")
                time.sleep(0.1)
            yield Server(url, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Child:
    """A process that answers each line of JSON on its stdin with one on its stdout.

    Args:
        arguments: of python.
        threads: its CPU threads.
    """

    def __init__(self, arguments: Sequence[str], *, threads: int) -> None:
        self._arguments = arguments
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, do: str, **fields: object) -> Any:
        """Send one command and return its answer; blocks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._arguments)} ended at {do!r}; see its output above")
        return json.loads(answer)


def answer_commands(commands: dict[str, Any]) -> None:
    """Answer a parent's `Child.ask` until it closes the pipe; runs in the child."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not mix with the answers
    for line in sys.stdin:
        fields = json.loads(line)
        print(json.dumps(commands[fields.pop("do")](**fields)), file=answers, flush=True)


def environment(threads: int) -> dict[str, str]:
    """Return this process's environment for a child with that many CPU threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EAGLE3_")}
    # Without NCCL the peer's data plane is HTTP, as on every machine without GPUs.
    return kept | {"OMP_NUM_THREADS": str(threads), "NEMO_EAGLE_ENABLE_NCCL": "0"}


def reset_peak(pid: int) -> None:
    """Set a process's VmHWM to what it has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """Return a process's VmHWM, the peak of its resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM of process {pid}")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has used, all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tcp_bytes() -> dict[int, tuple[int, int]]:
    """Return what each open TCP connection of this process has sent (acknowledged) and received.

    Read from the kernel, so that every client counts alike, heads of messages included. Keyed by
    inode, since clients close idle connections and open others.
    """
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # closed meanwhile, or not TCP
            continue
        found[status.st_ino] = _BYTES_ACKED.unpack_from(info)
    return found


def tcp_bytes_since(before: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes sent and received since; a connection closed since then is not counted."""
    sent = received = 0
    for inode, (acked, got) in tcp_bytes().items():
        then = before.get(inode, (0, 0))
        sent, received = sent + acked - then[0], received + got - then[1]
    return sent, received


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
