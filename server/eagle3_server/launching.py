"""`launch`: starts the processes that share a target, passes signals on, and ends them together."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

import torch

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.children import READY_FD_VARIABLE, settings_to_json, start_server
from eagle3_server.config import ServerSettings
from eagle3_server.group import LISTEN_FD_VARIABLE

_POLL_S = 0.05
_FOLLOWERS_S = 10.0  # they get to end after the leader

logger = logging.getLogger("eagle3_server")


def launch(settings: ServerSettings) -> int:
    """Run `serve` in `settings.ranks` processes, rank 0 the one that serves; return the exit code.

    Rank 0 gets our SIGTERM and SIGINT as SIGTERM, and sends the others home when it has drained. If
    any ends before that, all are ended, and the code is 1.
    """
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InvalidRequest(
            f"{settings.ranks_flag} takes this host's devices in order: expected --device auto, "
            f"cpu or cuda, got {settings.device}. Choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    devices = torch.cuda.device_count()
    wants_gpus = settings.device == "cuda" or (settings.device == "auto" and devices > 0)
    if wants_gpus and devices < settings.ranks:
        raise InvalidRequest(
            f"{settings.ranks_flag} needs as many GPUs, or --device cpu; this host has {devices}"
        )
    group = _Members(settings)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in handlers:
            signal.signal(number, group.pass_on)
        group.start()
        return group.watch()
    finally:
        group.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Members:
    """The ranks' processes."""

    def __init__(self, settings: ServerSettings) -> None:
        self._size, self._text = settings.ranks, settings_to_json(settings)
        self._members: list[subprocess.Popen[bytes]] = []
        self._signals = 0

    def pass_on(self, _number: int, _frame: FrameType | None) -> None:
        """Note a signal; `watch` sends it to the leader."""
        self._signals += 1

    def start(self) -> None:
        """Start every rank, with a socket on loopback for them to meet at."""
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            for rank in range(self._size):
                self._members.append(self._start(rank, meeting))
        logger.info(
            "ranks 0 to %d are processes %s",
            self._size - 1, ", ".join(str(each.pid) for each in self._members),
        )  # fmt: skip

    def _start(self, rank: int, meeting: socket.socket) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(meeting.getsockname()[1]),
            LISTEN_FD_VARIABLE: str(meeting.fileno()),
        }
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        inherited = [meeting.fileno()] if rank == 0 else []
        if rank == 0 and READY_FD_VARIABLE in environment:
            inherited.append(int(environment[READY_FD_VARIABLE]))
        return start_server(self._text, environment, inherited)

    def watch(self) -> int:
        """Wait for the leader's end, or any other's before it; return the exit code."""
        leader, *followers = self._members
        passed = 0
        while (code := leader.poll()) is None:
            while passed < self._signals:
                leader.send_signal(signal.SIGTERM)
                passed += 1
            for rank, follower in enumerate(followers, 1):
                if follower.poll():
                    logger.critical(
                        "rank %d (process %d) ended with exit code %d: the group cannot go on "
                        "without it, and is ended; its supervisor has to start it again",
                        rank, follower.pid, follower.returncode,
                    )  # fmt: skip
                    return 1
            time.sleep(_POLL_S)
        if code == -signal.SIGTERM and self._signals:  # before it could drain: nothing was served
            return 0
        if code == 0:  # it has sent the others home
            ends = time.monotonic() + _FOLLOWERS_S
            for rank, follower in enumerate(followers, 1):
                try:
                    follower.wait(max(ends - time.monotonic(), 0))
                except subprocess.TimeoutExpired:
                    logger.warning("rank %d did not end after the leader, and is killed", rank)
        return code if code >= 0 else 1

    def kill(self) -> None:
        """End what still runs."""
        alive = [member for member in self._members if member.poll() is None]
        for member in alive:
            member.kill()
        for member in alive:
            member.wait()
