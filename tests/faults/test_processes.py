"""Trainers that are processes of their own, and ranks that depend on each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.conftest import PATIENCE_S
from tests.ports import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRAINERS, STEPS = 8, 20


def start(program: list[str], **variables: str) -> subprocess.Popen[str]:
    ambient = {name: value for name, value in os.environ.items() if "EAGLE3_" not in name}
    return subprocess.Popen(
        [sys.executable, *program],
        env={**ambient, "OMP_WAIT_POLICY": "PASSIVE", **variables},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_eight_trainers_on_two_servers_train_as_beside_their_target(
    server: Any, undisturbed: Any, draft_ids: Any, tmp_path: Path
) -> None:
    urls = ",".join(server().url for _ in range(2))
    expected, trainers = [], []
    for number in range(TRAINERS):
        inputs, losses = undisturbed(STEPS, seed=number)
        expected.append(losses)
        given, written = tmp_path / f"given-{number}", tmp_path / f"losses-{number}"
        torch.save(([tuple(each) for each in inputs], draft_ids), given)
        arguments = ["-m", "tests.faults.trainer", urls, str(given), str(written)]
        trainers.append((start(arguments, RANK=str(number)), written))
    for process, _ in trainers:
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, said
    assert [json.loads(written.read_text()) for _, written in trainers] == expected


RANK = """
import torch
import tests.training_page as page
from tests.pages import run_by

block = run_by("tests/faults/test_processes.py::test_a_rank_without_supervision_ends_the_others")
page.run(block, dict(
    selected_token_ids=torch.arange(20), selected_token_mask=torch.arange(131) < 20,
    batches=page.batches(400), step=page.ddp_step,
))
print("finished")
"""


def test_a_rank_without_supervision_ends_the_others(server: Any) -> None:
    """Rank 1's only server is killed; rank 0, whose server lives, waits for it in a collective."""
    servers = [server(), server()]
    port = str(free_port())
    ranks = [
        start(
            ["-c", RANK], RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port, EAGLE3_URLS=servers[rank].url, PAGE_RETRY_FOR_S="3",
        )
        for rank in range(2)
    ]  # fmt: skip
    said = ["", ""]

    def read(rank: int) -> None:
        with ranks[rank].stdout or nullcontext([]) as lines:
            for line in lines:
                said[rank] += line

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + PATIENCE_S
    while not all("step 5" in text for text in said) and time.monotonic() < deadline:
        time.sleep(0.05)
    servers[1].kill()
    killed = time.monotonic()
    codes = [each.wait(PATIENCE_S) for each in ranks]
    print(f"both ranks ended {time.monotonic() - killed:.1f} s after the kill")
    for reader in readers:
        reader.join(PATIENCE_S)
    assert all(codes), said
    assert time.monotonic() - killed < 30
    assert "rank=1" in said[1]
    assert "no more supervision" in said[1]
    assert "finished" not in said[0] + said[1]
