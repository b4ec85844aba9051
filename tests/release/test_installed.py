"""The distribution as users get it: built, and installed where nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.pages import PAGES, ROOT
from tests.shells import PATIENCE_S, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BUILD = "import sys, hatchling.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

TRAINER = """
import json, sys, torch
from eagle3_client import RemoteEagle3Backend
assert not [name for name in ("transformers", "fastapi", "starlette") if name in sys.modules]
ids = torch.arange(2 * 9).reshape(2, 9) % 131
ones = torch.ones_like(ids)
with RemoteEagle3Backend(sys.argv[1], exact=True, encoding="probs") as target:
    target.set_vocab_mapping(torch.arange(20), torch.arange(131) < 20)
    with target.prefetch([(ids, ones, ones)] * 3) as prefetch:
        batches = [batch for _, batch in prefetch]
print(json.dumps([batch.aux_hidden_states.double().sum().item() for batch in batches]))
"""


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` of a tree."""
    subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)], check=True, cwd=source,
        capture_output=True,
    )  # fmt: skip
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, unpacked."""
    packed = build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


class Environment:
    """A virtual environment with one requirement, in the versions that the tests run with."""

    def __init__(self, folder: Path, requirement: str) -> None:
        self.folder, self.bin = folder, folder / "env" / "bin"
        venv.EnvBuilder(with_pip=True).create(folder / "env")
        self.pip("install", requirement)

    def pip(self, *arguments: str) -> str:
        """Run its pip; torch's version is the one that is at hand."""
        environment = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
        command = [self.bin / "python", "-m", "pip", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of it in an empty folder, without the caller's paths."""
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        ambient = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.bin / command[0], *command[1:]], cwd=empty, env={**ambient, "COLUMNS": "80"},
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip


@pytest.fixture(scope="module")
def client_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("client"), str(wheel))


@pytest.fixture(scope="module")
def whole(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("whole"), f"{wheel}[server]")


def names(environment: Environment) -> set[str]:
    listed = json.loads(environment.pip("list", "--format", "json"))
    return {each["name"].lower() for each in listed}


def test_the_client_comes_without_the_servers_packages(client_alone: Environment) -> None:
    found = names(client_alone)
    assert {"eagle3-remote", "torch", "httpx", "msgpack", "pydantic", "typer"} <= found
    assert not found & {"transformers", "fastapi", "starlette", "uvicorn", "tokenizers", "numpy"}
    assert "No broken requirements" in client_alone.pip("check")


def test_the_client_alone_says_what_serving_needs(client_alone: Environment) -> None:
    done = client_alone.run("eagle3-remote", "serve", "MODEL")
    assert done.returncode == 2
    assert "eagle3-remote[server]" in done.stdout + done.stderr
    assert client_alone.run("eagle3-remote", "--help").returncode == 0


def test_a_client_alone_trains_on_what_a_whole_install_serves(
    client_alone: Environment, whole: Environment, checkpoint: Path, tmp_path: Path, wheel: Path
) -> None:
    """The page comes too: it is no module, and lies in the wheel."""
    import httpx

    assert "No broken requirements" in whole.pip("check")
    command = f"{whole.bin / 'eagle3-remote'} serve {checkpoint} --port 0"
    with serving(f"cd {tmp_path}\nunset PYTHONPATH\n{command}", tmp_path) as served:
        checked = client_alone.run("eagle3-remote", "check", served.urls)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        done = client_alone.run("python", "-I", "-c", TRAINER, served.urls)
        assert done.returncode == 0, done.stderr
        page = httpx.get(served.urls).text
    sums = json.loads(done.stdout)
    assert sums[0] == sums[1] == sums[2] == expected(checkpoint)
    with zipfile.ZipFile(wheel) as archive:
        assert page == archive.read("eagle3_server/page.html").decode()


def expected(checkpoint: Path) -> float:
    """The same sum of the same layers' outputs, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(2 * 9).reshape(2, 9) % 131
    with torch.no_grad():
        states = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    aux = torch.cat([states.hidden_states[layer + 1] for layer in (1, 2, 3)], dim=-1)
    return float(aux.double().sum().item())


def test_what_is_installed_lies_below_three_names(client_alone: Environment) -> None:
    done = client_alone.run(
        "python", "-c",
        "import importlib.metadata as m; print(*{p.parts[0] for p in m.files('eagle3-remote')})",
    )  # fmt: skip
    tops = {top for top in done.stdout.split() if not top.endswith(".dist-info")}
    assert tops - {".."} == {"eagle3_schemas", "eagle3_client", "eagle3_server"}


def test_an_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    def contents(path: Path) -> dict[str, Any]:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    assert contents(build("wheel", sdist, tmp_path)) == contents(wheel)


def test_an_sdist_has_what_the_tests_and_the_pages_need(sdist: Path) -> None:
    """Every file that is versioned, but for the history's own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    there = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert set(listed) - there == set()
    for page in PAGES:
        assert page.relative_to(ROOT).as_posix() in there
