"""What tests ask of processes holds while these end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from tests.processes import is_alive, listening, read


def test_a_process_may_end_while_it_is_asked() -> None:
    """The kernel says ENOENT or ESRCH by how far it is; both came within a few of these."""
    for _ in range(100):
        process = subprocess.Popen(["sleep", "60"])
        ending = threading.Timer(0.002, lambda each=process: (each.kill(), each.wait()))
        ending.start()
        while is_alive(process.pid):
            pass
        ending.join()
        assert process.returncode == -9


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen(["true"]) as process:
        deadline = time.monotonic() + 60
        while b") Z " not in read(process.pid, "stat"):
            assert time.monotonic() < deadline
        assert not is_alive(process.pid)


def test_what_listens_is_seen_and_what_is_gone_is_nothing() -> None:
    code = "import socket; it = socket.create_server(('127.0.0.2', 0)); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        assert is_alive(process.pid)
        assert listening([process.pid]) == ["0200007F"]
        assert b"127.0.0.2" in read(process.pid, "cmdline")
        process.kill()
        process.wait()
    assert listening([process.pid]) == []
    assert read(process.pid, "cmdline") == b""
