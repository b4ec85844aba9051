"""Replicas that cannot start, a command that is killed, and a cluster that is joined."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from tests.ports import free_port
from tests.processes import is_alive, read
from tests.replicas.conftest import PATIENCE_S, V, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_model_that_cannot_load_ends_the_command_with_the_reason(
    other_command: Any, tmp_path: Path
) -> None:
    command = other_command(
        tmp_path / "nothing", "--replicas", 1, "--port", 0, "--device", "cpu",
        "--log-format", "json", "--urls-file", tmp_path / "urls",
    )  # fmt: skip
    wait_until(lambda: len(command.processes()) > 5, "Ray")
    assert command.ended() == 1
    assert '{"replica": 0, "time": ' in command.said
    assert "no such file or directory" in command.said.lower()
    assert "ended with exit code 1 before it was ready; its lines above say why" in command.said
    assert command.said.count("starts it again") == 0
    assert not (tmp_path / "urls").exists()
    assert command.printed == ""


def test_a_command_that_is_killed_takes_all_with_it(other_command: Any, checkpoint: Path) -> None:
    """But for two agents of Ray's, which take a minute to find out; they hold no port to serve."""
    command = other_command(checkpoint, "--replicas", 1, "--port", 0, "--device", "cpu")
    command.wait_for("loading ")
    names = {pid: read(pid, "cmdline") for pid in command.processes()}
    assert len(names) > 6
    command.process.kill()
    command.process.wait(PATIENCE_S)
    killed_at = time.monotonic()
    agents = {pid for pid, name in names.items() if b"Agent" in name}
    assert len(agents) == 2
    wait_until(lambda: not any(map(is_alive, names.keys() - agents)), "something outlives it")
    assert time.monotonic() - killed_at < 30


def test_a_sigterm_while_ray_starts_is_a_clean_end(other_command: Any) -> None:
    command = other_command("model", "--replicas", 1, "--port", 0, "--device", "cpu")
    command.wait_for("starting Ray")
    wait_until(lambda: len(command.processes()) >= 2, "Ray")
    folder = Path(
        next(
            word.partition("=")[2]
            for pid in command.processes()
            for word in read(pid, "cmdline").decode().split("\0")
            if word.startswith(("--session-dir=", "--session_dir="))
        )
    ).parents[1]
    command.process.terminate()
    assert command.ended() == 0, command.said
    assert folder.name.startswith("eagle3-ray-")
    assert not folder.exists()


def test_a_cluster_is_joined_and_left_as_it_was(
    other_command: Any, checkpoint: Path, tmp_path: Path, trainer: Any, check: Any, batch_of: Any
) -> None:
    """Of one node, on loopback, with Ray's own token authentication."""
    token = tmp_path / "ray-token"
    token.write_text("0123456789" * 4)
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ray |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    folder = tempfile.mkdtemp(prefix="eagle3-test-", dir="/tmp")  # Ray's paths must be short
    code, port, log = (
        "from ray.scripts.scripts import main; main()",
        free_port(in_a_row=2),
        tmp_path / "log",
    )
    with log.open("w") as said:
        head = subprocess.Popen(
            [sys.executable, "-c", code, "start", "--head", "--block", f"--port={port}",
             "--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats",
             f"--temp-dir={folder}"],
            stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **ray},
        )  # fmt: skip
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text(), "no cluster")
        command = other_command(
            checkpoint, "--replicas", 1, "--port", 0, "--device", "cpu",
            **ray, RAY_ADDRESS=f"127.0.0.1:{port}",
        )  # fmt: skip
        command.wait_for("trainers use EAGLE3_URLS=")
        inputs, backend = batch_of(V, (12, 9, 5)), trainer(command.urls, token=None)
        check(backend.generate_batch(*inputs), inputs)
        # As the command has OMP_NUM_THREADS: Ray sets 1 in an actor of one CPU.
        assert backend.model_info().num_threads == 2
        server = command.server_of(0)
        command.process.terminate()
        assert command.ended() == 0, command.said
        wait_until(lambda: not is_alive(server), "the server outlives its command")
        assert head.poll() is None, "the cluster is others' too"
    finally:
        head.terminate()
        try:
            head.wait(60)
        finally:
            head.kill()
            shutil.rmtree(folder, ignore_errors=True)
