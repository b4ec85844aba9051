"""`FairQueue`: the work of many clients, in bounded memory, taken in turns."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from queue import Full
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A queue per client, served round robin; first in, first out within one. Thread-safe.

    A client may have as many items waiting as places are left (dynamic thresholds: Choudhury and
    Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998). So one that
    sends all it has takes half of the places, and the next client finds room.

    Args:
        max_items: places, of all clients together.
    """

    def __init__(self, max_items: int) -> None:
        self._max = max_items
        self._count = 0
        self._is_closed = False
        self._turns: OrderedDict[str, deque[Item]] = OrderedDict()  # whose turn is next comes first
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def put(self, client: str, item: Item) -> None:
        """Add an item behind the client's others.

        Raises:
            queue.Full: the client has its share already, or nothing is free.
        """
        with self._changed:
            waiting = self._turns.get(client)
            if (0 if waiting is None else len(waiting)) >= self._max - self._count:
                raise Full
            self._turns.setdefault(client, deque()).append(item)
            self._count += 1
            self._changed.notify()

    def get(self) -> Item | None:
        """Wait for the next item; None when the queue is closed and empty."""
        with self._changed:
            while not self._turns:
                if self._is_closed:
                    return None
                self._changed.wait()
            client, waiting = self._turns.popitem(last=False)
            item = waiting.popleft()
            if waiting:
                self._turns[client] = waiting
            self._count -= 1
            return item

    def remove(self, client: str, item: Item) -> None:
        """Take an item out, if it still waits."""
        with self._changed:
            waiting = self._turns.get(client)
            if waiting is None or item not in waiting:
                return
            waiting.remove(item)
            self._count -= 1
            if not waiting:
                del self._turns[client]

    def close(self) -> None:
        """Let `get` end after what is queued. Safe to repeat."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
