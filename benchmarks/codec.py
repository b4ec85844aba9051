"""Codec: one supervision response at 8B dimensions to bytes and back, and what its checksum costs.

Run as ``python benchmarks/codec.py``; half a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgpack
import torch
from common import (
    MIB,
    Target,
    add_output_options,
    interleaved,
    markdown_table,
    provenance,
    publish,
    spread,
)
from fixed_target import EIGHT_B, supervision, token_batch
from torch import Tensor
from wire import NO_PEER, PEER, has_peer, middle, of_rounds

from eagle3_schemas.frame import decode, encode
from eagle3_schemas.tensors import DTYPE_NAMES, DTYPES, byte_view, checksum

Tensors = dict[str, Tensor]
Codec = tuple[Callable[[], Any], Callable[[Any], Tensors]]
OURS, CHECKED = "ours, checksums apart", "ours, checksums included"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    supervised = 1756 / 2048  # 262 MiB of aux states and `probs` rows
    parser.add_argument("--supervised", type=float, default=supervised)
    parser.add_argument("--rounds", type=int, default=15)
    add_output_options(parser)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.tokens, arguments.rounds = 32, 2
    results: dict[str, Any] = {"provenance": provenance("codec.py", words)}
    tensors = supervision(
        token_batch(arguments.tokens, arguments.supervised),
        EIGHT_B.hidden_size,
        EIGHT_B.draft_vocab_size,
        "probs",
        "model",
    )
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    codecs = make_codecs(tensors)
    bodies = {name: encode_it() for name, (encode_it, _) in codecs.items()}
    for name, (_, decode_it) in codecs.items():
        for key, tensor in decode_it(bodies[name]).items():
            assert torch.equal(tensor, tensors[key]), f"{name} changed {key}"
    encoding = interleaved({name: codec[0] for name, codec in codecs.items()}, arguments.rounds)
    decoding = interleaved(
        {name: partial(codec[1], bodies[name]) for name, codec in codecs.items()}, arguments.rounds
    )
    threads = torch.get_num_threads()
    sums = interleaved(
        {count: partial(sum_all, tensors, int(count)) for count in {str(threads): 0, "1": 0}},
        arguments.rounds,
    )
    torch.set_num_threads(threads)
    results |= {"bytes": nbytes, "encode_seconds": encoding, "decode_seconds": decoding}
    results["checksum_seconds_by_threads"] = sums
    results["verdicts"] = verdicts(encoding, decoding, sums, nbytes)
    notes = [] if PEER in codecs else [NO_PEER + "."]
    parts = [
        f"A response of {nbytes / MIB:,.0f} MiB: {arguments.tokens} tokens, bf16 aux states of "
        f"3 x {EIGHT_B.hidden_size}, {tensors['target_probs'].shape[0]} rows of `probs` with D "
        f"{EIGHT_B.draft_vocab_size}; {arguments.rounds} interleaved rounds, median (range), ms. "
        "Encoding ends with what can be handed to a socket, decoding with tensors that own or view "
        "the body; every decoded tensor was compared with what was encoded. Only ours has "
        "checksums.",
        *notes,
        markdown_table(["codec", "encode ms", "decode ms"], lines(encoding, decoding)),
        markdown_table(["what", "measured", "target", ""], results["verdicts"]),
    ]
    publish(arguments.out, "codec", "Codec", results, parts)
    return 0


def make_codecs(tensors: Tensors) -> dict[str, Codec]:
    """Return what encodes the tensors and what decodes them again; the peer's, if it is here."""
    known = {name: checksum(tensor) for name, tensor in tensors.items()}

    received = torch.frombuffer(bytearray(encode({}, tensors, known).to_bytes()), dtype=torch.uint8)
    codecs: dict[str, Codec] = {
        OURS: (
            lambda: encode({}, tensors, known),
            lambda _: decode(received, verify=False).tensors,
        ),
        CHECKED: (lambda: encode({}, tensors), lambda _: decode(received).tensors),
        "msgpack, bin fields": (lambda: to_msgpack(tensors), from_msgpack),
    }
    try:
        from safetensors.torch import load, save
    except ImportError:
        pass
    else:
        codecs["safetensors"] = (lambda: save(tensors), load)
    if has_peer():
        from nemo_automodel.components.speculative.eagle.remote import wire

        codecs[PEER] = (lambda: wire.encode_to_bytes(tensors), wire.decode)
    return codecs


def to_msgpack(tensors: Tensors) -> bytes:
    rows = {
        name: [DTYPE_NAMES[tensor.dtype], list(tensor.shape), byte_view(tensor)]
        for name, tensor in tensors.items()
    }
    return msgpack.packb(rows)


def from_msgpack(body: bytes) -> Tensors:
    rows = msgpack.unpackb(body, max_bin_len=len(body))
    return {
        name: torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)
        for name, (dtype, shape, data) in rows.items()
    }


def sum_all(tensors: Tensors, threads: int) -> None:
    torch.set_num_threads(threads)
    for tensor in tensors.values():
        checksum(tensor)


def lines(encoding: dict[str, list[float]], decoding: dict[str, list[float]]) -> list[list[str]]:
    return [
        [name, *(middle([1e3 * value for value in times[name]]) for times in (encoding, decoding))]
        for name in encoding
    ]


def verdicts(
    encoding: dict[str, list[float]],
    decoding: dict[str, list[float]],
    sums: dict[str, list[float]],
    nbytes: int,
) -> list[list[str]]:
    size = f"{nbytes / MIB:,.0f} MiB frame"
    measured = [
        (Target(f"{size}: encode, ms", 13), [1e3 * value for value in encoding[OURS]]),
        (Target(f"{size}: decode, ms", 1), [1e3 * value for value in decoding[OURS]]),
        *(
            (
                Target(f"{size}: checksum, {count} thread(s), GB/s", 10, at_least=True),
                [nbytes / value / 1e9 for value in values],
            )
            for count, values in sums.items()
        ),
    ]
    return [
        target.row(statistics.median(values), spread(of_rounds(values), median=False))
        for target, values in measured
    ]


if __name__ == "__main__":
    sys.exit(main())
