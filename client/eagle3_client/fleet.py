"""`Fleet`: servers that were found to serve one and the same target."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.device import receive_buffers
from eagle3_client.draft_heads import DraftHeads
from eagle3_client.members import Member, Members, none_usable
from eagle3_client.sameness import Numbers, ask_numbers, check_same, compare_numbers, name_of
from eagle3_schemas import ModelInfo
from eagle3_schemas.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    NotReady,
    QueueFull,
    RemoteEagle3Error,
    TransportError,
)

_COMPARISONS = 3


@dataclass(frozen=True)
class _Known:
    """What the first server said, which all others must say too."""

    url: str
    info: ModelInfo
    numbers: Numbers | None


class Fleet:
    """Lends connections to servers of one target. Thread-safe.

    Args:
        settings: URLs, token, timeouts.
        transport: httpx transport that all connections use instead of the network's.
    """

    def __init__(self, settings: ClientSettings, transport: httpx.BaseTransport | None) -> None:
        self._settings = settings
        buffers = receive_buffers(settings.device)

        def connect(url: str, address: str | None) -> Connection:
            return Connection(
                url,
                address=address,
                token=settings.token,
                timeout_s=settings.timeout_s,
                buffers=buffers,
                transport=transport,
            )

        self.members = Members(settings.urls, connect, is_resolved=transport is None)
        self.heads = DraftHeads(settings.device, self.check_fingerprint)
        self._lock = threading.Lock()  # held while the servers are first met
        self._known: _Known | None = None

    @property
    def bytes_received(self) -> int:
        """Body bytes received from the servers so far."""
        return sum(member.connection.bytes_received for member in self.members.all)

    @contextmanager
    def lend(self) -> Iterator[Connection]:
        """Lend a connection; how its use ends tells whether the server is well.

        Raises:
            FingerprintMismatch: no server is left but such as serve another target.
            TransportError: no server can be used now.
        """
        member = self.members.take()
        failure: RemoteEagle3Error | None = None
        try:
            yield member.connection
        except (TransportError, NotReady, DeadlineExceeded) as exc:
            failure = exc
            raise
        except QueueFull as exc:
            exc.may_go_elsewhere = self.members.note_full(member, exc.retry_after_s or 0.0)
            raise
        except FingerprintMismatch as exc:
            # It goes out; the others are what they were, and those that are out may come back.
            others = [each for each in self.members.all if each is not member]
            if others:
                failure, exc.is_retryable = exc, True
                exc.may_go_elsewhere = not all(each.is_out for each in others)
            raise
        finally:
            self.members.give_back(member, failure)

    def usable(self) -> list[Connection]:
        """Return the connections of the servers that are well."""
        return [member.connection for member in self.members.all if not member.is_out]

    def model_info(self) -> ModelInfo:
        """Ask every server once what it serves, and compare those that answer.

        Servers that cannot be reached now go out, and are compared when they come back.

        Raises:
            FingerprintMismatch: two servers differ, or one from `expect_fingerprint`.
            TransportError, NotReady: none can be reached.
        """
        if (known := self._known) is not None:
            return known.info
        with self._lock:
            if self._known is None:
                self.resolve()
                self._known = self._meet()
            return self._known.info

    def resolve(self) -> None:
        """Look up names; servers that are found after the first meeting are compared first."""
        self.members.resolve(is_first=self._known is None)

    def check_fingerprint(self, fingerprint: object, url: str) -> None:
        """Raise FingerprintMismatch if a response came from another target than the first."""
        known = self._known
        if known is not None and fingerprint != known.info.fingerprint:
            raise FingerprintMismatch(
                f"expected target {known.info.fingerprint} ({known.info.model_id}); the response "
                f"is from {fingerprint}: the server came back with another model. Serve the same "
                "one, or start a new run",
                url=url,
            )

    def check_instance(self, instance: str | None, connection: Connection) -> None:
        """Compare a server whose answer came from a process that was not compared yet.

        One that was started anew may serve the same target otherwise, and nobody saw it go: behind
        a load balancer, or between two requests. A load balancer may lead each request elsewhere,
        so that the process of the answer is met by luck only.

        Raises:
            FingerprintMismatch: it serves another target, or computes something else.
        """
        known = self._known
        if known is None or instance is None:
            return
        for _ in range(_COMPARISONS):
            if connection.instances.is_compared(instance):
                return
            connection.forget_registered()
            self._compare_with(known, connection)

    def check_health(self, member: Member, timeout_s: float) -> None:
        """Ask a server whether it is ready; let it go out, or come back if it is still the same."""
        try:
            member.connection.check_ready(timeout_s)
            if self.members.check_succeeded(member):
                self._compare(member)
                self.members.readmit(member)
        except RemoteEagle3Error as exc:
            self.members.check_failed(member, exc)

    def close(self) -> None:
        """Close all connections."""
        self.members.close()

    def _meet(self) -> _Known:
        """Ask all servers what they serve, and compare them."""
        met: list[tuple[Member, ModelInfo]] = []
        missing: list[tuple[Member, RemoteEagle3Error]] = []
        for member in self.members.all:
            try:
                met.append((member, member.connection.model_info()))
            except (TransportError, NotReady) as exc:
                if not exc.is_retryable:
                    raise
                missing.append((member, exc))
        if not met:
            raise none_usable(missing)
        connection, info = met[0][0].connection, met[0][1]
        self._check_expected(connection.url, info)
        for member, other in met[1:]:
            check_same(info, connection.url, other, member.connection.url, self._settings)
        known: _Known | None = None
        for member, _ in met:
            connection = member.connection
            try:
                if known is None:
                    numbers = None
                    if self.members.is_watched:
                        numbers = ask_numbers(connection, info, self._settings)
                    known = _Known(connection.url, info, numbers)
                else:
                    self._compare_numbers(known, member)
            except (TransportError, NotReady, DeadlineExceeded, QueueFull) as exc:
                # It says what it serves, but does not compute: it goes out until it does.
                missing.append((member, exc))
                continue
            connection.instances.was_compared()
        if known is None:
            raise none_usable(missing)
        for member, failure in missing:
            self.members.eject(member, failure)
        return known

    def _check_expected(self, url: str, info: ModelInfo) -> None:
        expected = self._settings.expect_fingerprint
        if expected is not None and info.fingerprint != expected:
            raise FingerprintMismatch(
                f"expected the target {expected}; got {info.fingerprint} ({name_of(info)}, "
                f"{info.dtype}). Name, revision, weights, config, dtype, quantization or tokenizer "
                "differ; the name is the checkpoint directory's, unless --model-name keeps it. "
                "Serve the target this run began with, or start a new run",
                url=url,
            )

    def _compare(self, member: Member) -> None:
        """Compare a server that comes back, or is new."""
        if self._known is not None:
            member.connection.forget_registered()
            self._compare_with(self._known, member.connection)

    def _compare_with(self, known: _Known, connection: Connection) -> None:
        info, settings = connection.model_info(), self._settings
        check_same(known.info, known.url, info, connection.url, settings)
        if known.numbers is not None:
            compare_numbers(known.numbers, connection, known.info, settings)
        connection.instances.was_compared()

    def _compare_numbers(self, known: _Known, member: Member) -> None:
        if known.numbers is not None:
            compare_numbers(known.numbers, member.connection, known.info, self._settings)
