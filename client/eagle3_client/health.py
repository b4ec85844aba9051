"""`HealthWatch`: a thread that asks a fleet's servers whether they are well."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from contextlib import suppress

from eagle3_client.daemons import start_daemon
from eagle3_client.fleet import Fleet
from eagle3_client.members import Member

_TICK_S = 0.25
_CHECK_EVERY_S = 5.0
_TIMEOUT_S = 5.0
_FIRST_WAIT_S = 0.25  # of a server that is out, doubled up to
_LONGEST_WAIT_S = 2.0

logger = logging.getLogger("eagle3_client")


class HealthWatch:
    """Checks servers in the background, each on a thread of its own: one that hangs delays none.

    Servers that are well are asked every 5 s, one that went out after 0.25 s and then ever less
    often, to every 2 s; names are looked up every 5 s. Ends with `stop`, or with the fleet.

    Args:
        fleet: whose servers are checked.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = weakref.ref(fleet)
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_started = False

    def start(self) -> None:
        """Begin; safe to repeat."""
        with self._lock:
            if self._is_started:
                return
            self._is_started = True
        start_daemon(_watch, self._fleet, self._signal, name="eagle3-health")

    def stop(self) -> None:
        """End soon; checks under way fail when the fleet closes."""
        self._signal.put(None)


def _watch(ref: weakref.ref[Fleet], signal: queue.SimpleQueue[None]) -> None:
    due: dict[Member, float] = {}
    waits: dict[Member, float] = {}
    under_way: dict[Member, threading.Thread] = {}
    resolve_at = time.monotonic() + _CHECK_EVERY_S
    while True:
        with suppress(queue.Empty):
            signal.get(timeout=_TICK_S)
            return
        fleet = ref()
        if fleet is None:
            return
        now = time.monotonic()
        if now >= resolve_at:
            fleet.resolve()
            resolve_at = now + _CHECK_EVERY_S
        members = fleet.members.all
        for gone in set(due) - set(members):
            del due[gone], waits[gone]
        for member in members:
            is_out = member.is_out
            if not is_out or member.good or member not in waits:
                waits[member] = _FIRST_WAIT_S
            due.setdefault(member, now + _CHECK_EVERY_S)
            if is_out:
                due[member] = min(due[member], now + waits[member])
            if now < due[member] or (member in under_way and under_way[member].is_alive()):
                continue
            if is_out:
                waits[member] = min(2 * waits[member], _LONGEST_WAIT_S)
            due[member] = now + (waits[member] if is_out else _CHECK_EVERY_S)
            under_way[member] = start_daemon(
                fleet.check_health, member, _TIMEOUT_S, name="eagle3-health-check"
            )
        under_way = {member: thread for member, thread in under_way.items() if thread.is_alive()}
        del fleet, members
