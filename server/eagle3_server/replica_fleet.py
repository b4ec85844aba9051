"""`Fleet`: servers that Ray places and restarts, and one URL list that stays true.

The command looks at every replica twice a second, passes its log on, and says what changes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from eagle3_server.children import settings_to_json
from eagle3_server.config import ServerSettings
from eagle3_server.ray_cluster import Cluster
from eagle3_server.replica_actor import Report

_LOOK_S = 0.5
_NEWS_S = 15.0  # between two words on a replica that Ray cannot place
_FAILURES = 5  # in a row, of a replica that has served
_SETTLED_S = 60.0  # ready for so long, it is well
_LONGEST_PAUSE_S = 60.0
_STOP_S = 15.0  # beyond a server's own patience

logger = logging.getLogger("eagle3_server")


class _Failed(Exception):
    """Nothing that a restart mends; the message says what."""


@dataclass
class _Seat:
    """One place in the URL list, and the actor that holds it through all its lives."""

    number: int
    actor: Any
    asked: Any = None
    """The actor's next report."""
    asked_at: float = 0.0
    is_here: bool = False
    """Its last report came, so Ray has placed it."""
    runs: bool = False
    """A server runs in it."""
    code: int | None = None
    """Exit code of its last server."""
    pid: int | None = None
    node: str = ""
    url: str = ""
    is_ready: bool = False
    ready_at: float = 0.0
    gone_at: float = 0.0
    failures: int = 0
    """Ends in a row of a server that was not ready, or for less than `_SETTLED_S`."""
    starts_at: float = 0.0
    """Not before then: a pause that grows with the failures."""


