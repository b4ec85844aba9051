"""A TCP proxy that does to a connection what networks do."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Faults:
    """What happens to a connection; may be changed at any time, for the bytes that come then.

    `answer_cut`, `answer_reset`, `answer_flip` count the bytes of the answers of one connection.
    """

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")
    cut_after: int | None = None
    """The answer ends there, as if the server had closed."""
    reset_after: int | None = None
    """A reset there."""
    flip_at: int | None = None
    """That byte of the answer is inverted."""
    is_black_hole: bool = False
    """Nothing comes through, and nobody is told."""


class FaultProxy:
    """Listens on a port of its own and passes everything on to `target`, with faults.

    Args:
        target: host and port.
        faults_of: given a connection's number, returns its faults.
    """

    def __init__(self, target: tuple[str, int], faults_of: Callable[[int], Faults]) -> None:
        self._target, self._faults_of = target, faults_of
        self.connections = 0
        """Since the last `drop`."""
        self._carrying: set[asyncio.Task[None] | None] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._carry, sock=self._listener)
        await self._stop.wait()
        server.close()

    def drop(self) -> None:
        """Close all connections, and count anew: the next one is number 0."""

        async def drop() -> None:
            self.connections = 0
            for task in self._carrying:
                assert task is not None
                task.cancel()

        asyncio.run_coroutine_threadsafe(drop(), self._loop).result(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._stop.set())
        self._thread.join(10)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        faults = self._faults_of(self.connections)
        self.connections += 1
        try:
            upstream = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        self._carrying.add(asyncio.current_task())
        there = asyncio.create_task(self._pipe(reader, upstream[1], faults, is_answer=False))
        back = asyncio.create_task(self._pipe(upstream[0], writer, faults, is_answer=True))
        try:
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (there, back):
                task.cancel()
            upstream[1].close()
            writer.close()
            self._carrying.discard(asyncio.current_task())

    async def _pipe(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        faults: Faults,
        *,
        is_answer: bool,
    ) -> None:
        passed = 0
        while data := await _read(reader):
            while faults.is_black_hole:
                await asyncio.sleep(0.01)
            if faults.latency_s:
                await asyncio.sleep(faults.latency_s)
            if is_answer:
                start, end = passed, passed + len(data)
                if faults.flip_at is not None and start <= faults.flip_at < end:
                    at = faults.flip_at - start
                    data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                for limit, act in ((faults.cut_after, None), (faults.reset_after, _reset)):
                    if limit is not None and end > limit:
                        writer.write(data[: max(limit - start, 0)])
                        if act is not None:
                            act(writer)
                        return
            passed += len(data)
            writer.write(data)
            try:
                await writer.drain()
            except ConnectionError:
                return
            await asyncio.sleep(len(data) / faults.bytes_per_s)


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(1 << 16)
    except ConnectionError:
        return b""


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, what was written but not sent included."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def random_faults(generator: random.Random, largest: int) -> Faults:
    """One of the faults within the first `largest` bytes of answers, on a link of some kind."""
    fault = generator.choice(["cut_after", "reset_after", "flip_at"])
    at = {"cut_after": 2 * largest, fault: generator.randrange(largest)}
    return Faults(
        latency_s=generator.choice([0.0, 0.0, 0.01]),
        bytes_per_s=generator.choice([float("inf"), 5e6]),
        **at,
    )
