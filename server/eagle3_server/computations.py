"""`Computations`: the work under way, and who waits for it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from eagle3_schemas.errors import DeadlineExceeded, InvalidRequest

Result = TypeVar("Result")

PASSED = (
    "the deadline the client gave passed before the answer was ready; it asked for too little "
    "time, or the server has too many clients: raise timeout_s, or add servers"
)


@dataclass(frozen=True)
class Identity:
    """What makes a repeated request the same one."""

    token: str
    request_id: str
    body_digest: bytes

    @classmethod
    def of(cls, request: Request, request_id: str, body: bytes | bytearray) -> Identity:
        """Return that of a request: its token, its id, and what it asks for where."""
        digest = hashlib.blake2b(request.url.path.encode())
        digest.update(body)
        return cls(request.headers.get("authorization", ""), request_id, digest.digest())


@dataclass
class _Computation:
    body_digest: bytes
    task: asyncio.Task[Any]
    waiting: int = 0


class Computations:
    """Runs coroutines that several requests may wait for. Used on the event loop alone.

    One that nobody waits for any more is cancelled: what still queues is never computed.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], _Computation] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def result(
        self,
        start: Callable[[], Coroutine[Any, Any, Result]],
        identity: Identity,
        receive: Receive,
        deadline: float | None,
    ) -> Result:
        """Join the computation of this identity, or start it, and wait for its result.

        Args:
            start: makes the coroutine that computes.
            identity: a request with the same token, id and body joins; finished ones are forgotten.
            receive: of the request; its disconnect ends the wait.
            deadline: `time.monotonic()` at which the wait ends, or None.

        Raises:
            InvalidRequest: the id is in use with another body.
            DeadlineExceeded: the deadline passed.
            ClientDisconnect: nobody is there to answer.
            RemoteEagle3Error: what the computation raised.
        """
        # Else the idle compute thread may have it before the wait finds that it is too late.
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded(PASSED)
        key = (identity.token, identity.request_id)
        computation = self._running.get(key)
        if computation is None:
            task = asyncio.create_task(start())
            # Its failure may come when nobody waits any more.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            computation = self._running[key] = _Computation(identity.body_digest, task)
        elif computation.body_digest != identity.body_digest:
            raise InvalidRequest(
                f"request id {identity.request_id} is being computed for another body; give every "
                "request an id of its own, and a repeat the same body"
            )
        computation.waiting += 1
        left = asyncio.create_task(_until_disconnect(receive))
        try:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            await asyncio.wait(
                {computation.task, left}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if computation.task.done():
                result: Result = computation.task.result()
                return result
            if left.done():
                raise ClientDisconnect
            raise DeadlineExceeded(PASSED)
        finally:
            left.cancel()
            computation.waiting -= 1
            if not computation.waiting:
                computation.task.cancel()
                del self._running[key]


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
