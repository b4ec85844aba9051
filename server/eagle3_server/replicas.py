"""`serve --replicas N`: what it refuses, and its beginning and end; `replica_fleet` is between."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import Any

from eagle3_schemas.errors import InvalidRequest
from eagle3_server.config import ServerSettings
from eagle3_server.ray_cluster import is_joined, ray_cluster
from eagle3_server.replica_fleet import Fleet

logger = logging.getLogger("eagle3_server")


def check_replicas(settings: ServerSettings) -> None:
    """Refuse what replicas cannot be told.

    Raises:
        InvalidRequest: it says what was expected.
    """
    if settings.replicas is None:
        if settings.urls_file is not None:
            raise InvalidRequest("--urls-file needs --replicas, of 1 or more")
        return
    last = settings.port + settings.replicas - 1
    if settings.port and last > 65535:
        raise InvalidRequest(
            f"--replicas {settings.replicas} from --port {settings.port} end at port "
            f"{last}: expected 65535 at most. Set a lower --port, or 0 for free ones"
        )
    if settings.unix_socket is not None:
        raise InvalidRequest(
            "--unix-socket names one socket, and every replica would need its own; leave it out, "
            "or run a server for each without --replicas"
        )
    if settings.device_map is not None:
        raise InvalidRequest(
            "--replicas gives each replica a GPU, or --tp of them, and --device-map lays one "
            "target on several: leave one of them out"
        )
    if settings.urls_file is not None and settings.urls_file.is_dir():
        raise InvalidRequest(f"--urls-file {settings.urls_file} is a folder: name a file")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InvalidRequest(
            "--replicas leaves the choice of GPUs to Ray: expected --device auto, cpu or cuda, got "
            f"{settings.device}. Choose among GPUs with CUDA_VISIBLE_DEVICES"
        )
    if "RANK" in os.environ:
        raise InvalidRequest(
            "RANK is set, so this is taken for one of torchrun's ranks, and --replicas starts "
            "processes itself; unset RANK and run the command once, without torchrun"
        )
    if is_joined() and "host" in settings.model_fields_set:
        raise InvalidRequest(
            "on a cluster (RAY_ADDRESS is set) every replica listens on its node's address; got "
            f"--host {settings.host}: leave it out, and unset EAGLE3_HOST"
        )
    folder = None if settings.urls_file is None else settings.urls_file.absolute().parent
    if folder is not None and not os.access(folder, os.W_OK):
        raise InvalidRequest(
            f"--urls-file {settings.urls_file}: {folder} is no folder that can be written to; "
            "make it, or name another"
        )


def serve_replicas(settings: ServerSettings) -> int:
    """Serve with Ray until a signal; returns the process's exit code. In the main thread only.

    SIGTERM and SIGINT drain every replica, and while Ray starts, end it when it has; a second one
    ends them at once.

    Raises:
        InvalidRequest: Ray is missing, cannot be joined, or lacks devices.
    """
    if settings.urls_file is not None:
        settings.urls_file.unlink(missing_ok=True)  # of a former run
    with ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        stdout = sys.stdout
        stack.enter_context(redirect_stdout(_RaySays()))
        with signals.kept():
            cluster = stack.enter_context(ray_cluster(settings))
        signals.listen()  # below Python, Ray has put one in place that aborts three seconds later
        fleet = Fleet(settings, cluster, lambda urls: print(urls, file=stdout, flush=True))
        try:
            return fleet.serve(lambda: signals.count)
        finally:
            if settings.urls_file is not None:
                settings.urls_file.unlink(missing_ok=True)


class _Signals:
    """SIGTERM and SIGINT, counted while it is entered."""

    _NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.count = 0
        self._handlers = [(number, signal.getsignal(number)) for number in self._NUMBERS]

    def __enter__(self) -> _Signals:
        self.listen()
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._handlers:
            signal.signal(number, handler)

    def listen(self) -> None:
        for number in self._NUMBERS:
            signal.signal(number, self._note)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep these handlers, whatever a library puts in their place.

        Ray's raise SystemExit wherever the main thread is: in a destructor, say, where Python
        prints it and goes on, and the signal is lost.
        """
        install = signal.signal

        def install_others(number: Any, handler: Any) -> Any:
            if number in self._NUMBERS:
                return signal.getsignal(number)
            return install(number, handler)

        signal.signal = install_others  # type: ignore[assignment]
        try:
            yield
        finally:
            signal.signal = install

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        signal.alarm(0)  # of Ray's handler, which calls ours if it is the one in place


class _RaySays(io.TextIOBase):
    """What Ray prints, as log records: stdout is for URLs alone."""

    def __init__(self) -> None:
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = re.sub(r"\x1b\[\d*m", "", self._line + text).split("\n")
        for line in filter(str.strip, lines):
            logger.info("Ray: %s", line)
        return len(text)
