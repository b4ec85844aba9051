"""`Members`: the servers of a fleet: which are well, which is least busy, who joins and leaves."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eagle3_client.connection import Connection
from eagle3_client.failures import is_refused
from eagle3_client.resolve import addresses_of, is_name
from eagle3_schemas.errors import (
    FingerprintMismatch,
    NotReady,
    RemoteEagle3Error,
    TransportError,
)

_FAILURES_TO_EJECT = 2
_MISSES_TO_EJECT = 3
_GOOD_TO_READMIT = 2
_SHORTEST_FULL_S, _LONGEST_FULL_S = 0.1, 5.0

logger = logging.getLogger("eagle3_client")


@dataclass(eq=False)
class Member:
    """One server, and what is known of it. `Members` guards its fields."""

    connection: Connection
    key: tuple[str, str | None]
    """URL, and which of its addresses."""
    busy: int = 0
    failures: int = 0
    """Requests that failed in a row."""
    misses: int = 0
    """Health checks that failed in a row."""
    good: int = 0
    """Health checks that succeeded in a row since it went out."""
    out_since: float | None = None
    reason: RemoteEagle3Error | None = None
    """Why it is out."""
    full_until: float = 0.0
    """When it may have room again, having said that its queue is full."""
    is_gone: bool = False
    """Whether its name no longer resolves to it."""

    @property
    def is_out(self) -> bool:
        """Whether it gets no requests."""
        return self.out_since is not None


class Members:
    """Lends the least busy server that is well. Thread-safe.

    A server goes out when two requests in a row failed (also if it did not compute them in time),
    when three health checks did, when nothing listens, when it is found to serve another target, or
    by its own word that it is not ready; it comes back after two good checks. The only one never
    goes out: its requests are repeated.

    Args:
        urls: of the servers; a name of several addresses stands for as many.
        connect: builds the connection to a URL, at one address or at whichever its host has.
        is_resolved: whether names are looked up here, not by a transport of the caller's.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        connect: Callable[[str, str | None], Connection],
        *,
        is_resolved: bool,
    ) -> None:
        self._urls, self._connect = urls, connect
        self._names = {url for url in urls if is_resolved and is_name(url)}
        self._lock = threading.Lock()
        self._all = [Member(connect(url, None), (url, None)) for url in urls]
        rank = os.environ.get("RANK", "")[-9:]
        # So that ranks begin at different servers.
        self._turn = int(rank) if rank.isascii() and rank.isdigit() else 0

    @property
    def all(self) -> list[Member]:
        """Those whose name, if any, resolves to them."""
        with self._lock:
            return [member for member in self._all if not member.is_gone]

    @property
    def is_watched(self) -> bool:
        """Whether health checks are worth a thread: another server may help, or turn up."""
        return bool(self._names) or len(self._all) > 1

    def take(self) -> Member:
        """Take the one with the fewest requests under way; equals take turns.

        One that said its queue is full is taken only if all did.

        Raises:
            FingerprintMismatch: none is left but such as serve another target.
            TransportError: none can be used now.
        """
        with self._lock:
            members = [member for member in self._all if not member.is_gone]
            well = [member for member in members if not member.is_out]
            if not well:
                raise _nobody(members)
            now = time.monotonic()
            well = [member for member in well if member.full_until <= now] or well
            count = len(well)
            order = [well[(self._turn + i) % count] for i in range(count)]
            member = min(order, key=lambda each: each.busy)
            self._turn = (well.index(member) + 1) % count
            member.busy += 1
            return member

    def give_back(self, member: Member, failure: RemoteEagle3Error | None) -> None:
        """Note that a use ended, and whether it failed in a way that casts doubt on the server."""
        with self._lock:
            member.busy -= 1
            member.failures = 0 if failure is None else member.failures + 1
        if failure is not None and (
            isinstance(failure, NotReady | FingerprintMismatch)
            or is_refused(failure)
            or member.failures >= _FAILURES_TO_EJECT
        ):
            self.eject(member, failure)
        self._drop_gone()

    def note_full(self, member: Member, for_s: float) -> bool:
        """Note that its queue is full; returns whether another one may have room."""
        with self._lock:
            now = time.monotonic()
            member.full_until = now + min(max(for_s, _SHORTEST_FULL_S), _LONGEST_FULL_S)
            return any(
                not (each.is_gone or each.is_out) and each.full_until <= now for each in self._all
            )

    def eject(self, member: Member, reason: RemoteEagle3Error) -> None:
        """Give it no more requests, unless it is the only one."""
        others = [each for each in self.all if each is not member]
        with self._lock:
            if not others or member.is_out:
                return
            member.out_since, member.reason, member.good = time.monotonic(), reason, 0
            left = sum(not each.is_out for each in others)
        logger.warning(
            "%s is out, %d of %d servers are left: %s",
            member.connection.url, left, len(others) + 1, reason.detail,
        )  # fmt: skip

    def check_failed(self, member: Member, reason: RemoteEagle3Error) -> None:
        """Note that a health check failed."""
        with self._lock:
            member.good = 0
            member.misses += 1
            is_out, was = member.is_out, member.reason
            if is_out:
                member.reason = reason
        if is_out:
            if isinstance(reason, FingerprintMismatch) and str(reason) != str(was):
                logger.error("%s stays out: %s", member.connection.url, reason)
            return
        if isinstance(reason, NotReady) or is_refused(reason):
            self.eject(member, reason)
        elif member.misses >= _MISSES_TO_EJECT:
            self.eject(member, reason)
            if member.is_out:
                member.connection.interrupt()  # what it holds would wait for its whole timeout

    def check_succeeded(self, member: Member) -> bool:
        """Note that one succeeded; returns whether the server may come back."""
        with self._lock:
            member.misses = 0
            member.good += 1
            return member.is_out and member.good >= _GOOD_TO_READMIT

    def readmit(self, member: Member) -> None:
        """Give it requests again."""
        with self._lock:
            since, member.out_since, member.failures = member.out_since, None, 0
        if since is not None:
            logger.warning("%s is back after %.1f s", member.connection.url, _since(since))

    def resolve(self, *, is_first: bool = False) -> None:
        """Look names up, and let servers join or leave; a name that fails keeps those it had.

        Args:
            is_first: whether new ones may get requests at once, before they were compared.
        """
        if not self._names:
            return
        wanted: list[tuple[str, str | None]] = []
        for url in self._urls:
            try:
                addresses = addresses_of(url) if url in self._names else (None,)
            except OSError:
                addresses = tuple(each.key[1] for each in self.all if each.key[0] == url)
            wanted += [(url, address) for address in addresses]
        with self._lock:
            for member in self._all:
                member.is_gone = member.key not in wanted
            here = {member.key for member in self._all}
            for key in wanted:
                if key in here:
                    continue
                member = Member(self._connect(*key), key)
                if not is_first:
                    member.out_since = time.monotonic()
                    member.reason = NotReady("new, and not compared yet", url=member.connection.url)
                self._all.append(member)
        self._drop_gone()

    def _drop_gone(self) -> None:
        with self._lock:
            gone = [member for member in self._all if member.is_gone and not member.busy]
            for member in gone:
                self._all.remove(member)
        for member in gone:
            logger.info("%s: its name no longer resolves to it", member.connection.url)
            member.connection.close()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            members = list(self._all)
        for member in members:
            member.connection.close()


def _since(moment: float) -> float:
    return time.monotonic() - moment


def _nobody(members: list[Member]) -> RemoteEagle3Error:
    """Say why no server can be used."""
    reasons = [member.reason for member in members if member.reason is not None]
    if reasons and all(isinstance(reason, FingerprintMismatch) for reason in reasons):
        reasons[0].is_retryable = reasons[0].may_go_elsewhere = False  # nobody is left to ask
        return reasons[0]
    return none_usable([(member, member.reason) for member in members])


def none_usable(members: Sequence[tuple[Member, RemoteEagle3Error | None]]) -> RemoteEagle3Error:
    """Return the error of servers that cannot be used, with each one's reason; of one, its own."""
    if len(members) == 1 and (reason := members[0][1]) is not None:
        return reason
    words = "; ".join(f"{m.connection.url}: {getattr(r, 'detail', '')}" for m, r in members)
    error = TransportError(
        f"none of {len(members)} servers can be used now: {words}. Start one of them, or wait "
        "longer (retry_for_s)"
    )
    error.was_sent = False
    return error
