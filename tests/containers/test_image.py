"""The CPU image, built and run by docker/build_and_try.py; each line that it prints is a check."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.containers.reading import DOCKER
from tests.pages import ROOT, commands


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_image_does_what_is_promised_of_it(documented: list[str]) -> None:
    ((command,),) = map(commands, documented)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    checks = len(re.findall(r"def check_", (DOCKER / "build_and_try.py").read_text()))
    assert done.stdout.rstrip().endswith(f"{checks} checks passed, 0 failed")
    assert len(re.findall(r"^  ok ", done.stdout, re.MULTILINE)) == checks
