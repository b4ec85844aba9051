"""Peak memory of one supervised batch, in a process of its own; `head.py` starts it.

Peak above weights: the process's VmHWM during the batch minus its VmRSS before it. Before it the
model is loaded and has run a small batch, free heap memory is given back and VmHWM is reset, so
neither the weights nor what a library keeps for ever count. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import MIB, served
from head_model import AUX_LAYER_IDS, ModelShape, colocated, draft_vocab, make_batch, make_model

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas.encodings import ENCODINGS
from eagle3_server import TransformersTarget
from eagle3_server.allocator import keep_freed_memory
from eagle3_server.forward import forward_with_aux
from eagle3_server.supervise import supervise_rows

PATHS = ("served", "colocated", "backbone", "head")
FIXED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""glibc raises this threshold up to 32 MiB as large blocks are freed, and then keeps such blocks;
fixed, it gives each back at once: what is left is what the request really needs."""


def peak_mib(
    arguments: list[str], path: str, encoding: str, length: int, dtype: str, malloc: str = "default"
) -> float:
    """Return the peak of one batch in a fresh process, MiB above weights.

    Args:
        arguments: the model's shape, as `ModelShape` parses it.
        path: `served`: the server's process while a trainer in this one asks it; `colocated`: the
            full-logits path; `backbone`: its decoder alone; `head`: only the rows-only head.
        encoding: of the served rows.
        length: T.
        dtype: of the model.
        malloc: `default`, `fixed` for `FIXED_MALLOC`, or `serve` for what that command sets.
    """
    environment = os.environ | (FIXED_MALLOC if malloc == "fixed" else {})
    command = [sys.executable, __file__, *arguments, "--path", path, "--encoding", encoding]
    command += ["--length", str(length), "--dtype", dtype]
    command += ["--keep-freed-memory"] if malloc == "serve" else []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        if path == "served":
            shape = ModelShape.parse(arguments)
            url = json.loads(child.stdout.readline())["url"]
            with RemoteEagle3Backend(
                url, retry_for_s=5, timeout_s=600, encoding=encoding
            ) as client:
                client.set_vocab_mapping(*draft_vocab(shape))
                client.generate_batch(*make_batch(shape, 16))
                for line in ("ready", "done"):
                    child.stdin.write(line + "\n")
                    child.stdin.flush()
                    if line == "ready":
                        child.stdout.readline()
                        client.generate_batch(*make_batch(shape, length))
                answer = child.stdout.readline()
        else:
            answer = child.stdout.readline()
    if not answer:
        raise RuntimeError(f"the measuring process failed: {' '.join(command[2:])}")
    return float(json.loads(answer)["peak_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", choices=PATHS, required=True)
    parser.add_argument("--encoding", required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--keep-freed-memory", action="store_true")
    own, rest = parser.parse_known_args()
    if own.keep_freed_memory and not keep_freed_memory():
        raise RuntimeError("this allocator cannot keep freed memory, as `serve` makes it")
    shape = ModelShape.parse(rest)
    model = make_model(shape, getattr(torch, own.dtype))
    if own.path == "served":
        target = TransformersTarget(model, model_id="random", aux_layer_ids=AUX_LAYER_IDS)
        with served(target) as url:
            say(url=url)
            sys.stdin.readline()
            before = settle()
            say(ready=True)
            sys.stdin.readline()
            say(peak_mib=(status("VmHWM") - before) / MIB)
        return
    run, small = measured(own.path, own.encoding, model, shape, own.length)
    small()
    before = settle()
    result = run()
    say(peak_mib=(status("VmHWM") - before) / MIB)
    del result


def measured(
    path: str, encoding: str, model: Any, shape: ModelShape, length: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what to measure, and the same on a small batch; the result counts while it is held."""
    vocab = draft_vocab(shape)
    batch, small = make_batch(shape, length), make_batch(shape, 16)
    if path == "colocated":
        run = colocated(model, vocab)
        return lambda: run(batch), lambda: run(small)
    if path == "backbone":

        def decode(some: Any) -> object:
            with torch.no_grad():
                return model.get_decoder()(
                    input_ids=some[0], attention_mask=some[1], use_cache=False
                )

        return lambda: decode(batch), lambda: decode(small)
    target = TransformersTarget(model, model_id="random")
    head = target._head
    assert head is not None

    def rows(some: Any) -> Callable[[], object]:
        result = forward_with_aux(model, some[0], some[1], AUX_LAYER_IDS, head_to_cut=head.module)
        codec = ENCODINGS[encoding]
        return lambda: supervise_rows(
            target._runner.head_rows(head, result),
            some[2].bool(),
            *vocab,
            codec,
            "position_mask",
            needs_draft_logits=not codec.needs_draft_head,
        )

    return rows(batch), rows(small)


def settle() -> int:
    """Give free heap memory back, reset VmHWM and return VmRSS in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def say(**content: object) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
