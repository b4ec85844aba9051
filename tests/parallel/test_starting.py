"""What a group refuses before it starts, and how its processes meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.parallel.conftest import PATIENCE_S, GroupServer
from tests.processes import listening

pytestmark = pytest.mark.slow


def test_what_cannot_be_loaded_ends_all_of_it_with_the_reason(tmp_path: Path) -> None:
    server = GroupServer(tmp_path / "nothing", "--tp", 2, "--port", 0, "--device", "cpu")
    try:
        assert server.ended() != 0
        assert "no such file or directory" in server.said
    finally:
        server.close()


REFUSED: list[tuple[dict[str, str], tuple[str, ...], str]] = [
    ({"RANK": "0"}, (), "expected RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (), "numbers"),
    ({}, ("--device", "cuda"), "needs as many GPUs, or --device cpu; this host has 0"),
    ({}, ("--device", "cuda:1"), "expected --device auto, cpu or cuda, got cuda:1"),
    ({"EAGLE3_GROUP_TIMEOUT_S": "inf"}, (), "setting group_timeout_s"),
    ({"EAGLE3_TP": "0"}, (), "setting tp "),
    ({}, ("--cp", "2"), "--tp 2 and --cp 2 cannot be had together"),
    ({"EAGLE3_TP": "1"}, ("--cp", "2", "--device", "cuda"), "--cp 2 needs as many GPUs"),
    ({"EAGLE3_TP": "1"}, ("--device", "cuda:1"), "--device cuda:1 needs a GPU, and torch"),
    ({}, ("--quantization", "bnb-nf4"), "quantised weights cannot be sharded"),
    ({}, ("--device-map", "auto"), "--tp 2 runs a target in several processes"),
    ({}, ("--replicas", "2", "--device-map", "auto"), "--tp 2 runs a target in several processes"),
    (
        {"EAGLE3_TP": "1"},
        ("--replicas", "2", "--device-map", "auto"),
        "--replicas gives each replica a GPU",
    ),
]


@pytest.fixture(scope="module")
def refusals(checkpoint: Path) -> list[tuple[int, str]]:
    """How each of `REFUSED` ended: exit code and words."""
    cases = [
        ({"EAGLE3_TP": "2", **variables}, [str(checkpoint), "--port", "0", *arguments])
        for variables, arguments, _ in REFUSED
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.parallel.refusals"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert finished.returncode == 0, finished.stderr
    return [(code, words) for code, words in json.loads(finished.stdout)]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[each[2] for each in REFUSED])
def test_what_cannot_be_is_refused_in_words_before_anything_starts(
    refusals: list[tuple[int, str]], number: int
) -> None:
    code, said = refusals[number]
    assert code == 2
    assert REFUSED[number][2] in said
    assert "are processes" not in said


def test_modules_of_the_current_directory_are_not_imported(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "uvloop.py").write_text("raise SystemExit('imported from the current directory')")
    here = os.pathsep.join(
        str(Path(each).resolve()) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    )
    server = GroupServer(
        checkpoint, "--tp", 2, "--port", 0, "--device", "cpu", cwd=tmp_path, PYTHONPATH=here
    )
    try:
        assert server.url, server.said
        server.process.terminate()
        assert server.ended() == 0
    finally:
        server.close()


def test_it_meets_on_loopback_alone(group_server: GroupServer) -> None:
    """Whatever listens of rank 0 and its followers: torch's own store would on every interface."""
    addresses = listening(group_server.ranks)
    assert addresses
    assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}
