"""A rank of `sizing.py`: the same batch whole, sharded and split, in turns.

Arguments: small or large, rounds, and the lengths of the row. Rank 0 prints seconds as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import common  # noqa: F401 - puts what head_model imports on the path
import torch
import torch.distributed as dist
from head_model import AUX_LAYER_IDS, ModelShape, draft_vocab, make_model

from eagle3_schemas import DraftVocab
from eagle3_server import ServerSettings
from eagle3_server.engine import SupervisionJob
from eagle3_server.group import Group
from eagle3_server.loading import load_target

SHAPES = {
    "small": ModelShape(hidden_size=256, layers=6, vocab_size=1000, draft_vocab_size=100),
    "large": ModelShape(hidden_size=1024, layers=8, vocab_size=32000, draft_vocab_size=8000),
}


def main(size: str, rounds: int, lengths: list[int]) -> None:
    torch.set_num_threads(1)
    shape = SHAPES[size]
    group = Group.join(torch.device("cpu"), 600)
    folder = [tempfile.mkdtemp() if group.rank == 0 else ""]
    dist.broadcast_object_list(folder)
    path = Path(folder[0])
    if group.rank == 0:
        make_model(shape, torch.float32).save_pretrained(path)
    dist.barrier()
    named = {"model": str(path), "device": "cpu"}
    targets = {
        "tp": load_target(ServerSettings(**named, tp=2), group),
        "cp": load_target(ServerSettings(**named, cp=2), group),
    }
    if group.rank == 0:
        targets["whole"] = load_target(ServerSettings(**named))
    dist.barrier()
    seconds: dict[str, dict[str, list[float]]] = {}
    for length in lengths:
        job = job_of(shape, length)
        found: dict[str, list[float]] = {"whole": [], "tp": [], "cp": []}
        for number in range(rounds + 1):
            for how, times in found.items():
                dist.barrier()
                started = time.perf_counter()
                if how in targets:  # rank 1 waits while rank 0 runs the whole
                    targets[how].supervise(job)
                if number:  # the first warms up
                    times.append(time.perf_counter() - started)
        seconds[str(length)] = found
    if group.rank == 0:
        for each in path.iterdir():
            each.unlink()
        path.rmdir()
        print(json.dumps(seconds), flush=True)
    os._exit(0)


def job_of(shape: ModelShape, length: int) -> SupervisionJob:
    """Return one row of which 60 % is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids, _ = draft_vocab(shape)
    return SupervisionJob(
        input_ids=torch.randint(shape.vocab_size, (1, length), generator=generator),
        attention_mask=torch.ones(1, length, dtype=torch.bool),
        loss_mask=torch.rand(1, length, generator=generator) < shape.supervised,
        aux_layer_ids=AUX_LAYER_IDS,
        draft_vocab=DraftVocab.from_ids(ids),
        encoding="hidden",
        rows="loss_mask",
        aux_dtype="model",
        exact=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(each) for each in sys.argv[3:]])
