"""Links: tokens per second of a server with nothing to compute, over 1, 2.5 and 10 Gb/s.

The links are a paced relay on this machine (`relay.py`). The server answers with supervision made
before, at 8B dimensions. Run as ``python benchmarks/links.py``; three minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from common import MIB, add_output_options, markdown_table, provenance, publish
from fixed_target import EIGHT_B, token_batch
from wire import NO_PEER, PEER, child, has_peer, middle
from wire_raw import RawClient

from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.host_buffers import HostBuffers

ENCODINGS = {
    "ours, `hidden`, aux fp8": ("hidden", "float8_e4m3"),
    "ours, `hidden`": ("hidden", "model"),
    "ours, `logits`": ("logits", "model"),
    "ours, `probs`": ("probs", "model"),
}
RAW, RAW_MIB = "plain socket", 64
IN_FLIGHT = 2


@dataclass(frozen=True)
class Case:
    """What is fetched again and again: one batch, or a body of the plain socket."""

    fetch: Callable[[], object]
    nbytes: int
    """Of one answer's body."""
    in_flight: int
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gigabits", type=float, nargs="+", default=[1, 2.5, 10])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--supervised", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement, at least")
    add_output_options(parser)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.tokens, arguments.rounds, arguments.seconds = 32, 2, 0.02
    results: dict[str, Any] = {"provenance": provenance("links.py", words), "links": {}}
    notes = [] if has_peer() else [NO_PEER + "."]
    tables = []
    with servers(arguments) as ports:
        ceiling = relay_ceiling(ports[RAW], arguments.quick)
        results["relay_ceiling_gigabits"] = ceiling
        for wanted in arguments.gigabits:
            gigabits = min(wanted, ceiling)
            if gigabits < wanted:
                notes.append(
                    f"The relay here passes no more than {ceiling:.1f} Gb/s, so that stands for "
                    f"{wanted:g} Gb/s."
                )
            with linked(gigabits, ports, arguments) as cases:
                rounds = measure(cases, gigabits, arguments)
            results["links"][f"{wanted:g}"] = {
                "gigabits": gigabits,
                "cases": {
                    name: {"bytes": case.nbytes, "tokens": case.tokens, "seconds": rounds[name]}
                    for name, case in cases.items()
                },
            }
            tables.append(table(cases, rounds, gigabits))
    parts = [reading(arguments, ceiling), *notes, *tables]
    publish(arguments.out, "links", "Links", results, parts)
    return 0


def reading(arguments: argparse.Namespace, ceiling: float) -> str:
    return (
        f"Batches of {arguments.tokens} tokens, {arguments.supervised:.0%} supervised, at 8B "
        f"dimensions (H {EIGHT_B.hidden_size}, D {EIGHT_B.draft_vocab_size}), bf16; "
        f"{arguments.rounds} interleaved rounds, median (range). Time runs from asking to decoded "
        "tensors on the client, checksums taken and checked, or the peer's codec, included; what a "
        "trainer's device does then (the draft head for `hidden`, a softmax for `logits`) is not. "
        f"Ours has {IN_FLIGHT} requests in flight, the peer the one it allows. Server, relay, "
        f"client and {torch.get_num_threads()} threads share this machine's cores; unpaced the "
        f"relay passes {ceiling:.1f} Gb/s from a plain socket. The share of the link counts the "
        "answers' bodies."
    )


