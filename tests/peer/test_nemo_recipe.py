"""NeMo AutoModel's recipe as its users start it, on SmolLM2; only its model loader is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from served_target import served_target
from smollm2 import smollm2_checkpoint

pytestmark = pytest.mark.slow
STEPS = 20
TOKEN = "a-token-of-the-tests"


def write_config(folder: Path, kind: str, checkpoint: Path, page: str) -> Path:
    """The recipe's data and sizes, and for `remote` the YAML of docs/integrations.md."""
    data = folder / "chats.jsonl"
    lines = []
    for number in range(STEPS):
        asked = f"What do you know about the number {number}?"
        said = f"It is one more than {number - 1}, and {'odd' if number % 2 else 'even'}. " * 2
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": turns}))
    data.write_text("\n".join(lines))
    remote = yaml.safe_load(page)["recipe_args"]
    assert remote["remote_max_retries"] is None
    sizes = {
        "target_model_name_or_path": str(checkpoint),
        "train_data_path": str(data),
        "output_dir": str(folder / kind),
        "seq_length": 80,
        "micro_batch_size": 1,
        "num_epochs": 1,
        "draft_vocab_size": 2048,
        "ttt_steps": 3,
    }
    config = {
        "dist_env": {"backend": "gloo", "timeout_minutes": 5},
        "recipe_args": sizes | (remote if kind == "remote" else {}),
        "optimizer": {"lr": 1e-3},
    }
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def train(folder: Path, kind: str, checkpoint: Path, page: str, **variables: str) -> list[float]:
    ambient = {k: v for k, v in os.environ.items() if not k.startswith("EAGLE3_")}
    losses = folder / f"{kind}.json"
    command = [sys.executable, str(Path(__file__).with_name("nemo_recipe.py")), kind]
    finished = subprocess.run(
        [*command, str(write_config(folder, kind, checkpoint, page)), str(losses)],
        env={**ambient, **variables, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found: list[float] = json.loads(losses.read_text())
    return found


@pytest.mark.timeout(1200)
def test_the_whole_recipe_cannot_tell_our_remote_target_from_its_own(
    tmp_path: Path, documented: list[str]
) -> None:
    """20 steps through its prefetch loop: losses and the checkpoint it exports, bit for bit.

    The page's Python is what `nemo_recipe.py` runs.
    """
    _, page = documented
    checkpoint = smollm2_checkpoint()
    log = tmp_path / "server.log"
    with served_target(checkpoint, log_file=log, threads=1, token=TOKEN) as url:
        remote = train(tmp_path, "remote", checkpoint, page, EAGLE3_URLS=url, EAGLE3_TOKEN=TOKEN)
    assert len(remote) == STEPS
    assert remote[-1] < remote[0]
    exported = {}
    for kind in ("peer", "ours"):
        assert train(tmp_path, kind, checkpoint, page) == remote, kind
    for kind in ("remote", "peer", "ours"):
        (file,) = (tmp_path / kind).rglob("consolidated/*.safetensors")
        exported[kind] = load_file(file)
    for kind in ("peer", "ours"):
        assert exported[kind].keys() == exported["remote"].keys()
        for name, tensor in exported["remote"].items():
            assert exported[kind][name].equal(tensor), f"{name}, {kind}"
