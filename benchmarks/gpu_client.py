"""The trainer of `gpu.py`, in a process of its own as trainers are: it takes batches, no more."""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from children import answer_commands
from simulated import rebuild_elsewhere

from eagle3_client import RemoteEagle3Backend

PASSED = 2  # batches before the first that counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("batch", type=Path)
    parser.add_argument("device")
    arguments = parser.parse_args()
    loaded = torch.load(arguments.batch)
    rebuild_elsewhere()  # a trainer's card does that; on the target's it would cost the target
    backend = RemoteEagle3Backend(
        arguments.url, device=arguments.device, encoding="hidden", max_in_flight=8
    )
    backend.set_vocab_mapping(*loaded["vocab"])

    def take(depth: int, count: int) -> list[float]:
        """Return the seconds between `count` batches, `depth` of them in flight."""
        arrived = []
        for _ in backend.prefetch([loaded["batch"]] * (count + PASSED), depth):
            arrived.append(time.perf_counter())
        return [after - at for at, after in pairwise(arrived[PASSED - 1 :])]

    answer_commands({"take": take})


if __name__ == "__main__":
    main()
