"""How much of a target's time is left when it is served: a simulated GPU at 8B dimensions.

A batch of 2048 tokens takes 80 or 320 ms of sleep on the server (`simulated.py`); bare is the same
call in a loop without any server. Run as ``python benchmarks/overlap.py``; six minutes on two
idle cores. Needs nemo-automodel 0.7.0 (``make test-all`` installs it).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from children import HERE, OUR_READY_PATH, PEER_READY_PATH, server
from common import (
    Seconds,
    Target,
    add_output_options,
    in_flight,
    markdown_table,
    provenance,
    publish,
    ratio,
    spread,
)
from fixed_target import FixedTarget
from head_model import ModelShape, draft_vocab, make_batch
from simulated import LENGTH, SHAPE, rebuild_elsewhere, simulated_job, simulated_target

from eagle3_client import RemoteEagle3Backend
from eagle3_server.engine import SupervisionJob
from text import TokenBatch

DEPTHS, CLIENTS = (1, 2, 4), 8
QUICK = ModelShape(64, SHAPE.layers, 1000, 100), 64
PATHS = {"ours": OUR_READY_PATH, "peer": PEER_READY_PATH, "peer-projecting": PEER_READY_PATH}


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_output_options(parser)
    parser.add_argument("--milliseconds", type=int, nargs="+", default=[80, 320])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=2.5, help="ours, of one case")
    parser.add_argument("--peer-batches", type=int, default=2, help="of one case and client")
    arguments = parser.parse_args(words)
    shape, length = QUICK if arguments.quick else (SHAPE, LENGTH)
    if arguments.quick:
        arguments.milliseconds, arguments.rounds, arguments.round_seconds = [20], 2, 0.1
    rebuild_elsewhere()
    results: dict[str, Any] = {"provenance": provenance("overlap.py", words), "seconds": {}}
    lines, rows = [], []
    for milliseconds in arguments.milliseconds:
        seconds = measure(shape, length, milliseconds / 1000, arguments)
        results["seconds"][str(milliseconds)] = seconds
        lines += table(seconds, milliseconds)
        rows += verdicts(seconds, milliseconds)
    results["verdicts"] = rows
    tokens = shape.batch_size * length
    parts = [
        f"Seconds per batch are those between deliveries, B {shape.batch_size}, T {length}, "
        f"H {shape.hidden_size}, V {shape.vocab_size}, D {shape.draft_vocab_size}, bf16, "
        f"{shape.supervised:.0%} supervised, `hidden` rows; {arguments.rounds} interleaved rounds, "
        "median (range); the peer's slowest cases once. All clients share one process, the server "
        "has another. No client rebuilds probabilities from `hidden` rows: a trainer's GPU does "
        "that in a millisecond. Copying results to host memory and their checksums, which a GPU "
        "does beside the CPU, do take time of this CPU. The peer's projection onto the draft vocab "
        "is simulated as part of the sleep; `peer-projecting` runs its own on this CPU. The peer's "
        "recipe prefetches one batch a server, whatever it is told.",
        markdown_table(
            ["simulated", "path", "clients", "prefetch", "ms/batch", "bare / served", "tokens/s"],
            [[*line[:-1], f"{tokens / line[-1]:,.0f}"] for line in lines],
        ),
        markdown_table(["what", "measured", "target", ""], rows),
    ]
    publish(arguments.out, "overlap", "Overlap on a simulated GPU", results, parts)
    return 0


def measure(
    shape: ModelShape, length: int, sleep_s: float, arguments: argparse.Namespace
) -> Seconds:
    """Time the cases in turns: seconds a batch in each round, or in the first round alone."""
    batch, vocab = make_batch(shape, length), draft_vocab(shape)
    ours = max(round(arguments.round_seconds / sleep_s), 4)
    target, job = simulated_target(shape, sleep_s), simulated_job(batch, vocab)
    target.supervise(job)  # makes what it gives from then on
    with ExitStack() as stack:
        fleets: dict[str, list[Any]] = {}
        for path in PATHS:
            url = stack.enter_context(simulated_server(path, shape, length, sleep_s))
            count = 1 if path == "peer-projecting" else CLIENTS
            clients = [stack.enter_context(connect(path, url, vocab)) for _ in range(count)]
            for client in clients if path == "ours" else clients[:1]:
                client.generate_batch(*batch)  # fetches the head's rows, opens the connection
            fleets[path] = clients
        cases: dict[str, Callable[[], float]] = {"bare": partial(bare, target, job, ours)}
        once: dict[str, Callable[[], float]] = {}  # what takes the peer half a minute
        for path, clients in fleets.items():
            count = ours if path == "ours" else arguments.peer_batches
            alone = {
                name(path, 1, depth): partial(served, clients[:1], batch, depth, count)
                for depth in ((1,) if path == "peer-projecting" else DEPTHS)
            }
            (once if path == "peer-projecting" else cases).update(alone)
            if len(clients) > 1:
                each = max(2 * count // CLIENTS, 2)
                case = partial(served, clients, batch, 1, each)
                (cases if path == "ours" else once)[name(path, CLIENTS, 1)] = case
        seconds: Seconds = {case: [] for case in (*cases, *once)}
        for number in range(arguments.rounds):
            for case, run in (cases if number else {**cases, **once}).items():
                seconds[case].append(run())
                print(f"{case}: {1000 * seconds[case][-1]:,.1f} ms a batch", file=sys.stderr)
    return seconds


def bare(target: FixedTarget, job: SupervisionJob, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        target.supervise(job)
    return (time.perf_counter() - started) / count


def served(clients: Sequence[Any], batch: TokenBatch, depth: int, count: int) -> float:
    """Return seconds per batch in the steady state: between two deliveries, far apart.

    Args:
        clients: each on a thread of its own.
        batch: asked for again and again.
        depth: requests each keeps in flight.
        count: batches of each client between the two.
    """
    times: list[float] = []
    warm_up = min(depth, 2)

    def train(client: Any) -> None:
        for _ in in_flight(client, [batch] * (warm_up + count), depth):
            times.append(time.perf_counter())

    threads = [threading.Thread(target=train, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(times) != len(clients) * (warm_up + count):
        raise RuntimeError("a client failed; its traceback is above")
    times.sort()
    # From the last of every client's warm-up to the last before a client has no more to ask for.
    first, last = len(clients) * warm_up - 1, len(times) - len(clients)
    return (times[last] - times[first]) / (last - first)


@contextmanager
def simulated_server(path: str, shape: ModelShape, length: int, sleep_s: float) -> Iterator[str]:
    """Run `simulated.py`; yields its URL."""
    options = [f"--path={path}", f"--length={length}", f"--seconds={sleep_s}"]
    command = [str(HERE / "simulated.py"), *shape.arguments(), *options]
    with server(command, PATHS[path], threads=torch.get_num_threads()) as started:
        yield started.url


@contextmanager
def connect(path: str, url: str, vocab: tuple[torch.Tensor, torch.Tensor]) -> Iterator[Any]:
    """Yield a client that has its draft vocab."""
    if path == "ours":
        options: dict[str, Any] = {"encoding": "hidden", "max_in_flight": max(DEPTHS)}
        with RemoteEagle3Backend(url, retry_for_s=10, timeout_s=60, **options) as client:
            client.set_vocab_mapping(*vocab)
            yield client
        return
    from nemo_automodel.components.speculative.eagle.remote import RemoteEagle3TargetModel

    peer = RemoteEagle3TargetModel.from_urls([url], device="cpu")
    peer.set_vocab_mapping(*vocab)
    yield peer  # not closed: that would stop the server under the other clients


def name(path: str, clients: int, depth: int) -> str:
    return f"{path}, {clients} client{'s' * (clients > 1)}, prefetch {depth}"


def table(seconds: Seconds, milliseconds: int) -> list[list[Any]]:
    """Return a line per case; its last entry is the median in seconds."""
    lines: list[list[Any]] = []
    for case, values in seconds.items():
        words = case.split(", ")
        path, clients, depth = words if len(words) == 3 else (case, "-", "-")
        lines.append(
            [
                f"{milliseconds} ms",
                path,
                clients.split()[0],
                depth.split()[-1],
                f"{1000 * statistics.median(values):,.1f}",
                spread(ratio(seconds | {"bare": seconds["bare"][: len(values)]}, "bare", case)),
                statistics.median(values),
            ]
        )
    return lines


def verdicts(seconds: Seconds, milliseconds: int) -> list[list[str]]:
    """Hold the ratios against our goals."""
    ours, at = name("ours", 1, 2), f"simulated {milliseconds} ms"
    wanted = [
        (f"served at prefetch 2 / bare, {at}", 0.97, "bare", ours),
        (f"sum of {CLIENTS} trainers / bare, {at}", 0.95, "bare", name("ours", CLIENTS, 1)),
    ]
    if milliseconds == 80:
        peer = name("peer", 1, 2)
        wanted.append((f"speed against the peer at prefetch 2, {at}", 12.0, peer, ours))
    rows = []
    for what, floor, above, below in wanted:
        found = ratio(seconds, above, below)
        rows.append(
            Target(what, floor, at_least=True).row(found["median"], spread(found, median=False))
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
