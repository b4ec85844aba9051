"""Where a benchmark's time went: requests that were followed, and what was busy with them.

What bounds a run, the rule. Over the measured part of a cell each of these is busy for a share of
the wall time, counted once however many requests are there at the same moment:

- the trainer: its (simulated) step, which is all but the wait for batches;
- the target: a forward, head or copy of one of our requests is under way on a server;
- the queue: one of our requests waits on a server that works on none of ours, so on others';
- the link: a request travels up, or its answer down;
- this host: a batch is encoded, or an answer is checked and rebuilt on the device.

A trainer that waits for at most 5 % of the time is the bound. Else it is the busiest of the others.
The target is named by the larger of forward, and head with copies. Near 100 % it is full; well
below, requests spend their time in one place after another, and more of them in flight would
overlap that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from eagle3_client.pace import SMALL_SHARE

Span = tuple[float, float]

FULL_SHARE: Final = 0.9
"""Share of the time from which what is busy counts as full."""
_P99_FROM = 100  # requests; of fewer it is hardly another than the largest

PARTS: Final = ("target", "queue", "link", "host")
"""What can be busy besides the trainer; of two as busy the first is named."""
STAGES: Final = ("queue", "compute", "head", "copy")
"""What a server tells of a request; `total` has them and what lies between them."""


@dataclass
class Sample:
    """One request. Times are of one clock that only grows, seconds."""

    tokens: int = 0
    """Attended ones: the sum of `attention_mask`."""
    submitted_at: float = 0.0
    encoded_at: float = 0.0
    url: str = ""
    """Who answered."""
    attempts: int = 0
    asked_at: float = 0.0
    """Of the last attempt, as all that follows."""
    heard_at: float = 0.0
    """When the answer's headers came."""
    received_at: float = 0.0
    done_at: float = 0.0
    """When the batch was rebuilt on the device."""
    sent_bytes: int = 0
    """Of bodies, as all counts of bytes here, in all attempts."""
    received_bytes: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds, as the server's `server-timing` named them."""

    @property
    def latency_s(self) -> float:
        """From the submission to the batch."""
        return self.done_at - self.submitted_at

    def spans(self) -> dict[str, list[Span]]:
        """Return when it was where: by `PARTS`, `queue` whoever was computed meanwhile.

        What the network took of the time before the answer began counts as the way up.
        """
        began_at = max(self.heard_at - self.stages.get("total", 0.0), self.asked_at)
        works_at = self.heard_at - sum(self.stages.get(name, 0.0) for name in STAGES[1:])
        queued_at = works_at - self.stages.get("queue", 0.0)
        return {
            "target": [(began_at, queued_at), (works_at, self.heard_at)],
            "queue": [(queued_at, works_at)],
            "link": [(self.asked_at, began_at), (self.heard_at, self.received_at)],
            "host": [(self.submitted_at, self.encoded_at), (self.received_at, self.done_at)],
        }


@dataclass(frozen=True)
class Visit:
    """One measured part of a cell, from one delivery to another."""

    started_at: float
    ended_at: float
    waited_s: float
    """The part of it that the trainer's thread spent getting batches."""
    delivered: Sequence[Sample]
    """Those of its batches, in order."""
    others: Sequence[Sample] = ()
    """Of batches before and after, which kept something busy too."""

    @property
    def elapsed_s(self) -> float:
        """Its length."""
        return max(self.ended_at - self.started_at, 1e-9)  # a clock may stand still

    @property
    def tokens_per_s(self) -> float:
        """Attended tokens delivered a second."""
        return sum(sample.tokens for sample in self.delivered) / self.elapsed_s

    def busy_s(self) -> dict[str, float]:
        """Return seconds in which each of `PARTS` was busy with a request of ours."""
        found: dict[str, list[Span]] = {part: [] for part in PARTS}
        samples = [*self.delivered, *self.others]
        for url in {sample.url for sample in samples}:
            here: dict[str, list[Span]] = {part: [] for part in PARTS}
            for sample in samples:
                if sample.url == url:
                    for part, spans in sample.spans().items():
                        here[part] += self._inside(spans)
            here["queue"] = _without(union(here["queue"]), union(here["target"]))
            for part in PARTS:
                found[part] += here[part]
        return {part: sum(end - start for start, end in union(found[part])) for part in PARTS}

    def _inside(self, spans: Iterable[Span]) -> list[Span]:
        clipped = [(max(start, self.started_at), min(end, self.ended_at)) for start, end in spans]
        return [(start, end) for start, end in clipped if end > start]