@contextmanager
def servers(arguments: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Start the servers; yields their ports."""
    batch = ["--tokens", str(arguments.tokens), "--supervised", str(arguments.supervised)]
    kinds = {RAW: ["raw", "--mib", "1", str(RAW_MIB)], "ours": ["service"]}
    if has_peer():
        kinds[PEER] = ["peer_service", *batch]
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(child("wire_servers.py", *words))["port"]
            for name, words in kinds.items()
        }


def relay_ceiling(port: int, quick: bool) -> float:
    """Return the Gb/s that the relay passes when nothing is paced: the best of three."""
    mib = 1 if quick else RAW_MIB
    rates = []
    with (
        child("relay.py", "--gigabits", "0", "--ports", str(port)) as relay,
        RawClient(relay["ports"][str(port)], mib) as client,
    ):
        client.receive(mib)
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(4):
                client.receive(mib)
            rates.append(4 * mib * MIB * 8 / 1e9 / (time.perf_counter() - started))
    return max(rates)


@contextmanager
def linked(
    gigabits: float, ports: dict[str, int], arguments: argparse.Namespace
) -> Iterator[dict[str, Case]]:
    """Put a link before the servers; yields what fetches a batch through it, by name."""
    words = ["--gigabits", str(gigabits), "--ports", *map(str, ports.values())]
    with ExitStack() as stack:
        relay = stack.enter_context(child("relay.py", *words))
        through = {name: relay["ports"][str(port)] for name, port in ports.items()}
        mib = 1 if arguments.quick else RAW_MIB
        raw = stack.enter_context(RawClient(through[RAW], mib))
        cases = {RAW: Case(partial(raw.receive, mib), mib * MIB, 1, 0)}
        connection = Connection(
            f"http://127.0.0.1:{through['ours']}", token=None, timeout_s=60, buffers=HostBuffers()
        )
        stack.callback(connection.close)
        batch = token_batch(arguments.tokens, arguments.supervised)
        vocab = DraftVocab.from_ids(torch.arange(EIGHT_B.draft_vocab_size))
        connection.ensure_registered(vocab, EIGHT_B.vocab_size)
        for name, (encoding, aux_dtype) in ENCODINGS.items():
            _, frame = pack_request(
                batch,
                request_id="links",
                draft_vocab_digest=vocab.digest,
                encoding=encoding,
                aux_dtype=aux_dtype,
            )
            before = connection.bytes_received
            connection.supervise(frame, "links")  # the server makes its answer, unmeasured
            nbytes = connection.bytes_received - before
            fetch = partial(connection.supervise, frame, "links")
            cases[name] = Case(fetch, nbytes, IN_FLIGHT, arguments.tokens)
        if PEER in through:
            cases[PEER] = peer_case(stack, through[PEER], arguments.tokens, batch)
        yield cases


def peer_case(stack: ExitStack, port: int, tokens: int, batch: Any) -> Case:
    from nemo_automodel.components.speculative.eagle.remote import RemoteEagle3TargetModel, wire

    stack.enter_context(mock.patch.dict("os.environ", NEMO_EAGLE_ENABLE_NCCL="0"))
    client = RemoteEagle3TargetModel.from_urls([f"http://127.0.0.1:{port}"], device="cpu")
    ids = torch.arange(EIGHT_B.draft_vocab_size)
    client.set_vocab_mapping(ids, torch.zeros(EIGHT_B.vocab_size, dtype=torch.bool))
    arrays = (batch.input_ids, batch.attention_mask.long(), batch.loss_mask.long())
    answer = client.generate_batch(*arrays)  # also the unmeasured first
    names = ("aux_hidden_states", "target_probs", "position_mask", "input_ids", "loss_mask")
    nbytes = len(wire.encode({name: getattr(answer, name) for name in names}))
    # The client is not closed: that would stop the server, which the next link needs.
    return Case(partial(client.generate_batch, *arrays), nbytes, 1, tokens)


def measure(
    cases: dict[str, Case], gigabits: float, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Return seconds per fetch in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in range(arguments.rounds):
            for name, case in cases.items():
                one = case.nbytes * 8 / gigabits / 1e9
                count = max(math.ceil(arguments.seconds / one), case.in_flight)
                started = time.perf_counter()
                if case.in_flight == 1:
                    for _ in range(count):
                        case.fetch()
                else:
                    for future in [pool.submit(drop, case.fetch) for _ in range(count)]:
                        future.result()
                seconds[name].append((time.perf_counter() - started) / count)
    return seconds


def drop(fetch: Callable[[], object]) -> None:
    """Fetch, and hold nothing: a trainer is done with a batch when the next comes."""
    fetch()


def table(cases: dict[str, Case], rounds: dict[str, list[float]], gigabits: float) -> str:
    lines = []
    for name, case in cases.items():
        share = [case.nbytes * 8 / gigabits / 1e9 / value for value in rounds[name]]
        speeds = [case.tokens / value for value in rounds[name]]
        ratio = "-"
        if PEER in rounds and case.tokens:
            pairs = zip(rounds[PEER], rounds[name], strict=True)
            ratio = f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"
        bytes_per_token = f"{case.nbytes / case.tokens:,.0f}" if case.tokens else "-"
        shown = middle(speeds, 0) if case.tokens else "-"
        lines.append([name, bytes_per_token, shown, middle(share), ratio])
    header = ["what", "bytes/token", "tokens/s", "share of the link", "/ peer"]
    return f"{gigabits:.3g} Gb/s:\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    sys.exit(main())
