"""What is in docker/, as the tools of Docker and Kubernetes read it."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from tests.containers.reading import DOCKER, run_compose


@pytest.fixture(scope="session")
def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def port(dockerfile: str) -> int:
    """The port that the image's server listens on."""
    (found,) = re.findall(r"EAGLE3_PORT=(\d+)", dockerfile)
    assert f"EXPOSE {found}\n" in dockerfile
    return int(found)


@pytest.fixture(scope="session")
def uid(dockerfile: str) -> int:
    """The image's user, a number: Kubernetes cannot tell otherwise that it is not root."""
    (found,) = re.findall(r"^USER (\d+):\1$", dockerfile, re.MULTILINE)
    return int(found)


@pytest.fixture(scope="session")
def need() -> Any:
    """`need("tool")`: installs a Debian package, or fails with which and why."""
    sys.path.insert(0, str(DOCKER))
    try:
        from engine import need
    finally:
        sys.path.remove(str(DOCKER))
    return need


@pytest.fixture(scope="session")
def compose(need: Any) -> dict[str, Any]:
    """The compose file as docker-compose understands it: merged and filled in."""
    import yaml

    need("docker-compose")
    done = run_compose("config", EAGLE3_MODEL="some/model")
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = yaml.safe_load(done.stdout)
    return loaded
