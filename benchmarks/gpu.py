"""What only a GPU can show, in one command of about four minutes: ``python benchmarks/gpu.py``.

First the tests of `tests/gpu`. Then an 8B-shaped Llama with random weights in bfloat16: bare
forward, served tokens/s and MFU, chunks of the head, peak memory, copy rates from pinned and
pageable memory, the co-located path on the same card, bit-equality of `logits` and `probs` under
exact=True, and the distance of `hidden`. ``--quick --device cpu`` runs the same code in small,
without the tests, as a test does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from children import Child
from common import (
    MIB,
    REPOSITORY,
    add_output_options,
    interleaved,
    provenance,
    publish,
    served,
)
from gpu_report import Shape, tables, verdicts
from gpu_target import QUICK, SMALL, job_of, make_batch, make_model, small_vocab
from gpu_two import two_gpus
from head_model import Vocab, colocated, covering_vocab

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import DraftVocab
from eagle3_schemas.host_buffers import HostBuffers
from eagle3_server import TransformersTarget
from text import TokenBatch


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__)
    add_output_options(parser)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pytest-args", default="", help="of the tests, such as -n8")
    arguments = parser.parse_args(words)
    device, shape = torch.device(arguments.device), QUICK if arguments.quick else Shape()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    checks = tests(arguments.pytest_args) if device.type == "cuda" else "not run: no GPU"
    model = make_model(shape, device)
    batch = make_batch(shape)
    with torch.no_grad():
        top_ids = model(input_ids=batch.input_ids[:1].to(device)).logits.argmax(-1).cpu()
    vocab = covering_vocab(shape.model_shape, top_ids)
    target = TransformersTarget(model, model_id="8B-shaped")
    results: dict[str, Any] = {
        "provenance": provenance("gpu.py", words),
        "card": card,
        "tests": checks,
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": speed(target, model, vocab, batch, shape, device),
        "chunks": chunks(model, vocab, batch, device),
        "peak_mib": peaks(target, model, vocab, batch, device),
        "copy_gb_s": copy_rates(device, 1 << (20 if arguments.quick else 28)),
        "equality": equality(target, model, vocab, batch, device),
        "two_gpus": two_gpus(
            lambda at: make_model(SMALL, at),
            lambda target, **how: job_of(make_batch(SMALL), small_vocab(), target, **how),
            DraftVocab.from_ids(*small_vocab()),
        ),
    }
    results["verdicts"] = verdicts(results["seconds"], shape)
    publish(arguments.out, "gpu", f"On one {card}", results, tables(results, shape))
    return 1 if "failed" in checks or "error" in checks else 0


def tests(arguments: str) -> str:
    """Run the tests that need a GPU; what pytest says of them in the end."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", *arguments.split()]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.stdout.strip().splitlines()[-1].strip("= ")


def speed(
    target: TransformersTarget,
    model: Any,
    vocab: Vocab,
    batch: TokenBatch,
    shape: Shape,
    device: torch.device,
) -> dict[str, list[float]]:
    """Return seconds a batch: backbone, supervision, co-located, and served at two depths."""
    job = job_of(batch, vocab, target)
    on_device = TokenBatch(*(tensor.to(device) for tensor in batch))
    full = colocated(model, tuple(t.to(device) for t in vocab), target.describe().aux_layer_ids)

    def backbone() -> None:
        with torch.no_grad():
            model.model(input_ids=on_device.input_ids, use_cache=False)
        synchronize(device)

    def bare() -> None:
        target.supervise(job)
        synchronize(device)

    def beside() -> None:
        full(on_device)
        synchronize(device)

    cases: dict[str, Callable[[], object]] = {
        "backbone": backbone,
        "bare supervision": bare,
        "co-located": beside,
    }
    seconds = interleaved(cases, 3)
    with tempfile.TemporaryDirectory() as folder, served(target, 600) as url:
        file = Path(folder, "batch.pt")
        torch.save({"batch": tuple(batch), "vocab": vocab}, file)
        with Child(
            [str(Path(__file__).with_name("gpu_client.py")), url, str(file), str(device)], threads=4
        ) as one:
            for depth in (2, 4):
                times = one.ask("take", depth=depth, count=shape.batches)
                seconds[f"served, prefetch {depth}"] = times
    return seconds


