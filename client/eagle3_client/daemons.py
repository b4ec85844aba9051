"""Daemon threads that are ended before the interpreter is, if they end soon.

A daemon thread that still runs Python while the interpreter is finalised is ended wherever it takes
the GIL again. Inside a destructor of torch that ends the process: `terminate called without an
active exception`, exit code 134, after a run that went well.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

_PATIENCE_S = 2.0  # of all together: what hangs must not hold up an exit
_LEAST_S = 0.05  # waited for even when patience is over, so that each has its chance


class Closable(Protocol):
    """What owns daemon threads."""

    def close(self) -> None:
        """Tell them to end; waits for nothing."""


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_owners: weakref.WeakSet[Closable] = weakref.WeakSet()


def start_daemon(target: Callable[..., object], *args: object, name: str) -> threading.Thread:
    """Start a daemon thread that is waited for, a little, at exit."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def close_at_exit(owner: Closable) -> None:
    """Have an owner of such threads closed at exit, if it still lives."""
    _owners.add(owner)


def _end() -> None:
    for owner in list(_owners):
        owner.close()
    deadline = time.monotonic() + _PATIENCE_S
    for thread in list(_threads):
        if thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), _LEAST_S))


def _forget() -> None:
    """After a fork: the threads are the parent's."""
    _threads.clear()
    _owners.clear()


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)
