"""Two replicas on the CPU: what they serve, what listens, what a death does, and how they end.

One command for all of them; the last test ends it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.processes import is_alive, listening, read
from tests.replicas.conftest import PATIENCE_S, TOKEN, Command, V, parent_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


def test_both_serve_what_a_co_located_target_does(
    command: Command, trainer: Any, check: Any, batch_of: Any
) -> None:
    first, second = command.urls
    assert (first, second) == tuple(f"http://127.0.0.1:{command.port + k}" for k in range(2))
    for urls in (first, second, ",".join(command.urls)):
        backend = trainer(urls)
        for seed in range(3):
            inputs = batch_of(V, (12, 9, 5), seed=seed)
            check(backend.generate_batch(*inputs), inputs)
    assert trainer(first).fingerprint == trainer(second).fingerprint


def test_the_urls_are_in_the_file_and_on_stdout(command: Command, urls_file: Path) -> None:
    (line,) = command.printed.splitlines()
    assert urls_file.read_text() == line + "\n" == ",".join(command.urls) + "\n"
    assert [each.name for each in urls_file.parent.iterdir()] == ["urls"]
    assert f"trainers use EAGLE3_URLS={line}\n" in command.said


def test_every_line_of_a_server_names_its_replica(command: Command) -> None:
    for replica in range(2):
        assert f"replica {replica}: " in command.said
        assert any(
            line.startswith(f"replica {replica}: ") and "loaded tiny-llama" in line
            for line in command.said.splitlines()
        )


def test_all_of_it_listens_on_loopback_alone(command: Command) -> None:
    addresses = listening({command.process.pid, *command.processes()})
    assert len(addresses) >= 2 + 5  # the servers; Ray's own
    assert set(addresses) <= LOOPBACK


def session_of(command: Command) -> Path:
    """The folder around Ray's, of which this command has its own."""
    (raylet, *_) = [  # one that it forks has its command line until it runs something else
        pid for pid in command.processes() if b"--raylet_socket_name=" in read(pid, "cmdline")
    ]
    arguments = read(raylet, "cmdline").decode().split("\0")
    (folder,) = [each.partition("=")[2] for each in arguments if each.startswith("--temp_dir=")]
    return Path(folder).parent


def test_the_token_is_nowhere_but_with_the_servers(command: Command) -> None:
    """Not in a process's arguments or environment, nor in what Ray writes."""
    processes = command.processes()
    assert len(processes) > 6
    for name in ("cmdline", "environ"):
        found = {pid: read(pid, name) for pid in processes}
        assert len([text for text in found.values() if text]) > 6, name  # some may have ended
        for pid, text in found.items():
            assert TOKEN.encode() not in text, (pid, name)
    assert TOKEN not in command.said + command.printed
    folder = session_of(command)
    assert folder.stat().st_mode & 0o777 == 0o700
    files = 0
    for parent, _, names in os.walk(folder):  # which goes past what Ray removes meanwhile
        for path in (Path(parent, name) for name in names):
            with suppress(FileNotFoundError):
                if path.is_file():  # and no socket
                    assert TOKEN.encode() not in path.read_bytes(), path
                    files += 1
    assert files > 5
    assert httpx.get(f"{command.urls[0]}/v1/model").status_code == 401


def test_ray_asks_for_a_token_and_sends_no_statistics(command: Command) -> None:
    (raylet, *_) = [
        pid for pid in command.processes() if b"--raylet_socket_name=" in read(pid, "cmdline")
    ]
    variables = read(raylet, "environ").split(b"\0")
    assert b"RAY_USAGE_STATS_ENABLED=0" in variables
    assert b"RAY_AUTH_MODE=token" in variables
    path = session_of(command) / "token"
    assert f"RAY_AUTH_TOKEN_PATH={path}".encode() in variables
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("victim", ["server", "actor"])
def test_one_is_killed_under_load_and_comes_back(
    command: Command, trainer: Any, check: Any, batch_of: Any, victim: str, urls_file: Path
) -> None:
    """Every batch arrives and is right; the URLs stay what they were."""
    urls, lives = command.urls, command.said.count("is back at")
    former = command.server_of(1)
    doomed = former if victim == "server" else parent_of(former)
    assert (victim == "actor") == (b"ray::Replica" in read(doomed, "cmdline"))
    backend = trainer(urls)
    inputs = [batch_of(V, (12, 9, 5), seed=seed) for seed in range(120)]
    killed_at = 0.0
    with backend.prefetch([tuple(each) for each in inputs], 3) as prefetch:
        for step, (_, batch) in enumerate(prefetch):
            check(batch, inputs[step])
            if step == 20:
                os.kill(doomed, signal.SIGKILL)
                killed_at = time.monotonic()
    assert step == 119
    assert killed_at
    command.wait_for("replica 1 .* is back at", lives + 1)
    assert command.urls == urls
    assert urls_file.read_text() == ",".join(urls) + "\n"
    assert f"is back at {urls[1]} after " in command.said
    what = f"process {former} on 127.0.0.1) ended with signal 9" if victim == "server" else (
        "its actor is gone, and its server with it"
    )  # fmt: skip
    assert f"replica 1 ({urls[1]}): " in command.said
    assert what in command.said
    assert not is_alive(former)
    assert command.server_of(1) != former
    check(trainer(urls[1]).generate_batch(*inputs[0]), inputs[0])
    assert command.server_of(0) in command.processes(), "the other was not touched"


def test_sigterm_under_load_drains_all_and_leaves_nothing(
    command: Command, trainer: Any, check: Any, batch_of: Any, urls_file: Path
) -> None:
    """The last one of this module: it ends the command."""
    folder = session_of(command)
    inputs = batch_of(V, (12, 9, 5))
    served = [0, 0]

    def load(number: int) -> None:
        backend = trainers[number]
        try:
            while True:
                check(backend.generate_batch(*inputs), inputs)
                served[number] += 1
        except Exception as exc:
            ends[number] = exc

    ends: list[Exception | None] = [None, None]
    trainers = [trainer(url) for url in command.urls]
    threads = [threading.Thread(target=load, args=[number]) for number in range(2)]
    for each in threads:
        each.start()
    wait_until(lambda: min(served) >= 3, "no load")
    command.process.terminate()
    wait_until(lambda: command.said.count("Finished server process") == 2, command.said[-2000:])
    for backend in trainers:
        backend.close()  # nobody comes back
    for each in threads:
        each.join(PATIENCE_S)
    assert command.ended() == 0, command.said[-3000:]
    for replica in range(2):
        assert f"replica {replica}: " in command.said.partition("every replica drains")[2]
    assert command.said.count("draining: requests under way are finished") == 2
    assert "path=/v1/supervision status=500" not in command.said
    assert not any(isinstance(end, AssertionError) for end in ends), ends
    assert not folder.exists()
    assert not urls_file.exists()
