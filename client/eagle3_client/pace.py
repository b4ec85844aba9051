"""How long a trainer waits for its target, and how deep a prefetch should be for that."""

from __future__ import annotations

from dataclasses import dataclass

from eagle3_schemas.errors import InvalidRequest

SMALL_SHARE = 0.05  # of a step: less is noise, and not worth another batch of memory
_WARM_UP_STEPS = 4  # compilation, first allocations and the start of a loader are no steady state
_WINDOW_STEPS = 8
_FIRST_PAUSE_STEPS = 100
_MOST_IN_FLIGHT_PER_SERVER = 8


@dataclass(frozen=True)
class PrefetchStats:
    """What a prefetch's consumer waited for so far; `str()` says it in a line.

    A step is from the delivery of one batch to that of the next, so the first batch ends none.

    Attributes:
        steps: steps so far.
        step_s: seconds of all steps together.
        wait_s: those of them spent waiting for the target.
        source_s: those of them spent waiting for the caller's iterable.
        last_wait_s: seconds the last step waited for the target.
        first_wait_s: seconds from the first `next` to the first batch, which fills the pipeline.
        depth: requests in flight now.
    """

    steps: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0
    source_s: float = 0.0
    last_wait_s: float = 0.0
    first_wait_s: float = 0.0
    depth: int = 0

    @property
    def wait_share(self) -> float:
        """Share of the steps' time spent waiting for the target, 0 to 1."""
        return self.wait_s / self.step_s if self.step_s else 0.0

    @property
    def source_share(self) -> float:
        """Share of the steps' time spent waiting for the caller's iterable, 0 to 1."""
        return self.source_s / self.step_s if self.step_s else 0.0

    @property
    def bottleneck(self) -> str:
        """`target`, `batches` (the caller's iterable), or `trainer`, which waited for neither."""
        if max(self.wait_share, self.source_share) <= SMALL_SHARE:
            return "trainer"
        return "target" if self.wait_share >= self.source_share else "batches"

    def __str__(self) -> str:
        if not self.steps:
            return f"no step yet; first batch after {self.first_wait_s:.2f} s"
        return (
            f"the {self.bottleneck} {'are' if self.bottleneck == 'batches' else 'is'} the "
            f"bottleneck: of {self.steps} steps' {self.step_s:.2f} s the trainer waited "
            f"{self.wait_s:.2f} s ({self.wait_share:.0%}) for the target and {self.source_s:.2f} s "
            f"({self.source_share:.0%}) for batches, at depth {self.depth}; first batch after "
            f"{self.first_wait_s:.2f} s"
        )


class Depth:
    """How many requests a prefetch keeps in flight; grows while the trainer waits.

    The rule. After 4 steps of warm-up, windows of at least 8 steps are looked at (a multiple of the
    depth, since answers may come in bursts of that many). When the trainer waited for the target
    more than 5 % of a window, the depth grows by one, and the next window begins when the requests
    of the former depth are delivered. It judges the growth: if the wait fell by less than 5 % of a
    step, growing brings nothing: the target is at its limit, and more depth only costs memory.
    (From d to d + 1 a step can shorten by 1 / (d + 1) at best: half of that is enough if it is
    less.) Then the last growth is taken back and the depth stays, for 100 steps at first and twice
    as long each time: the target may have been slow for a passing reason. So it ends at the
    smallest depth that helps.

    Not thread-safe: it belongs to one prefetch.

    Args:
        start: depth at first.
        most: depth never exceeded; equal to `start`, the depth is fixed.
    """

    def __init__(self, start: int, most: int) -> None:
        self.current = start
        self._most = most
        self._pause_steps = _FIRST_PAUSE_STEPS
        self._wanted_wait_s: float | None = None  # a step's at most, while a growth is on trial
        self._look_after(_WARM_UP_STEPS)

    def note(self, wait_s: float, step_s: float) -> None:
        """Take one step's wait for the target and its whole time; maybe change the depth."""
        if self._skip_steps:
            self._skip_steps -= 1
            return
        self._steps += 1
        self._wait_s += wait_s
        self._step_s += step_s
        if self._steps < _WINDOW_STEPS or self._steps % self.current:
            return
        wait_s, step_s = self._wait_s / self._steps, self._step_s / self._steps
        wanted_s, self._wanted_wait_s = self._wanted_wait_s, None
        skip_steps = 0
        if wanted_s is not None and wait_s > wanted_s:
            self.current -= 1
            skip_steps, self._pause_steps = self._pause_steps, 2 * self._pause_steps
        elif wait_s > SMALL_SHARE * step_s and self.current < self._most:
            self.current += 1
            self._wanted_wait_s = wait_s - min(SMALL_SHARE, 0.5 / self.current) * step_s
            skip_steps = self.current
        self._look_after(skip_steps)

    def _look_after(self, skip_steps: int) -> None:
        """Begin a window once that many steps have passed."""
        self._skip_steps = skip_steps
        self._steps, self._wait_s, self._step_s = 0, 0.0, 0.0


def choose_depth(depth: object, servers: int, max_in_flight: int | None) -> Depth:
    """Return the `Depth` for `prefetch`'s argument: an int >= 1, or "auto".

    "auto" starts at 1 and ends at `max_in_flight`, or else at 8 a server.

    Raises:
        InvalidRequest: neither, or more than `max_in_flight`.
    """
    if depth == "auto":
        return Depth(1, max_in_flight or _MOST_IN_FLIGHT_PER_SERVER * servers)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise InvalidRequest(f"depth must be an int >= 1 or 'auto'; got {depth!r}")
    if max_in_flight is not None and depth > max_in_flight:
        raise InvalidRequest(
            f"depth must be at most the backend's max_in_flight, {max_in_flight}; got {depth}. "
            "Raise max_in_flight, or leave it out: prefetch then sends what its depth needs"
        )
    return Depth(depth, depth)
