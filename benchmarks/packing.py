"""What packed rows cost: from one document a row to hundreds, against the same tokens unpacked.

Lengths are log-normal, as conversations are, scaled to fill each row; in process, a random model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from common import (
    Target,
    add_output_options,
    interleaved,
    markdown_table,
    provenance,
    publish,
    ratio,
    spread,
)
from head_model import AUX_LAYER_IDS, ModelShape, draft_vocab, make_batch, make_model
from simulated import simulated_job
from torch import Tensor

from eagle3_schemas.packing import documents_of
from eagle3_server import TransformersTarget
from eagle3_server.packing import grouped

COUNTS = (1, 4, 16, 64, 256)
SURPLUS = 1.125


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048)
    add_output_options(parser)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    shape = ModelShape(512, 8, 32000, 8000, 2)
    length, counts, rounds = arguments.length, COUNTS, arguments.rounds
    if arguments.quick:
        shape, length, counts, rounds = ModelShape(64, 6, 512, 128, 2), 128, (1, 8), 1
    target = TransformersTarget(make_model(shape, torch.float32), model_id="random")
    plain = simulated_job(make_batch(shape, length), draft_vocab(shape))
    plain = replace(plain, aux_layer_ids=AUX_LAYER_IDS)
    cases: dict[str, Any] = {"unpacked": lambda: target.supervise(plain)}
    computed = {}
    for count in counts:
        seq_lens = torch.stack([lengths(count, length, row) for row in range(2)])
        job = replace(plain, seq_lens=seq_lens)
        groups = list(grouped(documents_of(seq_lens), SURPLUS))
        tokens = sum(len(group) * group[0].length for group in groups)
        computed[count] = len(groups), tokens / seq_lens.sum().item()
        cases[f"{count} documents"] = lambda job=job: target.supervise(job)
        cases[f"{count} masked"] = lambda job=job: target.supervise(replace(job, exact=True))
    seconds = interleaved(cases, rounds)
    rows, verdicts = [], []
    for count in counts:
        by_document = ratio(seconds, f"{count} documents", "unpacked")
        masked = ratio(seconds, f"{count} masked", "unpacked")
        forwards, share = computed[count]
        rows.append(
            [str(count), str(forwards), f"{share:.2f}", spread(by_document), spread(masked)]
        )
        if count in (counts[0], counts[-1]):
            goal = Target(f"packed, {count} documents a row / unpacked", 1.2)
            verdicts.append(goal.row(by_document["median"], spread(by_document, median=False)))
    results: dict[str, Any] = {
        "provenance": provenance("packing.py", words),
        "seconds": seconds,
        "verdicts": verdicts,
    }
    parts = [
        f"H {shape.hidden_size}, {shape.layers} layers, V {shape.vocab_size}, 2 rows of {length} "
        f"tokens, fp32, encoding `hidden`, {rounds} interleaved rounds. Time of one supervision, "
        "over that of the same tokens unpacked: without `exact`, documents as rows of their own; "
        "with `exact`, one forward under a block-causal mask.",
        markdown_table(
            ["documents a row", "forwards", "tokens computed / asked", "documents", "masked"], rows
        ),
        markdown_table(["what", "measured", "target", ""], verdicts),
    ]
    publish(arguments.out, "packing", "Packed rows", results, parts)
    return 0


def lengths(count: int, length: int, seed: int) -> Tensor:
    """Return `count` log-normal lengths that sum to `length`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, generator=generator).exp()
    ends = (weights.cumsum(0) / weights.sum() * (length - count)).round().long()
    return ends.diff(prepend=ends.new_zeros(1)) + 1


if __name__ == "__main__":
    sys.exit(main())
