"""Transport: bodies of fixed size from a server process to this one, against a plain socket.

Every server sends a body it made before; a transfer is a whole request, from asking to the last
byte in memory. Run as ``python benchmarks/transport.py``.
"""

from __future__ import annotations

import argparse
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import torch
from common import (
    MIB,
    Target,
    add_output_options,
    markdown_table,
    provenance,
    publish,
    spread,
)
from wire import NO_PEER, PEER, child, has_peer, middle, of_rounds, self_signed
from wire_raw import RawClient

from eagle3_client import connection as connection_module
from eagle3_client.connection import Connection
from eagle3_client.transport import HttpTransport
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.host_buffers import HostBuffers
from eagle3_schemas.protocol import REQUEST_ID_HEADER, SUPERVISION_PATH
from eagle3_schemas.tensors import byte_view

RAW_TCP, RAW_FRESH, RAW_UNIX = "raw TCP", "raw TCP, a fresh buffer each", "raw Unix socket"
OURS = {"TCP": "ours, TCP", "Unix": "ours, Unix socket", "TLS": "ours, TLS"}
CHECKED = " + checksum"
FLOORS = {"TCP": 1.0, "Unix": 1.7}
Cases = dict[str, Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    add_output_options(parser)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.mib, arguments.rounds = [1, 4], 2
    results: dict[str, Any] = {
        "provenance": provenance("transport.py", words),
        "rounds": {},
        "verdicts": [],
    }
    tables: list[str] = []
    notes: list[str] = []
    with ExitStack() as stack:
        connections = connect(stack, arguments.mib, notes)
        for mib in arguments.mib:
            rounds = measure(cases(connections, mib), arguments.rounds)
            results["rounds"][str(mib)] = rounds
            tables.append(table(rounds, mib))
            results["verdicts"] += verdicts(rounds, mib)
    results["notes"] = notes
    verdict = markdown_table(["what", "measured", "target", ""], results["verdicts"])
    parts = [verdict, READING, *notes, *tables]
    publish(arguments.out, "transport", "Transport", results, parts)
    return 0


READING = (
    "`raw` is a loop of `recv_into` into one buffer, from `sendall` in another process; *a fresh "
    "buffer each* is the same loop into memory that was never touched, as any client needs that "
    "hands the body out. Ours is `Connection.supervise`, from request to tensors that are views "
    "of the body, without and with the check of its checksum; the server's checksum was taken "
    "before. `/ raw TCP` is throughput as a ratio, round by round: above 1 is faster. CPU is the "
    "whole client process's."
)


def connect(stack: ExitStack, sizes: Sequence[int], notes: list[str]) -> dict[str, Any]:
    """Start the servers and connect to each; what is missing here is noted and left out."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    mib = ["--mib", *map(str, sizes)]
    sockets = {kind: folder / kind for kind in ("raw", "frame")}
    raw, ours = (
        stack.enter_context(child("wire_servers.py", kind, *mib, "--unix-socket", str(path)))[
            "port"
        ]
        for kind, path in sockets.items()
    )
    found: dict[str, Any] = {
        RAW_TCP: stack.enter_context(RawClient(raw, max(sizes))),
        RAW_UNIX: stack.enter_context(RawClient(sockets["raw"], max(sizes))),
        OURS["TCP"]: our_client(f"http://127.0.0.1:{ours}"),
        OURS["Unix"]: our_client(f"unix://{sockets['frame']}"),
    }
    if (files := self_signed(folder)) is None:
        notes.append("No `openssl` command here to make a certificate: no TLS row.")
    else:
        tls = ["--certificate", str(files[0]), "--key", str(files[1])]
        port = stack.enter_context(child("wire_servers.py", "frame", *mib, *tls))["port"]
        trust = ssl.create_default_context(cafile=str(files[0]))
        found[OURS["TLS"]] = our_client(
            f"https://127.0.0.1:{port}", HttpTransport(ssl_context=trust)
        )
    for connection in found.values():
        stack.callback(connection.close)
    found["httpx"] = stack.enter_context(
        httpx.Client(base_url=f"http://127.0.0.1:{ours}", trust_env=False, timeout=60)
    )
    if has_peer():
        from nemo_automodel.components.speculative.eagle.remote.client import _ServerClient

        stack.enter_context(mock.patch.dict("os.environ", NEMO_EAGLE_ENABLE_NCCL="0"))
        port = stack.enter_context(child("wire_servers.py", "peer_body", *mib))["port"]
        found[PEER] = _ServerClient(f"http://127.0.0.1:{port}", timeout=60, max_retries=0)
    else:
        notes.append(NO_PEER + ".")
    return found


def our_client(url: str, transport: httpx.BaseTransport | None = None) -> Connection:
    return Connection(url, token=None, timeout_s=60, buffers=HostBuffers(), transport=transport)


def cases(connections: dict[str, Any], mib: int) -> Cases:
    """Return what transfers one body, by name."""
    raw = connections[RAW_TCP]
    found: Cases = {
        RAW_TCP: partial(raw.receive, mib),
        RAW_FRESH: partial(raw.receive_into_fresh, mib),
        RAW_UNIX: partial(connections[RAW_UNIX].receive, mib),
    }
    question = encode({}, {})
    unchecked = partial(decode, verify=False)

    def supervise(connection: Connection) -> object:
        return connection.supervise(question, str(mib))

    def supervise_unchecked(connection: Connection) -> object:
        with mock.patch.object(connection_module, "decode", unchecked):
            return connection.supervise(question, str(mib))

    for name in OURS.values():
        if name in connections:
            found[name] = partial(supervise_unchecked, connections[name])
            found[name + CHECKED] = partial(supervise, connections[name])
    http, content = connections["httpx"], question.to_bytes()
    post = {"url": SUPERVISION_PATH, "headers": {REQUEST_ID_HEADER: str(mib)}, "content": content}
    buffer = torch.empty((mib + 1) * MIB, dtype=torch.uint8)

    def httpx_iter_raw() -> None:
        view, received = byte_view(buffer), 0
        with http.stream("POST", **post) as response:
            for chunk in response.iter_raw():
                view[received : received + len(chunk)] = chunk
                received += len(chunk)

    found["httpx `.content`"] = lambda: http.post(**post).content
    found["httpx `iter_raw` into one buffer"] = httpx_iter_raw
    if PEER in connections:
        peer, name = connections[PEER], str(mib).encode()
        found["peer: `requests`"] = lambda: peer.request("generate", name)
        found["peer: `requests` + its decode"] = lambda: peer.generate(name)
    return found


def measure(cases: Cases, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time the cases in turns, each once unmeasured before; also this process's CPU time."""
    measured: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu_seconds": []} for name in cases
    }
    for number in range(rounds + 1):
        for name, case in cases.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            result = case()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            del result
            if number:
                measured[name]["seconds"].append(seconds)
                measured[name]["cpu_seconds"].append(cpu_seconds)
    return measured


