"""The rows-only head: memory, time and bytes against the full-logits path and our goals.

Run as ``python benchmarks/head.py``; about ten minutes on two idle cores. With nemo-automodel 0.7.0
installed (``make test-all`` does that) the co-located path is the peer's own code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import torch
from common import (
    Target,
    add_output_options,
    hardware,
    interleaved,
    markdown_table,
    provenance,
    publish,
    ratio,
    served,
    spread,
)
from head_bytes import sizes
from head_memory import FIXED_MALLOC, peak_mib
from head_model import (
    AUX_LAYER_IDS,
    ModelShape,
    Vocab,
    colocated,
    colocated_name,
    covering_vocab,
    draft_vocab,
    make_batch,
    make_model,
)
from torch import Tensor

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import DraftVocab
from eagle3_schemas.exchange import TokenBatch as WireBatch
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.frame import decode
from eagle3_schemas.protocol import FRAME_MEDIA_TYPE, SUPERVISION_PATH
from eagle3_server import TransformersTarget
from text import TokenBatch

REAL = 0.27
QUICK = (
    *("--hidden-size=64", "--vocab-size=20011", "--draft-vocab-size=2000", "--batch-size=2"),
    *("--lengths", "64", "128", "--length=128", "--rounds=2"),
    *("--trim-shape", "64", "6", "1000", "500"),
)
"""Arguments of `--quick`; what else is given wins."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ModelShape.add_to(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--length", type=int, default=512, help="T of all but the growth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["memory", "time", "trim", "bytes"])
    trim_shape = [576, 30, 49152, 12288]  # H, L, V, D
    parser.add_argument("--trim-shape", type=int, nargs=4, default=trim_shape)
    add_output_options(parser)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args([*QUICK, *words] if "--quick" in words else words)
    names = vars(ModelShape()).keys()
    shape = ModelShape(**{name: getattr(arguments, name) for name in names})
    results: dict[str, Any] = {"provenance": provenance("head.py", words)}
    results["colocated"] = colocated_name()
    tables = [f"{hardware()}; co-located path: {results['colocated']}."]
    rows: list[list[str]] = []
    parts: dict[str, Callable[..., list[list[str]]]] = {
        "memory": memory,
        "time": times,
        "trim": trim,
        "bytes": sizes,
    }
    for part in arguments.parts:
        rows += parts[part](shape, arguments, results, tables)
    tables.append(markdown_table(["what", "measured", "target", ""], rows))
    results["verdicts"] = rows
    publish(arguments.out, "head", "Rows-only head", results, tables)
    return 0


def memory(
    shape: ModelShape, arguments: argparse.Namespace, results: dict[str, Any], tables: list[str]
) -> list[list[str]]:
    """Peak MiB above weights, each in a fresh process."""
    lengths = sorted({*arguments.lengths, arguments.length})
    paths, at = ("served", "head", "colocated"), arguments.length
    malloc = {"served": "serve"}
    cases = [
        (path, "hidden", t, "float32", malloc.get(path, "default"))
        for path in paths
        for t in lengths
    ]
    cases += [("backbone", "hidden", at, "float32", "default")]
    cases += [("served", encoding, at, "float32", "serve") for encoding in ("logits", "probs")]
    cases += [("served", "hidden", at, "float32", "fixed")]
    cases += [(path, "hidden", at, "bfloat16", malloc.get(path, "default")) for path in paths]
    cases += [("served", "hidden", at, "bfloat16", "fixed")]
    if arguments.quick:  # each is a process; these show that they run, and what is held to goals
        cases = [case for case in cases if case[0] != "backbone" and case[1] == "hidden"]
        cases = [case for case in cases if case[0] != "served" or case[2] == at]
        cases = [case for case in cases if case[0] == "served" or case[3] == "float32"]
    peaks = {case: peak_mib(shape.arguments(), *case) for case in cases}
    names = ("path", "encoding", "T", "dtype", "malloc")
    results["peak_mib"] = [
        dict(zip((*names, "peak_mib"), (*case, peak), strict=True)) for case, peak in peaks.items()
    ]
    lines = [
        [
            *(path, encoding if path in ("served", "head") else "-", dtype, str(length), malloc),
            f"{peak:,.0f}",
        ]
        for (path, encoding, length, dtype, malloc), peak in peaks.items()
    ]
    tables.append(
        f"Peak memory above weights, B {shape.batch_size}, H {shape.hidden_size}, "
        f"{shape.layers} layers, V {shape.vocab_size}, D {shape.draft_vocab_size}, "
        f"{shape.supervised:.0%} supervised; `head` is the head alone, its output included; malloc "
        "`serve` as that command sets it, "
        f"`fixed` is {', '.join(f'{k}={v}' for k, v in FIXED_MALLOC.items())}:\n\n"
        + markdown_table(["path", "encoding", "dtype", "T", "malloc", "MiB"], lines)
    )
    return [
        Target(f"peak above weights, T {at}, `hidden`, {dtype}, malloc {malloc}", 180, " MiB").row(
            peaks["served", "hidden", at, dtype, malloc]
        )
        for dtype in ("bfloat16", "float32")
        for malloc in ("serve", "fixed")
    ]


