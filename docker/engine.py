"""What build_and_try.py needs of a container engine: Debian's podman and buildah, or Docker.

podman is used as it works where no Docker engine can run, even inside a container: builds in a
chroot, on the host's network, from a base image that debootstrap makes. Standard library only.
"""

from __future__ import annotations

import configparser
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
BASE = "debian:bookworm-slim"  # what the Dockerfile's stages are FROM
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
_PODMAN_TOOLS = ("buildah", "debootstrap", "podman", "runc")  # commands and Debian's packages
_PIP_FILES = "/mnt/pip"  # where a build sees local files that pip's configuration names


def need(*tools: str) -> None:
    """Install Debian packages whose command of the same name is missing.

    Raises:
        SystemExit: they cannot be installed; it says which and why. Nothing is skipped.
    """
    os.environ["PATH"] += os.pathsep + "/usr/sbin"  # debootstrap and runc are there
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if not missing:
        return
    install = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "--yes", "-q"]
    install += ["--no-install-recommends", *missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(
            f"{', '.join(missing)} not found, and only root of a Debian system can install them; "
            f"run as root: {' '.join(install)}"
        )
    print("  apt-get install", *missing, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    deadline = time.monotonic() + 300  # another apt-get may hold apt's locks
    for command in (["apt-get", "update", "-q"], install):
        while True:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if "Could not get lock" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(1)
        if done.returncode != 0:
            said = (done.stdout + done.stderr)[-2000:]
            raise SystemExit(f"{', '.join(missing)} cannot be installed: {said}")
    still = [tool for tool in missing if shutil.which(tool) is None]
    if still:
        raise SystemExit(
            f"{', '.join(still)} not found though installed; PATH is {os.get_exec_path()}"
        )


class Docker:
    """A Docker engine with BuildKit. It pulls the base image itself."""

    command: tuple[str, ...] = ("docker",)
    hidden_network: tuple[str, ...] = ("--network", "none")
    """Flags of a container that nobody outside reaches."""

    def reachable(self, port: int) -> tuple[str, ...]:
        """Return the flags of a container that this host alone reaches, on a port."""
        return ("--publish", f"127.0.0.1:{port}:8001")

    def build(self, tag: str, torch_index: str, pip_conf: PipConf) -> None:
        """Build the image. It cannot see local files that `pip_conf` names."""
        build = ["docker", "build", "--file", "docker/Dockerfile", "--tag", tag]
        build += ["--build-arg", f"TORCH_INDEX={torch_index}"]
        subprocess.run(
            [*build, "--secret", f"id=pip_conf,src={pip_conf.path}", "."], check=True, cwd=ROOT
        )

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what the engine says of an image or a container."""
        (details,) = json.loads(self.run("inspect", name).stdout)
        return dict(details)

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one of the engine's commands and return what it printed."""
        options = {"check": True, "timeout": 180} | options
        return subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, cwd=ROOT, **options
        )

    def keep(self, tag: str, name: str) -> str:
        """Give the image a name to stay under; returns a command that runs it."""
        self.run("tag", tag, name)
        run = [*self.command, "run", "--rm", *HARDENED, "--tmpfs", "/tmp", *self.reachable(8001)]
        run += ["--env", "EAGLE3_TOKEN", "--volume", '"$PWD/models:/models:ro"']
        return " ".join([*run, "--stop-timeout", "30", name, "/models/smollm2"])

    def save(self, tag: str) -> subprocess.Popen[bytes]:
        """Start to write the image, all layers and its history, as a tar archive to a pipe."""
        return subprocess.Popen([*self.command, "save", tag], stdout=subprocess.PIPE)

    def close(self) -> None:
        """Give back what the engine holds."""


class Podman(Docker):
    """Debian's podman with a store of its own in `folder`; needs root."""

    limits = ("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096")

    def __init__(self, folder: Path) -> None:
        need(*_PODMAN_TOOLS)
        if os.geteuid() != 0:
            raise SystemExit("debootstrap and podman's runs here need root; run this as root")
        self._folder = folder
        self._store = ("--root", str(folder / "store"), "--runroot", str(folder / "run"))
        self.command = ("podman", *self._store)
        # podman would also put writable file systems on /run and /var/tmp.
        self._run_flags = ("--runtime", "runc", *self.limits, "--read-only-tmpfs=false")
        self.hidden_network = (*self._run_flags, "--network", "none")

    def reachable(self, port: int) -> tuple[str, ...]:
        """Return the flags of a container on this host's network, bound to loopback."""
        settings = ("--env", "EAGLE3_HOST=127.0.0.1", "--env", f"EAGLE3_PORT={port}")
        return (*self._run_flags, "--network", "host", *settings)

    def build(self, tag: str, torch_index: str, pip_conf: PipConf) -> None:
        """Make the base image, unless it is there from an earlier call, and build on it."""
        if self.run("image", "exists", BASE, check=False).returncode != 0:
            base = self._folder / "base"
            log = self.run_checked("debootstrap", "--variant=minbase", "bookworm", str(base))
            if not log.rstrip().endswith("Base system installed successfully."):
                raise SystemExit(f"debootstrap failed: {log[-2000:]}")
            archive = self._folder / "base.tar"
            self.run_checked("tar", "-C", str(base), "-cf", str(archive), ".")
            self.run("import", "--quiet", str(archive), BASE)
            archive.unlink()
            shutil.rmtree(base)
        build = ["buildah", *self._store, "bud", "--isolation", "chroot", "--network", "host"]
        build += ["--format", "docker"]  # OCI's own has no health check
        build += ["--pull-never", "--layers", "--file", "docker/Dockerfile"]
        build += ["--build-arg", f"TORCH_INDEX={torch_index}"]
        build += ["--secret", f"id=pip_conf,src={pip_conf.path}"]
        volumes = [f"--volume={path}:{_PIP_FILES}{path}:ro" for path in sorted(pip_conf.folders)]
        # A volume's mount point stays behind as an empty folder, so no stage has one that the final
        # image is made from.
        subprocess.run([*build, "--target", "python", "."], check=True, cwd=ROOT)
        subprocess.run([*build, *volumes, "--target", "wheel", "."], check=True, cwd=ROOT)
        subprocess.run([*build, "--tag", tag, "."], check=True, cwd=ROOT)

    def run_checked(self, *command: str) -> str:
        """Run a command and return its output; end with it if it fails."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-2000:]}")
        return done.stdout

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what podman says of an image or a container, under Docker's names."""
        details = super().inspect(name)
        if "Healthcheck" in details:
            details["Config"]["Healthcheck"] = details["Healthcheck"]
        return details

    def save(self, tag: str) -> subprocess.Popen[bytes]:
        """Start to write the image as Docker does, with its layers uncompressed."""
        save = [*self.command, "save", "--format", "docker-archive", tag]
        return subprocess.Popen(save, stdout=subprocess.PIPE)

    def close(self) -> None:
        """Unmount what is in the store, so that its folder can be removed."""
        subprocess.run(["buildah", *self._store, "rm", "--all"], capture_output=True)
        self.run("rmi", "--all", "--force", check=False)


class PipConf:
    """This machine's configuration of pip, written to a file for a build, and what it names.

    Args:
        path: the file to write.
        comment: goes into it, so that one can look for it in the image.
    """

    def __init__(self, path: Path, comment: str) -> None:
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            capture_output=True,
            text=True,
            check=True,
        )
        written = configparser.RawConfigParser()  # an index's address may hold a %
        # A variable (`:env:.find-links`) wins over a file (`global.find-links`), and comes first.
        for line in reversed(listed.stdout.splitlines()):
            scope, _, option = line.partition(".")
            name, _, value = option.partition("=")
            section = "global" if scope == ":env:" else scope
            written.read_dict({section: {name: literal_eval(value)}})
        values = [value for options in written.values() for value in options.values()]
        words = " ".join(values).split()
        self.path = path
        self.hosts = {urlsplit(word).hostname for word in words if "://" in word} - {None, ""}
        # The links of an index in files lead out of its folder.
        indexes = [urlsplit(word).path for word in words if word.startswith("file://")]
        self.folders = {str(Path(path).parent) for path in indexes}
        self.folders |= {word for word in words if word.startswith("/") and Path(word).exists()}
        for options in written.values():
            for name, value in options.items():
                options[name] = re.sub(r"(^|\s|file://)(?=/)", rf"\g<1>{_PIP_FILES}", value)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"# {comment}\n")
            written.write(file)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def free_port() -> int:
    """Return a TCP port that nobody listens on, below those that Linux gives to who connects."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