def speeds(rounds: dict[str, dict[str, list[float]]], name: str, base: str) -> list[float]:
    """Throughput of a case over that of another, round by round."""
    pairs = zip(rounds[base]["seconds"], rounds[name]["seconds"], strict=True)
    return [below / above for below, above in pairs]


def table(rounds: dict[str, dict[str, list[float]]], mib: int) -> str:
    lines = []
    for name, measured in rounds.items():
        gigabytes = [mib * MIB / seconds / 1e9 for seconds in measured["seconds"]]
        cpu = [seconds * 1e3 for seconds in measured["cpu_seconds"]]
        ratio = middle(speeds(rounds, name, RAW_TCP))
        lines.append([name, middle(gigabytes), ratio, middle(cpu, 0)])
    header = ["transfer", "GB/s", "/ raw TCP", "client CPU ms"]
    count = len(rounds[RAW_TCP]["seconds"])
    return (
        f"{mib} MiB, {count} interleaved rounds, median (range):\n\n{markdown_table(header, lines)}"
    )


def verdicts(rounds: dict[str, dict[str, list[float]]], mib: int) -> list[list[str]]:
    rows = []
    for kind, floor in FLOORS.items():
        found = of_rounds(speeds(rounds, OURS[kind], RAW_TCP))
        what = f"client receive / raw TCP socket loop, {kind}, {mib} MiB"
        target = Target(what, floor, at_least=True)
        within = spread(found, median=False)
        if kind == "Unix":
            limit = of_rounds(speeds(rounds, RAW_UNIX, RAW_TCP))["median"]
            within += f"; a raw Unix socket's {limit:.2f}"
        rows.append(target.row(found["median"], within))
        found = of_rounds(speeds(rounds, OURS[kind] + CHECKED, RAW_TCP))
        what = f"the same + checksum, {kind}, {mib} MiB"
        rows.append([what, spread(found), "-", "no goal of its own"])
    return rows


if __name__ == "__main__":
    sys.exit(main())
