"""What a server's size buys: trainers on one server, and two processes on one target.

*Trainers*: each takes 320 ms a step, asleep as a GPU's trainer is, and a simulated target 80 ms a
batch at 8B dimensions (`simulated.py`), so that arithmetic says four. *Processes*: one forward of a
Llama with its head in one process, sharded over two (`--tp 2`) and split over two (`--cp 2`), each
process on one thread (`sizing_ranks.py`). Run as ``python benchmarks/sizing.py``; five minutes.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from children import HERE, LOOPBACK, environment
from common import (
    Seconds,
    Target,
    add_output_options,
    markdown_table,
    provenance,
    publish,
    ratio,
    spread,
)
from head_model import draft_vocab, make_batch
from overlap import QUICK, connect, simulated_server
from simulated import LENGTH, SHAPE, rebuild_elsewhere

STEP_S, TARGET_S, TRAINERS = 0.32, 0.08, (1, 2, 3, 4, 5, 6, 8)


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_output_options(parser)
    parser.add_argument("--trainers", type=int, nargs="+", default=TRAINERS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096])
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.trainers, arguments.steps, arguments.rounds = [1, 2], 3, 2
        arguments.tokens = [64]
    share, speeds = trainers(arguments)
    two = processes(arguments)
    results: dict[str, Any] = {
        "provenance": provenance("sizing.py", words),
        "share_of_alone": {str(count): found for count, found in share.items()},
        "two_processes": two,
        "verdicts": verdicts(share),
    }
    publish(arguments.out, "sizing", "Sizes", results, pages(arguments, share, speeds, two))
    return 0


def trainers(arguments: argparse.Namespace) -> tuple[dict[int, list[float]], dict[int, float]]:
    """Return each trainer's speed as a share of its speed alone, by how many there are.

    Also the median of all trainers' steps a second.
    """
    shape, length = QUICK if arguments.quick else (SHAPE, LENGTH)
    rebuild_elsewhere()
    batch, vocab = make_batch(shape, length), draft_vocab(shape)
    rates: dict[int, list[float]] = {count: [] for count in arguments.trainers}
    with (
        ExitStack() as stack,
        simulated_server("ours", shape, length, TARGET_S) as url,
    ):
        clients = [
            stack.enter_context(connect("ours", url, vocab)) for _ in range(max(arguments.trainers))
        ]
        for client in clients:
            client.generate_batch(*batch)
        for _ in range(arguments.rounds):
            for count in arguments.trainers:
                rates[count].append(steps_per_s(clients[:count], batch, arguments.steps))
                print(f"{count} trainers: {rates[count][-1]:.2f} steps/s", file=sys.stderr)
    alone = rates[1]
    share = {
        count: [rate / count / one for rate, one in zip(found, alone, strict=True)]
        for count, found in rates.items()
    }
    return share, {count: statistics.median(found) for count, found in rates.items()}


def steps_per_s(clients: Sequence[Any], batch: Any, steps: int) -> float:
    """Return the steps a second of all trainers together, each prefetching two batches."""
    durations: list[float] = []

    def train(client: Any) -> None:
        with client.prefetch([tuple(batch)] * (steps + 1), 2) as prefetch:
            next(prefetch)
            started = time.perf_counter()
            for _ in range(steps):
                time.sleep(STEP_S)
                next(prefetch)
            durations.append(time.perf_counter() - started)

    threads = [threading.Thread(target=train, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(durations) != len(clients):
        raise RuntimeError("a trainer failed; its traceback is above")
    return sum(steps / seconds for seconds in durations)


def processes(arguments: argparse.Namespace) -> dict[str, Seconds]:
    """Return the seconds of `whole`, `tp` and `cp`, by the tokens of the one row."""
    with socket.create_server((LOOPBACK, 0)) as free:
        port = str(free.getsockname()[1])
    options = [str(arguments.rounds), *map(str, arguments.tokens)]
    size = "small" if arguments.quick else "large"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "sizing_ranks.py"), size, *options],
            env={
                **environment(1),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    with ThreadPoolExecutor(2) as readers:
        said = [each.result()[0] for each in [readers.submit(r.communicate) for r in ranks]]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("a rank failed; its traceback is above")
    return dict(json.loads(said[0].splitlines()[-1]))


def verdicts(share: dict[int, list[float]]) -> list[list[str]]:
    """Hold the trainers that arithmetic allows against the speed of one alone."""
    fed = [count for count in share if 1 < count < STEP_S / TARGET_S]
    return [
        Target(
            f"speed of each of {count} trainers / alone, step 320 ms, target 80 ms",
            0.95,
            at_least=True,
        ).row(
            statistics.median(share[count]),
            f" ({min(share[count]):.2f}-{max(share[count]):.2f})",
        )
        for count in fed
    ]


def pages(
    arguments: argparse.Namespace,
    share: dict[int, list[float]],
    speeds: dict[int, float],
    two: dict[str, Seconds],
) -> list[str]:
    """Return the page's parts."""
    rows = [
        [
            str(count),
            f"{min(1.0, STEP_S / TARGET_S / count):.2f}",
            f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})",
            f"{speeds[count]:.1f}",
        ]
        for count, found in share.items()
    ]
    ranks = [
        [
            tokens,
            f"{statistics.median(seconds['whole']):.2f}",
            spread(ratio(seconds, "whole", "tp")),
            spread(ratio(seconds, "whole", "cp")),
        ]
        for tokens, seconds in two.items()
    ]
    return [
        f"Trainers with steps of 320 ms on one target of 80 ms a batch of 2048 tokens, prefetch 2; "
        f"{arguments.steps} steps a case, {arguments.rounds} interleaved rounds. `expected` is 320 "
        "/ (80 x trainers), at most 1.",
        markdown_table(["trainers", "expected speed", "speed / alone", "steps/s, all"], rows),
        "One row through a Llama of H 1024, 8 layers, V 32000 and its head, 60 % supervised, "
        "float32, encoding `hidden`: one process, against two that share it, every process on one "
        f"thread, over gloo on this host; {arguments.rounds} interleaved rounds. Two at best halve "
        "the time.",
        markdown_table(["tokens", "one process, s", "one / `--tp 2`", "one / `--cp 2`"], ranks),
        markdown_table(["what", "measured", "target", ""], verdicts(share)),
    ]


if __name__ == "__main__":
    sys.exit(main())
