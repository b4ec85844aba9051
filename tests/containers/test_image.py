"""The CPU image, built and run by docker/build_and_try.py; each line that it prints is a check."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from tests.containers.reading import DOCKER


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_image_does_what_is_promised_of_it() -> None:
    command = [sys.executable, str(DOCKER / "build_and_try.py")]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    checks = len(re.findall(r"def check_", (DOCKER / "build_and_try.py").read_text()))
    assert done.stdout.rstrip().endswith(f"{checks} checks passed, 0 failed")
    assert len(re.findall(r"^  ok ", done.stdout, re.MULTILINE)) == checks
