"""`Replica`: the Ray actor that runs one ordinary server as a process of its own.

Ray is sent this class by value (see `ray_cluster`), so it uses the standard library and Ray alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import deque
from typing import IO, TypedDict

from eagle3_server.children import READY_FD_VARIABLE, start_server

_KEPT_LINES = 2000  # of a server's log, between two looks
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAST_WORDS_S = 2.0  # a rank that outlives its server may keep the log's pipe open


class Report(TypedDict):
    """What an actor knows of its server.

    Attributes:
        node: address of the actor's node.
        pid: of the server; None before `start`.
        url: as trainers use it, empty before it is ready.
        fingerprint: of the target, empty before it is ready.
        code: the server's exit code, negative for a signal; None while it runs.
        lines: of its log, since the last report.
        dropped: lines before them that nobody asked for in time.
    """

    node: str
    pid: int | None
    url: str
    fingerprint: str
    code: int | None
    lines: list[str]
    dropped: int


class Replica:
    """One server process on the node where Ray put this actor; it ends with the actor (Linux).

    Ray calls the methods one at a time, on the actor's main thread; none of them waits for the
    server.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._read_lines = self._told_lines = 0
        self._ready_fd = -1
        self._ready = ""

    def start(self, settings: str, variables: dict[str, str | None]) -> Report:
        """Start the server.

        Args:
            settings: of `settings_to_json`. An argument of a method and not of the constructor,
                which Ray would keep in its tables, tokens included.
            variables: that it gets beside this node's; None takes one away.
        """
        assert self._server is None, "an actor starts one server in its life"
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _TORCHRUN and not name.startswith(("EAGLE3_", "RAY_"))
        }
        for name, value in variables.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        self._ready_fd, writing = os.pipe()
        os.set_blocking(self._ready_fd, False)
        environment[READY_FD_VARIABLE] = str(writing)
        self._server = start_server(settings, environment, [writing], stderr=subprocess.PIPE)
        os.close(writing)
        assert self._server.stderr is not None
        self._reader = threading.Thread(target=self._read, args=[self._server.stderr], daemon=True)
        self._reader.start()
        return self.look()

    def _read(self, log: IO[bytes]) -> None:
        for line in log:
            self._lines.append(line.decode(errors="replace").rstrip("\n"))
            self._read_lines += 1

    def look(self) -> Report:
        """Say what there is to know now; at once."""
        import ray

        code = None
        if self._server is not None:
            code = self._server.poll()
            self._read_ready()
        if code is not None and self._reader is not None:
            self._reader.join(_LAST_WORDS_S)
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        read = self._read_lines
        dropped = max(read - self._told_lines - len(lines), 0)
        self._told_lines += dropped + len(lines)
        ready = json.loads(self._ready) if self._ready.endswith("\n") else {}
        return {
            "node": ray.util.get_node_ip_address(),
            "pid": None if self._server is None else self._server.pid,
            "url": ready.get("url", ""),
            "fingerprint": ready.get("fingerprint", ""),
            "code": code,
            "lines": lines,
            "dropped": dropped,
        }

    def _read_ready(self) -> None:
        while not self._ready.endswith("\n"):
            try:
                data = os.read(self._ready_fd, 4096)
            except BlockingIOError:
                return
            if not data:
                return
            self._ready += data.decode()

    def stop(self) -> None:
        """Send the server a SIGTERM: it drains; at once at the second."""
        if self._server is not None:
            self._server.terminate()