def times(
    shape: ModelShape, arguments: argparse.Namespace, results: dict[str, Any], tables: list[str]
) -> list[list[str]]:
    """Ratios of interleaved times on one model in this process."""
    model = make_model(shape, torch.float32)
    batch = make_batch(shape, arguments.length)
    target = TransformersTarget(model, model_id="random", aux_layer_ids=AUX_LAYER_IDS)
    assert target.describe().head == "rows", target.describe().head_reason
    head = model.get_output_embeddings()
    rows = batch.loss_mask.clone()
    rows[:, 0] = 0
    count = int(rows.sum())
    logits = torch.zeros(count, shape.vocab_size)  # touched: the floor pays for no page faults

    def bare() -> Tensor:
        with torch.no_grad():
            states = model.get_decoder()(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state[rows.bool()]
            return torch.mm(states, head.weight.T, out=logits)

    vocab = covering_vocab(shape, bare().argmax(-1))
    with asking(target, vocab) as (post, backend):
        answer = decode(bytearray(post(batch))).tensors["head_input"]
        assert answer.shape[0] == count, "every supervised row must be sent"
        full = colocated(model, vocab)
        seconds = interleaved(
            {
                "bare: backbone + one matmul over the supervised rows": bare,
                "served, hidden": lambda: post(batch),
                "served, logits": lambda: post(batch, "logits"),
                "served, probs": lambda: post(batch, "probs"),
                "served, hidden, rebuilt on this CPU": lambda: backend.generate_batch(*batch),
                "co-located": lambda: full(batch),
            },
            arguments.rounds,
        )
    results["seconds"] = seconds
    bare_name, *served_names, full_name = seconds
    lines = [
        [
            name,
            f"{sorted(values)[len(values) // 2]:.2f}",
            f"{min(values):.2f}-{max(values):.2f}",
            spread(ratio(seconds, name, bare_name)),
            spread(ratio(seconds, name, full_name)),
        ]
        for name, values in seconds.items()
    ]
    tables.append(
        f"Time, float32, T {arguments.length}, {arguments.rounds} interleaved rounds, median "
        "(range); every supervised row is in the draft vocab:\n\n"
        + markdown_table(["what", "s", "range", "/ bare", "/ co-located"], lines)
    )
    wanted = [
        (Target("served, `hidden` / bare", 1.08), served_names[0], bare_name),
        (Target("served, `hidden` / co-located", 0.65), served_names[0], full_name),
    ]
    ratios = {target.what: ratio(seconds, above, below) for target, above, below in wanted}
    results.setdefault("ratios", {}).update(ratios)
    return [
        target.row(ratios[target.what]["median"], spread(ratios[target.what], median=False))
        for target, _, _ in wanted
    ]


def trim(
    shape: ModelShape, arguments: argparse.Namespace, results: dict[str, Any], tables: list[str]
) -> list[list[str]]:
    """Time of a right-padded batch with and without trimming, on two shapes.

    The rows-only head skips padding by itself, so trimming saves only backbone: little of a model
    that is mostly head. The target is for one that is mostly backbone, as real ones are.
    """
    sizes = ("hidden_size", "layers", "vocab_size", "draft_vocab_size")
    real = replace(shape, **dict(zip(sizes, arguments.trim_shape, strict=True)))
    lines, rows = [], []
    for name, some in (("SmolLM2's shape", real), ("the shape above", shape)):
        model, batch = make_model(some, torch.float32), make_batch(some, arguments.length, REAL)
        target = TransformersTarget(model, model_id="random", aux_layer_ids=AUX_LAYER_IDS)
        vocab = draft_vocab(some)
        full = colocated(model, vocab)
        with asking(target, vocab) as (post, _):
            cases = {
                "trimmed": lambda post=post, batch=batch: post(batch),
                "not": lambda post=post, batch=batch: post(batch, exact=True),
                "co-located": lambda full=full, batch=batch: full(batch),
            }
            seconds = interleaved(cases, arguments.rounds)
        results.setdefault("trim_seconds", {})[name] = seconds
        found = ratio(seconds, "trimmed", "not")
        results.setdefault("ratios", {})[f"trimmed / not, {name}"] = found
        lines.append([name, spread(found), spread(ratio(seconds, "trimmed", "co-located"))])
        if some is real:
            target_row = Target("27 % real tokens: trimmed / not, SmolLM2's shape", 0.33)
            rows.append(target_row.row(found["median"], spread(found, median=False)))
    tables.append(
        f"Right-padded batch, every row {REAL:.0%} real tokens, `hidden`, float32:\n\n"
        + markdown_table(["model", "trimmed / not trimmed", "trimmed / co-located"], lines)
    )
    return rows


@contextmanager
def asking(
    target: TransformersTarget, vocab: Vocab
) -> Iterator[tuple[Callable[..., bytes], RemoteEagle3Backend]]:
    """Serve a target; yields a function that posts a batch, and a backend with the draft vocab."""
    options: dict[str, Any] = {"retry_for_s": 5, "timeout_s": 600, "encoding": "hidden"}
    digest = DraftVocab.from_ids(vocab[0]).digest
    with (
        served(target) as url,
        httpx.Client(trust_env=False, timeout=600) as http,
        RemoteEagle3Backend(url, **options) as backend,
    ):
        backend.set_vocab_mapping(*vocab)

        def post(batch: TokenBatch, encoding: str = "hidden", exact: bool = False) -> bytes:
            wire = WireBatch(batch[0], batch[1].bool(), batch[2].bool())
            fields = {"request_id": "bench", "draft_vocab_digest": digest}
            _, frame = pack_request(wire, encoding=encoding, exact=exact, **fields)
            body, kind = b"".join(frame.parts), {"content-type": FRAME_MEDIA_TYPE}
            response = http.post(url + SUPERVISION_PATH, content=body, headers=kind)
            return response.raise_for_status().content

        yield post, backend


if __name__ == "__main__":
    sys.exit(main())
