"""`Telemetry`: what the server counts: Prometheus metrics, and what bounds the throughput."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from eagle3_schemas.protocol import OPEN_PATHS, PROBE_PATHS
from eagle3_schemas.status import ClientStatus, RecentError, StageStatus
from eagle3_server.record import RequestRecord

Bound = Literal["model", "network", "trainers"]

_STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_MEMORY_S = 60.0
_CLIENTS = 256
_LATENCIES = 256
_REFUSALS = ("limit_exceeded", "queue_full", "not_ready", "deadline_exceeded", "out_of_memory")
_WARN_EVERY_S = 60.0

logger = logging.getLogger(__name__)


@dataclass
class _Client:
    requests: int = 0
    seen: float = 0.0
    draft_vocab_digest: str | None = None


class BoundBy:
    """Tells what the server waits for, as shares of the last minute or so. Thread-safe.

    Time counts for the model while it computes; for the network (and the copies) while it does not
    though a request is open; for the trainers while none is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Bound, float] = dict.fromkeys(get_args(Bound), 0.0)
        self._since = time.monotonic()
        self._open = 0
        self._is_computing = False

    def open(self, change: int) -> None:
        """Note that a request came (1) or went (-1)."""
        with self._lock:
            self._count()
            self._open += change

    def computing(self, is_computing: bool) -> None:
        """Note that the model begins or ends."""
        with self._lock:
            self._count()
            self._is_computing = is_computing

    @contextmanager
    def model(self) -> Iterator[None]:
        """Count the time of the block as the model's."""
        self.computing(True)
        try:
            yield
        finally:
            self.computing(False)

    def shares(self) -> dict[Bound, float]:
        """Return each one's share of the time; they add up to 1."""
        with self._lock:
            self._count()
            total = sum(self._seconds.values())
            return {name: spent / total if total else 0.0 for name, spent in self._seconds.items()}

    def _count(self) -> None:
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        fade = math.exp(-elapsed / _MEMORY_S)
        for name in self._seconds:
            self._seconds[name] *= fade
        name = "model" if self._is_computing else "network" if self._open else "trainers"
        self._seconds[name] += _MEMORY_S * (1 - fade)  # the elapsed time, faded while it passed


