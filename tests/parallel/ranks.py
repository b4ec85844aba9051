"""A rank of a group whose target does what its arguments say; prints how rank 0's calls ended.

Arguments: seconds that rank 1 stalls in a computation; the group's timeout; the methods to call.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import InvalidRequest
from eagle3_server.group import Group, GroupBroken
from eagle3_server.leading import LeadingTarget, follow


class Stalling:
    """A target with one collective a computation."""

    def __init__(self, group: Group, stall_s: float) -> None:
        self.group, self.stall_s = group, stall_s

    def describe(self) -> SimpleNamespace:
        return SimpleNamespace(device="cpu")

    def input_embeddings(self) -> str:
        if self.group.rank == 1:
            time.sleep(self.stall_s)
        dist.all_reduce(torch.zeros(1))
        return "done"

    def target_head(self) -> str:
        raise RuntimeError("of the model")

    def draft_head(self, _vocab: object) -> str:
        if self.group.rank == 1:
            raise InvalidRequest("on one rank alone")
        return "done"


def main(stall_s: float, timeout_s: float, methods: list[str]) -> None:
    group = Group.join(torch.device("cpu"), timeout_s)
    for text in ("the same", f"rank {group.rank}"):
        try:
            group.check_same(text, "texts")
            print(f"{text}: same", flush=True)
        except GroupBroken as exc:
            print(exc, flush=True)
    target = Stalling(group, stall_s)
    if group.rank == 1:
        try:
            follow(target, group)  # type: ignore[arg-type]
        except GroupBroken as exc:
            print(f"follower: {exc}", flush=True)
        os._exit(0)
    leader = LeadingTarget(target, group)  # type: ignore[arg-type]
    for method in methods:
        arguments = [DraftVocab.from_ids(torch.arange(3))] if method == "draft_head" else []
        try:
            print(f"{method}: {getattr(leader, method)(*arguments)}", flush=True)
        except Exception as exc:
            print(f"{method}: {type(exc).__name__}: {exc!s:.80}", flush=True)
            if isinstance(exc, GroupBroken):
                os._exit(0)
    leader.close()
    os._exit(0)


main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
