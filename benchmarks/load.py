"""Eight trainers at once on SmolLM2: throughput, waits, `/healthz` and memory.

Random shapes, three draft vocabs, `serve` with its defaults, everything on the same cores; bare is
the same batches one after the other without a server. Run as ``python benchmarks/load.py``; four
minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from children import HERE, OUR_READY_PATH, Child, peak_bytes, reset_peak, server
from common import (
    MIB,
    Target,
    add_output_options,
    markdown_table,
    provenance,
    publish,
    ratio,
    spread,
)
from head_model import ModelShape, make_model

TRAINERS = 8
SERVE = ("-m", "eagle3_client.cli", "serve", "--dtype=float32")


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_output_options(parser)
    parser.add_argument("--batches", type=int, default=6, help="of each trainer in a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.batches, arguments.rounds = 2, 2
    with tempfile.TemporaryDirectory(prefix="eagle3-load-") as directory:
        results = measure(Path(directory), arguments)
    results["provenance"] = provenance("load.py", words)
    waits, probes = results["waits"], sorted(results["healthz"])
    share = ratio(results["seconds"], "bare", "served")
    p99 = 1e3 * probes[int(0.99 * len(probes))]
    median_wait = statistics.median(waits)
    peaks = {name: peak / MIB for name, peak in results["peak_above_loaded"].items()}
    results["verdicts"] = [
        Target("`/healthz` p99 during CPU forwards", 50, " ms").row(p99),
    ]
    lines = [
        ["throughput of 8 trainers / bare", spread(share)],
        ["wait for a batch, median", f"{median_wait:.2f} s"],
        ["wait for a batch, longest / median", f"{max(waits) / median_wait:.1f}"],
        ["slowest trainer's sum of waits / fastest's", f"{results['unfairness']:.2f}"],
        [
            f"`/healthz`, {len(probes):,} probes, median",
            f"{1e3 * statistics.median(probes):.1f} ms",
        ],
        ["`/healthz`, p99", f"{p99:.1f} ms"],
        ["`/healthz`, longest", f"{1e3 * probes[-1]:.1f} ms"],
        ["server's peak above loaded, one trainer", f"{peaks['alone']:,.0f} MiB"],
        ["server's peak above loaded, 8 trainers", f"{peaks['together']:,.0f} MiB"],
    ]
    parts = [
        f"{results['model']}, float32; {TRAINERS} trainers in one process, prefetch 2, batches of "
        f"1 to 4 sequences of 32 to 256 tokens, encoding `probs`; {arguments.rounds} interleaved "
        f"rounds of {TRAINERS * arguments.batches} batches. Server and trainers share the cores.",
        markdown_table(["what", "measured"], lines),
        markdown_table(["what", "measured", "target", ""], results["verdicts"]),
    ]
    publish(arguments.out, "load", "Eight trainers at once", results, parts)
    return 0


def measure(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run rounds of trainers and of the loop without a server."""
    checkpoint, vocab_size, sizes = target(directory, arguments.quick)
    plan = directory / "plan.pt"
    torch.save(make_plan(vocab_size, sizes, arguments.batches), plan)
    threads = torch.get_num_threads()
    script = [str(HERE / "load_client.py"), f"--plan={plan}"]
    seconds: dict[str, list[float]] = {"bare": [], "served": []}
    waits: list[float] = []
    sums: list[float] = []
    probes: list[float] = []
    with ExitStack() as stack:
        command = [*SERVE, str(checkpoint)]
        served = stack.enter_context(server(command, OUR_READY_PATH, threads=threads))
        loaded = resident_bytes(served.pid)
        trainers, prober = (
            stack.enter_context(Child([*script, f"--url={served.url}"], threads=1))
            for _ in range(2)
        )
        bare = stack.enter_context(Child([*script, f"--checkpoint={checkpoint}"], threads=threads))
        reset_peak(served.pid)
        trainers.ask("alone")
        peaks = {"alone": peak_bytes(served.pid) - loaded}
        bare.ask("bare", count=1)
        for _ in range(arguments.rounds):
            prober.ask("probe")
            answer = trainers.ask("train", count=arguments.batches)
            probes += prober.ask("probed")
            seconds["served"].append(answer["seconds"])
            waits += [wait for some in answer["waits"] for wait in some]
            sums += [max(map(sum, answer["waits"])) / min(map(sum, answer["waits"]))]
            seconds["bare"].append(bare.ask("bare", count=arguments.batches)["seconds"])
        peaks["together"] = peak_bytes(served.pid) - loaded
    return {
        "model": "a random model of no size" if arguments.quick else "SmolLM2-135M",
        "seconds": seconds,
        "waits": waits,
        "unfairness": max(sums),
        "healthz": probes,
        "peak_above_loaded": peaks,
    }


def target(directory: Path, quick: bool) -> tuple[Path, int, tuple[int, ...]]:
    """Return a checkpoint, V, and three draft vocab sizes."""
    if quick:
        shape = ModelShape(64, 8, 2000, 900, 2)
        make_model(shape, torch.bfloat16).save_pretrained(directory / "checkpoint")
        return directory / "checkpoint", shape.vocab_size, (100, 500, 900)
    from smollm2 import smollm2_checkpoint

    return smollm2_checkpoint(), 49152, (4096, 8192, 12288)


def make_plan(vocab_size: int, sizes: Sequence[int], batches: int) -> dict[str, Any]:
    """Return each trainer's batches and the draft vocabs they take turns in using."""
    generator = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def batch() -> tuple[torch.Tensor, ...]:
        size = (integer(1, 4), integer(32, 256))
        loss_mask = torch.ones(size, dtype=torch.int64)
        loss_mask[:, : size[1] // 3] = 0
        input_ids = torch.randint(vocab_size, size, generator=generator)
        return input_ids, torch.ones(size, dtype=torch.int64), loss_mask

    def vocab(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randperm(vocab_size, generator=generator)[:size]
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[ids] = True
        return ids, mask

    return {
        "trainers": [[batch() for _ in range(batches)] for _ in range(TRAINERS)],
        "vocabs": [vocab(size) for size in sizes],
    }


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    sys.exit(main())