def chunks(
    model: Any, vocab: Vocab, batch: TokenBatch, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return milliseconds and device memory of supervision by `head_chunk_bytes`."""
    sizes = (64, 256, 512, 1024) if device.type == "cuda" else (64,)
    targets = {
        f"{mib} MiB": TransformersTarget(model, model_id="chunks", head_chunk_bytes=mib * MIB)
        for mib in sizes
    }

    def supervise(target: TransformersTarget) -> None:
        target.supervise(job_of(batch, vocab, target))
        synchronize(device)

    seconds = interleaved({n: partial(supervise, t) for n, t in targets.items()}, 3)
    found = {name: {"ms": 1000 * median(values)} for name, values in seconds.items()}
    for name, target in targets.items():
        found[name]["MiB"] = peak_mib(device, partial(supervise, target))
    return found


def peak_mib(device: torch.device, run: Callable[[], object]) -> float:
    """Return the device memory that a call takes above what there is; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def peaks(
    target: TransformersTarget, model: Any, vocab: Vocab, batch: TokenBatch, device: torch.device
) -> dict[str, float]:
    """Return the device memory one batch takes above the weights, MiB; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    job = job_of(batch, vocab, target)
    on_device = TokenBatch(*(tensor.to(device) for tensor in batch))
    full = colocated(model, tuple(t.to(device) for t in vocab), target.describe().aux_layer_ids)
    return {
        "ours": peak_mib(device, lambda: target.supervise(job)),
        "co-located": peak_mib(device, lambda: full(on_device)),
    }


def copy_rates(device: torch.device, nbytes: int) -> dict[str, list[float]]:
    """Return GB/s from and to host memory, pooled pinned buffers and pageable ones."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    hosts = {"pageable": torch.zeros(nbytes, dtype=torch.uint8)}
    if device.type == "cuda":
        hosts["pinned"] = HostBuffers(pinned=True).take(nbytes)
    cases: dict[str, Callable[[], object]] = {}
    for name, host in hosts.items():

        def to_host(host: torch.Tensor = host) -> None:
            host.copy_(source, non_blocking=True)
            synchronize(device)

        def to_device(host: torch.Tensor = host) -> None:
            source.copy_(host, non_blocking=True)
            synchronize(device)

        cases |= {f"{name}, device to host": to_host, f"{name}, host to device": to_device}
    seconds = interleaved(cases, 5)
    return {name: [nbytes / s / 1e9 for s in values] for name, values in seconds.items()}


def equality(
    target: TransformersTarget, model: Any, vocab: Vocab, batch: TokenBatch, device: torch.device
) -> dict[str, Any]:
    """Return how each encoding, served and rebuilt on the device, differs from co-located."""
    small = TokenBatch(*(tensor[:1] for tensor in batch))
    on_device = TokenBatch(*(tensor.to(device) for tensor in small))
    here = tuple(tensor.to(device) for tensor in vocab)
    answer, (probs, mask) = colocated(model, here, target.describe().aux_layer_ids)(on_device)
    where = mask.squeeze(-1).bool()
    found: dict[str, Any] = {}
    with served(target, 600) as url:
        for encoding, exact in (
            ("probs", True),
            ("logits", True),
            ("logits", False),
            ("hidden", False),
        ):
            if encoding not in target.describe().encodings:
                continue
            with RemoteEagle3Backend(
                url, device=device, encoding=encoding, exact=exact, retry_for_s=5
            ) as backend:
                backend.set_vocab_mapping(*vocab)
                got = backend.generate_batch(*small)
                again = backend.generate_batch(*small)
            assert got.target_probs is not None
            assert again.target_probs is not None
            same = got.position_mask.squeeze(-1) & where
            found[f"{encoding}, exact={exact}"] = {
                "aux_bit_equal": torch.equal(got.aux_hidden_states, answer.aux_hidden_states),
                "masks_that_differ": int((got.position_mask.squeeze(-1) != where).sum()),
                "probs_bit_equal": torch.equal(got.target_probs[same], probs[same]),
                "largest_difference": float((got.target_probs[same] - probs[same]).abs().max()),
                "repeats_bit_equal": torch.equal(got.target_probs, again.target_probs)
                and torch.equal(got.aux_hidden_states, again.aux_hidden_states),
            }
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