class Telemetry:
    """Counts what requests did. `begin` and `end` are called on the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.bound_by = BoundBy()
        self.started = time.monotonic()
        self._next_warning = 0.0
        self._clients: OrderedDict[str, _Client] = OrderedDict()  # the last seen comes last
        self._errors: deque[tuple[float, RequestRecord]] = deque(maxlen=20)
        self._latest: dict[str, deque[float]] = {}
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "eagle3_requests",
            "Requests by path and outcome",
            ["path", "code"],
            registry=self.registry,
        )
        self._refused = Counter(
            "eagle3_rejections", "Requests refused, by reason", ["reason"], registry=self.registry
        )
        self._stages = Histogram(
            "eagle3_stage_seconds", "Seconds a supervision request spent in each stage", ["stage"],
            buckets=_STAGE_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._tokens = Counter(
            "eagle3_tokens", "Positions supervised, by kind: sent (padding included), real "
            "(attention_mask), supervised (loss_mask), trained (position_mask)", ["kind"],
            registry=self.registry,
        )  # fmt: skip
        self._bytes = Counter(
            "eagle3_body_bytes", "Body bytes by direction", ["direction"], registry=self.registry
        )
        for reason in (*_REFUSALS, "max_connections"):
            self._refused.labels(reason)
        for kind in ("sent", "real", "supervised", "trained"):
            self._tokens.labels(kind)
        self.tokens = dict.fromkeys(("sent", "real", "supervised", "trained"), 0)
        self.body_bytes = {"received": 0, "sent": 0}
        self.gauge("eagle3_padding_share", "Share of the sent positions that are padding",
                   lambda: self.shares()[0])  # fmt: skip
        self.gauge("eagle3_draft_vocab_coverage",
                   "Share of the supervised positions whose target argmax is in the draft vocab",
                   lambda: self.shares()[1])  # fmt: skip
        bound = Gauge("eagle3_bound_by", "Share of the last minute spent waiting for each", ["by"],
                      registry=self.registry)  # fmt: skip
        for name in get_args(Bound):
            bound.labels(name).set_function(partial(self._bound_share, name))

    def _bound_share(self, name: Bound) -> float:
        return self.bound_by.shares()[name]

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Export what `value` returns when asked."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def begin(self, record: RequestRecord) -> None:
        """Note a request's arrival."""
        if record.is_service:
            self.bound_by.open(1)

    def end(self, record: RequestRecord, path: str) -> None:
        """Count a request that was answered, or whose client has gone."""
        self._requests.labels(path, record.code).inc()
        if record.is_service:
            self.bound_by.open(-1)
        if record.code in _REFUSALS and path not in PROBE_PATHS:
            self._refused.labels(record.code).inc()
        for direction, count in (("received", record.bytes_received), ("sent", record.bytes_sent)):
            self._bytes.labels(direction).inc(count)
            self.body_bytes[direction] += count
        if record.is_service:
            for stage, seconds in record.stages.items():
                if stage == "send" and record.code != "ok":
                    continue  # a few words
                self._stages.labels(stage).observe(seconds)
                self._latest.setdefault(stage, deque(maxlen=_LATENCIES)).append(seconds)
        if record.tokens is not None:
            for kind in self.tokens:
                count = getattr(record.tokens, kind)
                self.tokens[kind] += count
                self._tokens.labels(kind).inc(count)
            client = self._clients.pop(record.client, None) or _Client()
            client.requests += 1
            client.seen = time.monotonic()
            client.draft_vocab_digest = record.draft_vocab_digest
            self._clients[record.client] = client
            if len(self._clients) > _CLIENTS:
                self._clients.popitem(last=False)
        # Not what a stranger or a probe can fill it with.
        is_known = path not in (*OPEN_PATHS, "unknown")
        if record.code not in ("ok", "client_gone", "unauthorized") and is_known:
            self._errors.append((time.monotonic(), record))

    def shares(self) -> tuple[float, float]:
        """Return the share of padding, and of the supervised positions that are trained on.

        NaN where there were none.
        """
        sent, real, supervised, trained = self.tokens.values()
        return (
            1 - real / sent if sent else math.nan,
            trained / supervised if supervised else math.nan,
        )

    def refused_connection(self) -> None:
        """Count a connection over the limit; the log has a line a minute."""
        self._refused.labels("max_connections").inc()
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + _WARN_EVERY_S
            logger.warning(
                "connections are refused: all of max_connections have a request under way "
                "(EAGLE3_MAX_CONNECTIONS)"
            )

    def stages(self) -> dict[str, StageStatus]:
        """Return what the last requests spent in each stage."""
        found = {}
        for stage, latest in self._latest.items():
            seconds = sorted(latest)
            median, p90 = (seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.9))
            found[stage] = StageStatus(
                requests=len(seconds), median_s=median, p90_s=p90, longest_s=seconds[-1]
            )
        return found

    def clients(self) -> tuple[ClientStatus, ...]:
        """Return the trainers seen last, latest first."""
        now = time.monotonic()
        return tuple(
            ClientStatus(
                client=name,
                requests=client.requests,
                seconds_ago=now - client.seen,
                draft_vocab_digest=client.draft_vocab_digest,
            )
            for name, client in reversed(self._clients.items())
        )

    def errors(self) -> tuple[RecentError, ...]:
        """Return the last errors, latest first."""
        now = time.monotonic()
        return tuple(
            RecentError(
                code=record.code,
                detail=record.detail[:300],
                request_id=record.request_id,
                client=record.client,
                seconds_ago=now - when,
            )
            for when, record in reversed(self._errors)
        )
