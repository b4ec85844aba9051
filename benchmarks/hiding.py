"""Whether prefetch hides a target that is the faster side: how long a trainer waits for its batch.

The target takes 80 ms a batch at 8B dimensions (`simulated.py`), a step of the trainer 100, 125 or
160 ms, spent as on a GPU: asleep. Run as ``python benchmarks/hiding.py``; two minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import Target, add_output_options, markdown_table, provenance, publish
from head_model import draft_vocab, make_batch
from overlap import QUICK, connect, simulated_server
from simulated import LENGTH, SHAPE, rebuild_elsewhere

TARGET_S, DEPTHS, GOAL = 0.08, (1, 2, 4), 0.05


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_output_options(parser)
    parser.add_argument("--step-milliseconds", type=int, nargs="+", default=[100, 125, 160])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(words)
    shape, length = QUICK if arguments.quick else (SHAPE, LENGTH)
    target_s = 0.02 if arguments.quick else TARGET_S
    if arguments.quick:
        arguments.step_milliseconds, arguments.steps, arguments.rounds = [60], 4, 2
    rebuild_elsewhere()
    batch, vocab = make_batch(shape, length), draft_vocab(shape)
    cases = [(ms / 1000, depth) for ms in arguments.step_milliseconds for depth in DEPTHS]
    shares: dict[str, list[float]] = {str(case): [] for case in cases}
    with (
        simulated_server("ours", shape, length, target_s) as url,
        connect("ours", url, vocab) as client,
    ):
        client.generate_batch(*batch)
        for _ in range(arguments.rounds):
            for case in cases:
                shares[str(case)].append(wait_share(client, batch, *case, arguments.steps))
    rows, verdicts = [], []
    for step_s, depth in cases:
        found = shares[str((step_s, depth))]
        rows.append([f"{1000 * step_s:.0f} ms", str(depth), spread_percent(found)])
        if depth == 2:
            median = sorted(found)[len(found) // 2]
            step, target = (f"{1000 * seconds:.0f} ms" for seconds in (step_s, target_s))
            what = f"wait at prefetch 2 / step of {step}, target of {target}"
            verdicts.append(
                Target(what, GOAL, at_least=False).row(
                    median, f" ({min(found):.2f}-{max(found):.2f})"
                )
            )
    results: dict[str, Any] = {
        "provenance": provenance("hiding.py", words),
        "shares": shares,
        "verdicts": verdicts,
    }
    parts = [
        f"The target takes {1000 * target_s:.0f} ms a batch of B {shape.batch_size}, T {length}, "
        f"H {shape.hidden_size}, D {shape.draft_vocab_size}, bf16; copies, checksums and transfer "
        f"come on top. {arguments.steps} steps a case, {arguments.rounds} interleaved rounds.",
        markdown_table(["trainer's step", "prefetch", "waited, share of the step"], rows),
        markdown_table(["what", "measured", "target", ""], verdicts),
    ]
    publish(arguments.out, "hiding", "Prefetch that hides the target", results, parts)
    return 0


def wait_share(
    client: Any, batch: tuple[torch.Tensor, ...], step_s: float, depth: int, steps: int
) -> float:
    """Return the share of its steps that a trainer waits for batches, after the first."""
    waited = 0.0
    with client.prefetch([tuple(batch)] * (steps + 1), depth) as prefetch:
        next(prefetch)
        started = time.perf_counter()
        for _ in range(steps):
            time.sleep(step_s)  # trains on what came before
            asked = time.perf_counter()
            next(prefetch)
            waited += time.perf_counter() - asked
        return waited / (time.perf_counter() - started)


def spread_percent(shares: Sequence[float]) -> str:
    median = sorted(shares)[len(shares) // 2]
    return f"{100 * median:.1f} % ({100 * min(shares):.1f}-{100 * max(shares):.1f})"


if __name__ == "__main__":
    sys.exit(main())