class Fleet:
    """All replicas of a command, and what it says of them.

    Args:
        settings: of the command.
        cluster: where they run.
        publish: called with the URLs, comma-separated, when all are ready, and when one has moved.
    """

    def __init__(
        self, settings: ServerSettings, cluster: Cluster, publish: Callable[[str], None]
    ) -> None:
        self._settings, self._cluster, self._ray = settings, cluster, cluster.ray
        self._publish = publish
        assert settings.replicas is not None
        self._seats = [_Seat(k, cluster.actor.remote()) for k in range(settings.replicas)]
        self._fingerprint = self._announced = ""
        self._news_at = time.monotonic() + _NEWS_S
        self._stops_by = 0.0  # when patience ends; 0 while it serves

    def serve(self, signals: Callable[[], int]) -> int:
        """Look after them until a signal or a failure, and drain them; return the exit code.

        Args:
            signals: how many came so far.
        """
        code, passed = 0, 0
        while not (self._stops_by and self._is_over()):
            try:
                self._look()
            except _Failed as exc:
                code = 1
                logger.critical("%s", exc)
                self._stop()
            while passed < signals():
                passed += 1
                self._stop()
        killed = [seat.number for seat in self._seats if seat.runs]
        if killed:
            logger.critical("replicas %s did not end in time, and are killed", killed)
        ends = [seat.code for seat in self._seats]
        return code or int(bool(killed) or not set(ends) <= {None, 0, -signal.SIGTERM})

    # --- one look at all of them ---

    def _look(self) -> None:
        now = time.monotonic()
        for seat in self._seats:
            if seat.asked is None and now >= seat.asked_at + _LOOK_S:
                seat.asked, seat.asked_at = seat.actor.look.remote(), now
        waiting = {seat.asked: seat for seat in self._seats if seat.asked is not None}
        if not waiting:
            time.sleep(_LOOK_S / 4)
            return
        for reference in self._ray.wait(list(waiting), timeout=_LOOK_S)[0]:
            seat = waiting[reference]
            seat.asked = None
            try:
                report = self._ray.get(reference)
            except self._ray.exceptions.ActorUnavailableError:
                logger.warning("replica %d: its actor does not answer; asked again", seat.number)
                seat.asked_at = time.monotonic() + 5 * _LOOK_S
            except self._ray.exceptions.RayActorError as exc:
                self._lost(seat, exc)
            except self._ray.exceptions.RayError as exc:
                raise _Failed(f"replica {seat.number}: {exc}") from exc
            else:
                self._hear(seat, report)
        self._tell_who_waits()

    def _hear(self, seat: _Seat, report: Report) -> None:
        seat.is_here = True
        self._pass_on(seat, report)
        if report["code"] is not None:
            self._ended(seat, report["code"])
        elif report["pid"] is None:
            if seat.runs and not self._stops_by:  # Ray has restarted the actor while it was silent
                self._count(seat, "its actor is gone, and its server with it")
                seat.runs = False
            if not self._stops_by and time.monotonic() >= seat.starts_at:
                told = self._told(seat, report["node"])
                threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
                seat.asked = seat.actor.start.remote(told, threads)
                seat.node, seat.runs, seat.code = report["node"], True, None
        else:
            seat.pid, seat.runs = report["pid"], True
            if report["url"] and not seat.is_ready and not self._stops_by:
                self._ready(seat, report)

    def _told(self, seat: _Seat, node: str) -> str:
        """Return what this replica's server is told; its port stays while it is on its node."""
        port = self._settings.port and self._settings.port + seat.number
        if not port and seat.url and node == seat.node:
            port = int(seat.url.rpartition(":")[2])
        tokens = ",".join(self._settings.tokens())
        return settings_to_json(
            self._settings.model_copy(
                update={
                    "host": self._settings.host if self._cluster.is_local else node,
                    "port": port,
                    "device": self._cluster.device,
                    "token": SecretStr(tokens) if tokens else None,
                    "token_file": None,  # it need not be on every host
                    "replicas": None,
                    "urls_file": None,
                }
            )
        )

    def _pass_on(self, seat: _Seat, report: Report) -> None:
        """Write a replica's log lines to stderr, marked as its."""
        if report["dropped"]:
            logger.warning("replica %d: %d lines were lost", seat.number, report["dropped"])
        for line in report["lines"]:
            if self._settings.log_format == "json" and line.startswith("{"):
                line = f'{{"replica": {seat.number}, {line[1:]}'
            else:
                line = f"replica {seat.number}: {line}"
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    # --- what changes ---

    def _ready(self, seat: _Seat, report: Report) -> None:
        seat.is_ready, seat.ready_at = True, time.monotonic()
        where = f"replica {seat.number} (process {seat.pid} on {seat.node})"
        if report["fingerprint"] != (self._fingerprint or report["fingerprint"]):
            raise _Failed(
                f"{where} has another target than the first: expected fingerprint "
                f"{self._fingerprint}, got {report['fingerprint']}. Give all hosts the same "
                "checkpoint, under one --model-name"
            )
        self._fingerprint = report["fingerprint"]
        if not seat.url:
            logger.info("%s is ready at %s", where, report["url"])
        elif report["url"] == seat.url:
            back = time.monotonic() - seat.gone_at
            logger.info("%s is back at %s after %.1f s", where, seat.url, back)
        else:
            logger.warning("%s has moved from %s to %s", where, seat.url, report["url"])
        seat.url = report["url"]
        if all(each.url for each in self._seats):
            self._announce(",".join(each.url for each in self._seats))

    def _announce(self, urls: str) -> None:
        if urls == self._announced:
            return
        # First: who waits for the line may read the file at once.
        if self._settings.urls_file is not None:
            _write(self._settings.urls_file, urls + "\n")
            logger.info("wrote their URLs to %s", self._settings.urls_file)
        logger.info("ready: trainers use EAGLE3_URLS=%s", urls)
        if self._announced:
            logger.warning("trainers that were given the former URLs need the new ones")
        self._announced = urls
        self._publish(urls)

    def _ended(self, seat: _Seat, code: int) -> None:
        """A server ended: as told, or Ray shall end its actor and start another."""
        seat.runs, seat.code = False, code
        if self._stops_by:
            return
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        what = f"its server (process {seat.pid} on {seat.node}) ended with {how}"
        if not seat.url:
            raise _Failed(
                f"replica {seat.number}: {what} before it was ready; its lines above say why"
            )
        self._count(seat, what)
        self._ray.kill(seat.actor, no_restart=False)

    def _lost(self, seat: _Seat, error: BaseException) -> None:
        """An actor is gone, or not back yet. Its server has gone with it."""
        seat.asked_at = time.monotonic() + 5 * _LOOK_S
        if getattr(error, "actor_init_failed", False):
            raise _Failed(f"replica {seat.number} cannot be started: {error}")
        if seat.runs and not self._stops_by:
            self._count(seat, "its actor is gone, and its server with it")
        seat.is_here = seat.runs = False

    def _count(self, seat: _Seat, what: str) -> None:
        """Note an end that nobody asked for, and when to start again.

        Raises:
            _Failed: it has ended so several times, and there is nobody else to serve meanwhile.
        """
        words = f"replica {seat.number} ({seat.url or 'not ready yet'}): {what}"
        now = time.monotonic()
        # One that dies as soon as it is ready fails as one that never is.
        settled = seat.is_ready and now - seat.ready_at >= _SETTLED_S
        seat.failures = 0 if settled else seat.failures + 1
        if seat.is_ready:
            seat.gone_at, seat.is_ready = now, False
        others_serve = any(each.is_ready for each in self._seats)
        if seat.failures >= _FAILURES and not others_serve:
            raise _Failed(f"{words}, for the {seat.failures}th time, and no other serves")
        pause = min(2.0**seat.failures - 1, _LONGEST_PAUSE_S)
        seat.starts_at = time.monotonic() + pause
        logger.error("%s; Ray starts it again%s", words, f" in {pause:.0f} s" * (pause > 0))

    def _tell_who_waits(self) -> None:
        if time.monotonic() < self._news_at or self._stops_by:
            return
        self._news_at = time.monotonic() + _NEWS_S
        if waiting := [seat.number for seat in self._seats if not seat.is_here]:
            logger.warning(
                "replicas %s wait for Ray to place them; it has free: %s",
                waiting, self._ray.available_resources(),
            )  # fmt: skip

    # --- the end ---

    def _stop(self) -> None:
        if not self._stops_by:
            logger.info("stopping: every replica drains")
            patience = self._settings.drain_delay_s + self._settings.grace_period_s + _STOP_S
            self._stops_by = time.monotonic() + patience
            for seat in self._seats:
                seat.code = None  # how it ended earlier is no matter now
        for seat in self._seats:
            if seat.runs:
                seat.actor.stop.remote()

    def _is_over(self) -> bool:
        return time.monotonic() > self._stops_by or not any(seat.runs for seat in self._seats)


def _write(path: Path, text: str) -> None:
    """Write a file at once: who reads it meanwhile finds the former one, or all of the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
