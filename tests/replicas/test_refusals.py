"""What `--replicas` refuses, in words, before anything starts; Ray is not needed for it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eagle3_client.cli import app


@pytest.fixture(autouse=True)
def _an_environment_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes variables out of its own, and puts some there for Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", kept)


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--replicas", "0"], {}, "setting replicas (EAGLE3_REPLICAS)"),
        (["--urls-file", "urls"], {}, "--urls-file needs --replicas"),
        (["--replicas", "2", "--urls-file", "absent/urls"], {}, "is no folder that can be written"),
        (["--replicas", "2", "--port", "65535"], {}, "end at port 65536"),
        (["--replicas", "2", "--unix-socket", "a"], {}, "every replica would need its own"),
        (["--replicas", "2", "--device", "cuda:1"], {}, "auto, cpu or cuda, got cuda:1"),
        (["--replicas", "2"], {"RANK": "0"}, "unset RANK"),
        (["--replicas", "2", "--host", "0.0.0.0"], {}, "export EAGLE3_TOKEN="),
        (
            ["--replicas", "2", "--host", "127.0.0.1"],
            {"RAY_ADDRESS": "127.0.0.1:6379"},
            "every replica listens on its node's address; got --host 127.0.0.1",
        ),
        (
            ["--replicas", "2"],
            {"RAY_ADDRESS": "ray://127.0.0.1:10001"},
            "Run the command on a node of the cluster",
        ),
    ],
    ids=[
        "none", "urls-file", "folder", "ports", "unix-socket", "device", "torchrun", "wide", "host",
        "ray-client",
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(
    arguments: list[str],
    variables: dict[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    os.environ.update(variables)
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    result = CliRunner().invoke(app, ["serve", "model", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("address", ["", "127.0.0.1:6379"])
def test_without_ray_it_says_what_to_install(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    os.environ["RAY_ADDRESS"] = address
    result = CliRunner().invoke(app, ["serve", "model", "--replicas", "2", "--device", "cpu"])
    assert result.exit_code == 2
    assert "--replicas needs Ray (ray is missing)" in result.stderr
    assert 'pip install "eagle3-remote[ray]"' in result.stderr
