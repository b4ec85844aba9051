"""Targets that self-checks find something wrong with, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eagle3_schemas.self_check import SELF_CHECKS
from eagle3_server import TransformersTarget

Found = dict[str, Any]


@pytest.fixture
def target(build_model: Any) -> TransformersTarget:
    return TransformersTarget(build_model("gemma2"), model_id="tiny")


@pytest.fixture
def check(serve: Any) -> Callable[..., Found]:
    """`check(target)`: what a server of it answers, by the checks' names."""

    def ask(target: Any, **settings: Any) -> Found:
        bridge = serve(target, **settings)
        answer = bridge.app_client.post("/v1/self-check")
        assert answer.status_code == 200, answer.text
        checks = answer.json()["checks"]
        assert tuple(each["name"] for each in checks) == SELF_CHECKS
        return {each["name"]: each for each in checks}

    return ask


def by_status(found: Found, status: str) -> set[str]:
    return {name for name, each in found.items() if each["status"] == status}
