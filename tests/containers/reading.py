"""How tests read docker/: compose file, manifests, settings and arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from eagle3_server.config import ServerSettings, unknown_variables

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


def run_compose(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    command = ["docker-compose", "--file", str(DOCKER / "compose.yaml"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def manifests() -> dict[str, dict[str, Any]]:
    """All Kubernetes objects, by kind and name."""
    import yaml

    documents = [
        document
        for path in sorted((DOCKER / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]
    found = {f"{each['kind']}/{each['metadata']['name']}": each for each in documents}
    assert len(found) == len(documents) == 5, "two objects have one name"
    return found


def settings_of(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ServerSettings:
    """The server's settings under these variables, each of which it must know."""
    assert unknown_variables(variables) == []
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return ServerSettings()


def parsed_by_the_example(words: Iterable[str]) -> Any:
    """The example trainer's arguments, which must be its own."""
    code = (
        "import sys, train_eagle3; a = train_eagle3.parse_arguments(sys.argv[1:]);"
        "print(a.urls, a.tokenizer, *a.text)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, cwd=ROOT / "examples", capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
