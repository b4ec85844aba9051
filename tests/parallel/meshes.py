"""A rank that trains with `HFEagle3TargetModel(model, cp_mesh=…)`; rank 0 prints JSON lines.

Argument: the directory of a Llama.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tests.families.configs import FAMILIES
from torch.distributed.device_mesh import init_device_mesh

from eagle3_schemas import pack_sequences
from eagle3_schemas.errors import InvalidRequest, TargetFailed
from eagle3_server import HFEagle3TargetModel
from eagle3_server.context_parallel import ContextParallel

V = 131


def main(path: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    context = ContextParallel.of_mesh(mesh, torch.device("cpu"))

    def tell(case: str, **found: Any) -> None:
        everyone = [None, None]
        dist.all_gather_object(everyone, found)
        if context.rank == 0:
            print(json.dumps({"case": case, "ranks": everyone}), flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype)
        whole, split = HFEagle3TargetModel(model), HFEagle3TargetModel(model, cp_mesh=mesh)
        columns: list[int] = []
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(lambda _m, args, c=columns: c.append(args[0].shape[1]))
        for name, batch in batches().items():
            expected = whole.generate_batch(**batch)
            columns.clear()
            got = split.generate_batch(**batch)
            attended = batch["attention_mask"].bool()
            aux, logits = got.aux_hidden_states[attended], got.logits
            assert logits is not None
            assert expected.logits is not None
            reference = expected.aux_hidden_states[attended].float()
            error = (aux.float() - reference).abs().max() / reference.square().mean().sqrt()
            earlier = attended[:, 1:]  # of shifted logits, those of attended tokens
            difference = logits[:, :-1] - expected.logits[:, :-1]
            tell(
                f"{name} {dtype}".replace("torch.", ""),
                shape=list(logits.shape),
                columns=list(columns),
                aux=float(error),
                logits=float(difference[earlier].abs().max()),
            )
    plane = init_device_mesh("cpu", (2, 1))
    for name in ("Mamba2", "RecurrentGemma", "plane"):
        other = model if name == "plane" else family(name)
        try:
            HFEagle3TargetModel(other, (0, 2, 4), plane if name == "plane" else mesh)
        except InvalidRequest as exc:
            tell(f"{name} refused", error=str(exc))
    shared(context, tell)
    other_batches(split, context.rank, tell)
    dist.barrier()
    os._exit(0)


def batches() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def batch(*lengths: int, left: bool = False) -> dict[str, torch.Tensor]:
        width = max(lengths)
        columns = torch.arange(width).expand(len(lengths), width)
        mask = (columns < torch.tensor(lengths)[:, None]).long()
        mask = mask.flip(1) if left else mask
        ids = torch.randint(1, V, mask.shape, generator=generator) * mask
        return {"input_ids": ids, "attention_mask": mask, "loss_mask": mask}

    documents = [torch.randint(1, V, (n,), generator=generator) for n in (45, 3, 60)]
    return {
        "right": batch(71, 40, 9),
        "left": batch(71, 40, 9, left=True),
        "one row": batch(64),
        "short": batch(31, 12),
        "packed": pack_sequences(documents, [torch.ones_like(each) for each in documents]),
    }


def family(name: str) -> Any:
    return next(each for each in FAMILIES if each.name == name).build(torch.float32)


def shared(context: ContextParallel, tell: Any) -> None:
    """Rows that the ranks share: all of them, and what one of them finds wrong with its own."""

    def compute(share: tuple[int, int]) -> dict[str, torch.Tensor]:
        rank, _ = share
        mask = torch.zeros(2, 3, dtype=torch.bool)
        mask[rank, 1] = True
        rows = torch.full((3 * rank, 2), float(rank), dtype=torch.bfloat16)  # rank 0 has none
        ones = torch.ones(3, dtype=torch.bfloat16)
        found = {"position_mask": mask, "rows": rows, "ones": ones, "twos": 2 * ones}
        # Names come out of sets, whose order is each process's own.
        return found if rank else dict(reversed(found.items()))

    def fail(share: tuple[int, int]) -> dict[str, torch.Tensor]:
        if share[0] == 1:
            raise TargetFailed("row 7 is not finite: é")
        return compute(share)

    def lack_memory(share: tuple[int, int]) -> dict[str, torch.Tensor]:
        if share[0] == 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return compute(share)

    def err(share: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {} if share[0] else compute((0, 0 // 0))

    cases = {"one fails": fail, "one lacks memory": lack_memory, "one errs": err}
    for name, each in {"shared": compute, **cases, "after it": compute}.items():
        try:
            rows = context.share_rows(each)
            found = {key: value.tolist() for key, value in rows.items()}
            tell(name, dtype=str(rows["rows"].dtype), **found)
        except Exception as exc:
            tell(name, error=str(exc), kind=type(exc).__name__)


def other_batches(split: HFEagle3TargetModel, rank: int, tell: Any) -> None:
    """Each rank with a batch of its own, as a sampler that shards over this dimension gives."""
    mine = torch.full((1, 64), rank + 1)
    same = torch.ones(1, 64, dtype=torch.long)
    for name, ids in (("other batches", mine), ("the same again", same)):
        try:
            tell(name, shape=list(split.generate_batch(ids, same, same).aux_hidden_states.shape))
        except InvalidRequest as exc:
            tell(name, error=str(exc))
    errors = []
    # On both ranks, before either waits for the other in a layer.
    handle = split.model.register_forward_pre_hook(lambda *_: 1 // 0)
    for _ in range(2):
        try:
            split.generate_batch(same, same, same)
        except (ZeroDivisionError, RuntimeError) as exc:
            errors.append(str(exc))
        handle.remove()
    tell("out of step", errors=errors)


main(sys.argv[1])
