"""The commands of docs/operations.md that serve, as printed, on a tiny target."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.pages import DOCS, ROOT, commands, run_by
from tests.shells import environment, run, serving
from transformers import AutoModelForCausalLM

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import project_to_draft_vocab
from eagle3_server import HFEagle3TargetModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
V = 131
SERVED = [
    command
    for block in run_by("tests/test_commands_of_pages.py::test_a_served_command")
    for command in commands(block)
    if command.startswith("eagle3-remote serve")
]


def as_run(command: str, checkpoint: Path) -> str:
    """Name the model; a server that was not told its port takes a free one, by the variable."""
    assert command.count(" MODEL") == 1
    return command.replace(" MODEL", f" {checkpoint}")


def train_a_step(urls: str, checkpoint: Path) -> None:
    """One batch, against a forward of the whole model here."""
    ids = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    selected, mask = torch.arange(20), torch.arange(V) < 20
    with RemoteEagle3Backend(urls) as target:
        target.set_vocab_mapping(selected, mask)
        got = target.generate_batch(ids, ones, ones)
        quantization = target.model_info().quantization
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = HFEagle3TargetModel(model).generate_batch(ids, ones, ones)
    if quantization is not None:  # another target: tests/quantised compares it with itself
        assert not torch.equal(got.aux_hidden_states, expected.aux_hidden_states)
        return
    assert expected.logits is not None
    probs, position_mask = project_to_draft_vocab(
        expected.logits, selected, mask, expected.loss_mask
    )
    assert got.position_mask is not None
    assert got.target_probs is not None
    assert got.position_mask.equal(position_mask)
    rows = position_mask[..., 0]
    assert rows.any()
    # Two ranks add in another order.
    torch.testing.assert_close(got.target_probs[rows], probs[rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("command", SERVED)
def test_a_served_command(command: str, checkpoint: Path, tmp_path: Path) -> None:
    with serving(as_run(command, checkpoint), tmp_path, EAGLE3_PORT="0") as served:
        train_a_step(served.urls, checkpoint)
        assert served.stop() in (0, 130), served.said


def test_the_extras_that_pages_install_are_there() -> None:
    """Resolved against what `make test-all` installed."""
    lines = {
        command
        for page in DOCS.glob("*.md")
        for command in commands(page.read_text(encoding="utf-8"))
        if command.startswith("pip install")
    }
    assert {'pip install ".[ray]"', 'pip install ".[server,bitsandbytes]"'} <= lines
    for line in sorted(lines):
        offline = f"python -m {line} --dry-run --no-index --no-build-isolation"
        done = run(offline, ROOT)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        assert "does not provide the extra" not in done.stderr, line


def test_replicas(checkpoint: Path, tmp_path: Path) -> None:
    """Two servers by Ray, the file of their URLs, and a trainer that is given it."""
    first, second = run_by("tests/test_commands_of_pages.py::test_replicas")
    _, serve = commands(first)
    (train,) = commands(second)
    (tmp_path / "train.py").write_text(
        "from eagle3_client import RemoteEagle3Backend\n"
        "with RemoteEagle3Backend.from_env() as target:\n"
        "    print(target.fingerprint, target.num_remote_servers)\n"
    )
    serve = f"{as_run(serve, checkpoint)} --device cpu"  # as the page says for a host without GPUs
    variables = {"EAGLE3_PORT": "0", "OMP_NUM_THREADS": "1"}
    with serving(serve, tmp_path, announced="trainers use EAGLE3_URLS=", **variables) as served:
        done = run(train, tmp_path)
        assert done.returncode == 0, done.stderr
        fingerprint, in_flight = done.stdout.split()
        assert len(fingerprint) == 32
        assert in_flight == "4"
        assert (tmp_path / "urls.txt").read_text().strip() == served.urls
        assert served.stop() in (0, 130), served.said
    assert not (tmp_path / "urls.txt").exists()


def test_a_mesh_in_a_trainer(checkpoint: Path, tmp_path: Path, documented: list[str]) -> None:
    """As printed on the CPU, between a reader's batch and what the whole model gives for it."""
    (code,) = documented
    assert code.count('"cuda"') == 2
    assert code.count('"MODEL"') == 1
    code = code.replace('"cuda"', '"cpu"').replace('"MODEL"', repr(str(checkpoint)))
    batch = (
        "import torch\n"
        f"input_ids = torch.arange(2 * 40).reshape(2, 40) % {V}\n"
        "attention_mask = loss_mask = torch.ones_like(input_ids)\n"
    )
    compared = (
        "whole = HFEagle3TargetModel(model).generate_batch(input_ids, attention_mask, loss_mask)\n"
        # The page's bound of aux states, and of logits that of tests/parallel/test_meshes.py.
        "for name, bound in {'aux_hidden_states': 2e-5, 'logits': 5e-5}.items():\n"
        "    got, expected = getattr(batch, name), getattr(whole, name)\n"
        "    error = (got - expected).abs().max() / expected.square().mean().sqrt()\n"
        "    assert error <= bound, (name, error)\n"
        "print('equal')\n"
        "torch.distributed.barrier()\n"
        "import os; os._exit(0)\n"
    )
    (tmp_path / "this.py").write_text(batch + code + compared)
    (line,) = [each for each in code.splitlines() if each.startswith("# torchrun")]
    packages = os.pathsep.join(str(each) for each in ROOT.glob("*/") if list(each.glob("eagle3_*")))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *line.split()[2:]],
        cwd=tmp_path,
        env=environment(PYTHONPATH=packages, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2
