"""The two example commands as a user runs them, on the real target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    from served_target import served_target
    from smollm2 import smollm2_checkpoint
finally:
    sys.path.remove(str(EXAMPLES))

pytestmark = pytest.mark.slow


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_demo_reports_equal_losses_and_draws_them(tmp_path: Path) -> None:
    sizes = {"steps": 3, "batch-size": 2, "sequence-length": 48, "held-out-batches": 2}
    flags = [part for name, size in sizes.items() for part in (f"--{name}", size)]
    output = run_example("demo.py", *flags, "--report-dir", tmp_path)
    assert "yes, all 3 steps, bit for bit" in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["losses_equal"] is True
    assert report["remote_losses"] == report["colocated_losses"]
    assert report["response_bytes_per_token"] > 3 * 576 * 4  # the aux hidden states alone
    assert 0.5 < report["coverage"] < 1
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_trainer_command_trains_on_a_file_against_a_server(tmp_path: Path) -> None:
    checkpoint = smollm2_checkpoint()
    corpus, saved = tmp_path / "corpus.txt", tmp_path / "draft.pt"
    corpus.write_text("The server answers, and the trainer learns from what it says. " * 40)
    with served_target(checkpoint, log_file=tmp_path / "server.log", threads=1) as url:
        output = run_example(
            "train_eagle3.py",
            *("--urls", url, "--tokenizer", checkpoint, "--text", corpus, "--output", saved),
            *("--steps", 6, "--batch-size", 1, "--sequence-length", 64, "--device", "cpu"),
            *("--draft-vocab-size", 64),
        )
    *lines, stats, _saved = output.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/6" for step in range(1, 7)]
    losses = [float(line.split()[3]) for line in lines]
    assert losses[-1] < losses[0]
    assert "bottleneck: of 5 steps'" in stats
    draft = torch.load(saved)
    assert draft["config"]["eagle_aux_hidden_state_layer_ids"] == [2, 15, 27]  # layer inputs
    assert draft["selected_token_ids"].tolist()[:3] == [1, 2, 0]  # special tokens
