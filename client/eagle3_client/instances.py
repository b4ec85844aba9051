"""`Instances`: which processes answered at one URL, and which of them were compared."""

from __future__ import annotations

import threading


class Instances:
    """Names of server processes, as `x-eagle3-instance` gives them. Thread-safe."""

    def __init__(self) -> None:
        self.last: str | None = None
        """Who answered last."""
        self.is_balanced = False
        """Whether processes answer in turns, as behind a load balancer."""
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._compared: set[str] = set()

    def note(self, instance: str | None, last_at_sending: str | None) -> None:
        """Note who answers; None if the server does not say.

        Who answered last when the request was sent is old news if another answered since: its
        process may have ended, and only this answer came late.
        """
        if instance is None or instance == self.last:
            return
        with self._lock:
            if instance == last_at_sending and instance in self._seen:
                return
            self.is_balanced = self.is_balanced or instance in self._seen
            self._seen.add(instance)
            self.last = instance

    def is_compared(self, instance: str) -> bool:
        """Whether that process was compared with the fleet's others, or met first."""
        with self._lock:
            return instance in self._compared

    def was_compared(self) -> None:
        """Note that the process that answered last was compared."""
        with self._lock:
            if self.last is not None:
                self._compared.add(self.last)
