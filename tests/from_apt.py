"""Programs that tests need and pip has not: found, installed where that can be, else named."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program, from a Debian package if it is missing and this is root.

    Fails the test otherwise, with the command that installs it: it is never skipped.
    """
    command = f"apt-get install --yes --no-install-recommends {package}"
    with (Path(tempfile.gettempdir()) / f"eagle3-tests-apt-{os.geteuid()}.lock").open("w") as lock:
        # Several workers may come here at once, and what another is unpacking is there already.
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = shutil.which(name)
        if found is not None:
            return found
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.fail(f"{name} is not installed, and only root can do it: run `{command}`")
        print(f"{name} is not installed: running `apt-get update && {command}`", flush=True)
        deadline = time.monotonic() + 300
        for step in ("apt-get update --quiet", command):
            while True:
                done = subprocess.run(
                    step.split(),
                    # So asked, Debian starts no service that a package brings.
                    env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                )
                # The tests of the container install too, by the user's own script.
                if "Could not get lock" not in done.stderr or time.monotonic() > deadline:
                    break
                time.sleep(1)
            if done.returncode != 0:
                pytest.fail(f"`{step}` failed, and {name} is needed: {done.stderr[-500:]}")
    found = shutil.which(name)
    assert found is not None, f"{package} has no {name}"
    return found
