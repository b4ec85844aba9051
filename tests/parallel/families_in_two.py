"""Families over two ranks, sharded and split, against the whole: `measure`, and a rank's program.

Its arguments: a folder both see, and the names of families. Rank 0 prints two JSON lines for each.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tests.families.checks import Case
from tests.families.configs import FAMILIES
from tests.families.full_path import make_job

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.supervision import shift_left_with_zero, unpack_bits
from eagle3_server import ServerSettings
from eagle3_server.group import Group
from eagle3_server.loading import load_target


def measure(names: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Run two ranks over families; what rank 0 said, by name and then by `tp` and `cp`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    here |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.parallel.families_in_two", folder, *names]
        ranks = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**here, "RANK": str(rank)},
                cwd=Path(__file__).parents[2],
            )
            for rank in range(2)
        ]
        with ThreadPoolExecutor(2) as readers:  # a full pipe would stop a rank
            said = [each.result() for each in [readers.submit(r.communicate) for r in ranks]]
    lines = [json.loads(line) for line in said[0][0].splitlines() if line.startswith("{")]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["family"], {})[line["how"]] = line
    assert [len(each) for each in found.values()] == [2] * len(names), "\n".join(
        stderr[-2000:] for _, stderr in said
    )
    return found


def compare(case: Case, got: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Largest differences of a sharded target from the model's own forward."""
    job = make_job()
    expected = case.expected(job)
    probs, position_mask, _ = expected.target(job)
    aux = expected.aux(job.aux_layer_ids)[job.attention_mask].float()
    mask = unpack_bits(got["position_mask"], tuple(position_mask.shape))
    # Of attended tokens: one without a key to attend to averages over all columns it is given.
    both = mask & position_mask & shift_left_with_zero(job.attention_mask)
    rows = torch.zeros(*mask.shape, probs.shape[-1])
    rows[mask] = got["target_probs"]
    return {
        "aux": float(
            (got["aux_hidden_states"].float() - aux).abs().max() / aux.square().mean().sqrt()
        ),
        "probs": float((rows[both] - probs[both]).abs().max()),
        "masks": int((mask ^ position_mask).sum()),
    }


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    group = Group.join(torch.device("cpu"), 120)
    for name in names:
        family = next(each for each in FAMILIES if each.name == name)
        path = Path(folder, family.architecture)
        if group.rank == 0:
            family.build(torch.float32).save_pretrained(path)
        dist.barrier(group.control)
        for how in ("tp", "cp"):
            outcome: dict[str, Any] = {"family": name, "how": how}
            try:
                settings = ServerSettings(model=str(path), device="cpu", **{how: 2})
                target = load_target(settings, group)
                got = target.supervise(make_job()).tensors
                outcome["head"] = target.describe().head
                sharded = sum(hasattr(p, "to_local") for p in target._model.parameters())
                outcome["sharded"] = sharded
                if group.rank == 0:
                    outcome |= compare(Case(family, torch.float32), got)
            except InvalidRequest as exc:  # on both ranks: no plan, or it fails; cannot be split
                outcome["error"] = str(exc)
            if group.rank == 0:
                print(json.dumps(outcome), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
