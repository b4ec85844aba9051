"""Replicas that cannot start, a command that is killed, and a cluster that is joined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.replicas.conftest import PATIENCE_S, V, is_alive, wait_until

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
    command = other_command(checkpoint, "--replicas", 1, "--port", 0, "--device", "cpu")
    command.wait_for("loading ")
    assert len(command.processes()) > 6
    command.process.kill()
    command.process.wait(PATIENCE_S)
    command.wait_until_gone()


def test_a_cluster_is_joined_and_left_as_it_was(
    other_command: Any, checkpoint: Path, tmp_path: Path, trainer: Any, check: Any, batch_of: Any
) -> None:
    """Of one node, on loopback, with Ray's own token authentication."""
    token = tmp_path / "ray-token"
    token.write_text("0123456789" * 4)
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ray |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    code = "from ray.scripts.scripts import main; main()"
    head = subprocess.Popen(
        [sys.executable, "-c", code, "start", "--head", "--block", "--port=0", "--num-cpus=1",
         "--include-dashboard=false", "--disable-usage-stats",
         f"--temp-dir={tmp_path / 'r'}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **ray},
        start_new_session=True,
    )  # fmt: skip
    said = ""
    try:
        assert head.stdout is not None
        for line in head.stdout:
            said += line
            if "--address=" in line:
                break
        address = said.rpartition("--address='")[2].partition("'")[0]
        command = other_command(
            checkpoint, "--replicas", 1, "--port", 0, "--device", "cpu",
            **ray, RAY_ADDRESS=address,
        )  # fmt: skip
        command.wait_for("trainers use EAGLE3_URLS=")
        inputs = batch_of(V, (12, 9, 5))
        check(trainer(command.urls, token=None).generate_batch(*inputs), inputs)
        server = command.server_of(0)
        command.process.terminate()
        assert command.ended() == 0, command.said
        wait_until(lambda: not is_alive(server), "the server outlives its command")
        assert head.poll() is None, "the cluster is others' too"
    finally:
        head.terminate()
        assert head.stdout is not None
        said += head.stdout.read()
        head.wait(PATIENCE_S)
        head.stdout.close()
