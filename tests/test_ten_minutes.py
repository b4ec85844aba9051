"""The README leads from nothing to a training run: its commands, as printed, in a fresh copy."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.pages import ROOT, commands
from tests.ports import free_port
from tests.shells import run, serving

sys.path.insert(0, str(ROOT / "examples"))
try:
    from smollm2 import smollm2_checkpoint
finally:
    sys.path.remove(str(ROOT / "examples"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LINE = re.compile(r"^  (ok|FAILED|skipped) +(\w+(?: \w+)*)", re.MULTILINE)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a clone would have, and the weights that the first command would download."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():  # not one that is deleted and not committed
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "clone" / name)
    models = tmp_path / "clone" / "models"
    models.mkdir()
    (models / "smollm2").symlink_to(smollm2_checkpoint(), target_is_directory=True)
    return tmp_path / "clone"


def test_the_readme_leads_from_nothing_to_a_training_run(copy: Path, documented: list[str]) -> None:
    """With the versions of constraints.txt, so that torch's is the one that is there already."""
    install, serve, train = ("\n".join(commands(block)) for block in documented)
    port = str(free_port())
    for script in (serve, train):
        assert "8001" in script
    serve, train = serve.replace("8001", port), train.replace("8001", port)
    constraints = str(copy / "constraints.txt")
    python = Path(sys.base_prefix) / "bin" / "python3"
    install = install.replace("python3 -m venv", f"{shlex.quote(str(python))} -m venv")
    started = time.monotonic()
    done = run(install, copy, PIP_CONSTRAINT=constraints, PIP_QUIET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"installed after {time.monotonic() - started:.0f} s")
    with serving(f". .venv/bin/activate\n{serve}", copy):
        print(f"served after {time.monotonic() - started:.0f} s")
        said = ""
        for command in train.splitlines():
            first, *_ = train.splitlines()
            done = run(command if command is first else f"{first}\n{command}", copy)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            print(f"after {time.monotonic() - started:.0f} s: {command}\n{done.stdout}")
            said += done.stdout
    losses = [float(loss) for loss in re.findall(r"^step \d/5  loss (\S+)", said, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    draft = torch.load(copy / "draft.pt")
    assert draft["config"]["eagle_aux_hidden_state_layer_ids"] == [2, 15, 27]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SmolLM2, under the name that the README's examples have."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "smollm2-135m-instruct").symlink_to(smollm2_checkpoint(), target_is_directory=True)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "draft").mkdir()
    layer_inputs = {"eagle_aux_hidden_state_layer_ids": [1, 15, 27]}
    (folder / "draft" / "config.json").write_text(json.dumps(layer_inputs))
    with serving("eagle3-remote serve smollm2-135m-instruct --port 0", folder) as served:
        yield served.urls


def test_what_check_and_verify_print(
    url: str, documented: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same lines in the same order with the same outcome; numbers are the machine's."""
    folder = tmp_path_factory.getbasetemp() / "served0"
    printed = {
        " ".join(command.split()[:2]): block for block in documented for command in commands(block)
    }
    assert list(printed) == ["eagle3-remote check", "eagle3-remote verify"]
    for block in printed.values():
        (command,) = commands(block)
        shown, count = re.subn(r"http://127\.0\.0\.1:\d+", url, command)
        assert count == 1
        done = run(shown, folder)
        assert LINE.findall(done.stdout) == LINE.findall(block), done.stdout + done.stderr
        assert LINE.findall(block)
        assert done.returncode == ("FAILED" in block), done.stderr


def test_what_bench_prints(
    url: str, documented: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same table: cells, columns and figures' places; numbers are the machine's."""
    (block,) = documented
    (command,) = commands(block)
    shown, count = re.subn(r"http://127\.0\.0\.1:\d+", url, command)
    assert count == 1
    done = run(f"{shown} --steps 2 --json", tmp_path_factory.getbasetemp() / "served0")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    cells = [(cell["encoding"], cell["prefetch"]) for cell in report["cells"]]
    printed = re.findall(r"^  (logits|hidden) +(\d) .*%$", block, re.MULTILINE)
    assert cells == [(encoding, int(depth)) for encoding, depth in printed]
    text = run(f"{shown} --steps 2", tmp_path_factory.getbasetemp() / "served0").stdout
    heads = [line for line in block.splitlines() if re.match(r"  (encoding|ms) ", line)]
    assert len(heads) == 2
    for line in heads:
        assert line.split() in [each.split() for each in text.splitlines()]
