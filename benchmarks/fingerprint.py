"""How long a server needs for the fingerprint of an 8B target.

The weights are allocated and never written, so that 24 GiB hold them: a fingerprint reads 64 KiB of
each tensor, whatever is in them. Weights that lie on a disk or a GPU cost their way to the host.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import Target, add_output_options, markdown_table, provenance, publish
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3_server.fingerprint import config_digest, weights_digest

GOAL = Target("fingerprint of an 8B-shaped model, s", 5.0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    add_output_options(parser)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    model = shaped(quick=arguments.quick)
    tensors = model.state_dict()
    seconds, found = [], set()
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        found.add((config_digest(model), weights_digest(model)))
        seconds.append(time.perf_counter() - started)
    if len(found) != 1:
        raise SystemExit(f"the fingerprint changed from one round to the next: {found}")
    median = statistics.median(seconds)
    verdict = GOAL.row(median, f" ({min(seconds):.2f}-{max(seconds):.2f})")
    results: dict[str, Any] = {
        "provenance": provenance("fingerprint.py", words),
        "seconds": seconds,
        "verdicts": [verdict],
    }
    gigabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e9
    parts = [
        f"{len(tensors)} tensors of {gigabytes:.1f} GB on the CPU, {arguments.rounds} rounds. A "
        "server computes it once, while it loads.",
        markdown_table(["what", "measured", "target", ""], [verdict]),
    ]
    publish(arguments.out, "fingerprint", "Fingerprint", results, parts)
    return 0


def shaped(*, quick: bool) -> LlamaForCausalLM:
    """Build a model of Llama-3.1-8B's shapes in bf16, its weights whatever the memory holds."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2 if quick else 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.to_empty(device="cpu")


if __name__ == "__main__":
    sys.exit(main())
