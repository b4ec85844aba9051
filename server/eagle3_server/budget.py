"""`Budget`: so much of something may be in flight at a time, and no client takes it all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from eagle3_schemas.errors import LimitExceeded, QueueFull


class Budget:
    """Counts what is in flight. Thread-safe.

    A client that holds some may take no more than what it holds leaves free, as in `FairQueue`.

    Args:
        total: how much may be in flight.
        unit: what is counted, for messages.
        setting: name of the limit, for messages.
    """

    def __init__(self, total: int, unit: str, setting: str) -> None:
        self.total, self._unit, self._setting = total, unit, setting
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self.in_flight = 0

    @contextmanager
    def reserve(self, client: str, amount: int, *, own: int = 0) -> Iterator[None]:
        """Hold an amount for the time of a `with` block; `own` is what the request holds already.

        Raises:
            LimitExceeded: more than there is in all.
            QueueFull: more than is free for this client now.
        """
        if amount + own > self.total:
            raise LimitExceeded(
                f"{self.total} {self._unit} may be in flight ({self._setting}), and this request "
                f"alone takes {amount + own}. Send smaller batches, or raise the limit on the "
                f"server (EAGLE3_{self._setting.upper()})"
            )
        with self._lock:
            free = self.total - self.in_flight
            held = self._held[client] - own
            if held + amount > free and (held or amount > free):
                raise QueueFull(
                    f"{self.in_flight} of {self.total} {self._unit} are in flight "
                    f"({self._setting}), {held} of them for this client, and {amount} more do not "
                    "fit; repeat later, keep fewer requests in flight, or raise the limit "
                    f"(EAGLE3_{self._setting.upper()})",
                    retry_after_s=1.0,
                )
            self.in_flight += amount
            self._held[client] += amount
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= amount
                self._held[client] -= amount
                if not self._held[client]:
                    del self._held[client]