def union(spans: Iterable[Span]) -> list[Span]:
    """Join spans that overlap or touch, in order."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _without(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """Return what `spans` cover and `taken` do not; both joined."""
    left: list[Span] = []
    for start, end in spans:
        for taken_start, taken_end in taken:
            if taken_end <= start or taken_start >= end:
                continue
            if taken_start > start:
                left.append((start, taken_start))
            start = min(taken_end, end)
        if end > start:
            left.append((start, end))
    return left


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile, linear between the two nearest values; of one value, that."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def bound_by(wait_share: float, shares: dict[str, float], stages: dict[str, float]) -> str | None:
    """Name what bounds a cell, by the rule above; None if the servers did not say their times.

    Args:
        wait_share: share of the time that the trainer waited for batches.
        shares: busy share of each of `PARTS`; empty if not known.
        stages: seconds of the requests' stages, summed.
    """
    if wait_share <= SMALL_SHARE:
        return "trainer"
    if not shares:
        return None
    busiest = max(PARTS, key=lambda part: shares[part])
    if busiest == "target":
        rest = stages.get("head", 0.0) + stages.get("copy", 0.0)
        return "target_compute" if stages.get("compute", 0.0) >= rest else "target_head_copy"
    return {"queue": "server_queue", "link": "link", "host": "this_host"}[busiest]


@dataclass(frozen=True)
class Figures:
    """What was measured of a cell; the names have the units, and are the JSON document's."""

    requests: int
    rounds: int
    repeats: int
    """Attempts beyond the first."""
    tokens_per_s: float
    """Attended tokens delivered: the median of the rounds."""
    tokens_per_s_lowest: float
    tokens_per_s_highest: float
    received_bytes_per_token: float
    """Of bodies, for an attended token."""
    sent_bytes_per_token: float
    latency_ms: dict[str, float | None]
    """From submission to the batch: `p50`, `p90`, `p99` (None of fewer than 100), `max`."""
    wait_share: float
    busy_shares: dict[str, float]
    """Share of the wall time in which each part was busy; empty if no server told its times."""
    stages_ms: dict[str, float | None]
    """Medians: `queue`, `compute`, `head`, `copy` as the server said; `send`, from the answer's
    headers to its last byte; `host`, encoding and rebuilding here."""
    bounded_by: str | None

    @classmethod
    def of(cls, visits: list[Visit]) -> Figures:
        """Sum up what was measured."""
        samples = [sample for visit in visits for sample in visit.delivered]
        elapsed_s = sum(visit.elapsed_s for visit in visits)
        tokens = sum(sample.tokens for sample in samples)
        speeds = [visit.tokens_per_s for visit in visits]
        latencies = [1000 * sample.latency_s for sample in samples]
        is_known = all("total" in sample.stages for sample in samples)
        busy = [visit.busy_s() for visit in visits] if is_known else []
        shares = {part: sum(each[part] for each in busy) / elapsed_s for part in PARTS if busy}
        stages = {name: [s.stages[name] for s in samples if name in s.stages] for name in STAGES}
        medians = {name: _median_ms(seconds) for name, seconds in stages.items()}
        stages_s = {name: sum(seconds) for name, seconds in stages.items()}
        medians["send"] = _median_ms([s.received_at - s.heard_at for s in samples])
        medians["host"] = _median_ms(
            [s.encoded_at - s.submitted_at + s.done_at - s.received_at for s in samples]
        )
        wait_share = sum(visit.waited_s for visit in visits) / elapsed_s
        has_p99 = len(samples) >= _P99_FROM
        return cls(
            requests=len(samples),
            rounds=len(visits),
            repeats=sum(sample.attempts - 1 for sample in samples),
            tokens_per_s=statistics.median(speeds),
            tokens_per_s_lowest=min(speeds),
            tokens_per_s_highest=max(speeds),
            received_bytes_per_token=sum(s.received_bytes for s in samples) / tokens,
            sent_bytes_per_token=sum(s.sent_bytes for s in samples) / tokens,
            latency_ms={
                "p50": percentile(latencies, 50),
                "p90": percentile(latencies, 90),
                "p99": percentile(latencies, 99) if has_p99 else None,
                "max": max(latencies),
            },
            wait_share=wait_share,
            busy_shares=shares,
            stages_ms=medians,
            bounded_by=bound_by(wait_share, shares, stages_s),
        )

    @property
    def bound_share(self) -> float | None:
        """Share of the time for which what bounds it is busy; None if not known."""
        if self.bounded_by == "trainer":
            return 1 - self.wait_share
        return max(self.busy_shares.values()) if self.busy_shares else None


def _median_ms(seconds: Sequence[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None
