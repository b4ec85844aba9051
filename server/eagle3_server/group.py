"""`Group`: the processes that run one target together, and the commands that keep them in step.

Rank 0 serves; before each computation it tells the others which, and all run it side by side. Only
the thread that owns the target may use a group: collectives of two threads would mix. Commands are
read back by torch's `weights_only` loader, which builds tensors and plain values and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from eagle3_schemas.errors import InvalidRequest

LISTEN_FD_VARIABLE = "EAGLE3TP_LISTEN_FD"
"""File descriptor of a socket that listens for the group's ranks, of a launcher to rank 0."""

_LEADER = 0
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_here() -> int | None:
    """Return this process's rank by torchrun's variables, or None where none is set.

    Raises:
        InvalidRequest: RANK without the others, or no numbers.
    """
    if "RANK" not in os.environ:
        return None
    missing = [name for name in _TORCHRUN if not os.environ.get(name)]
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if missing or not all(number.isdigit() for number in numbers):
        got = {name: os.environ.get(name) for name in _TORCHRUN}
        raise InvalidRequest(
            "RANK is set, so this is taken for one of torchrun's ranks: expected "
            f"{', '.join(_TORCHRUN)}, numbers but the third; got {got}. Unset RANK to have the "
            "ranks started here, or start them with torchrun"
        )
    return int(os.environ["RANK"])


class GroupBroken(RuntimeError):
    """A process of the group is gone, or did something else than the others: nothing can go on."""


@dataclass(frozen=True)
class Group:
    """A process's membership in a group. Not thread-safe.

    Attributes:
        rank: of this process; 0 leads.
        size: processes.
        device: this process's.
        timeout_s: seconds a process waits for the others.
        control: a gloo group for commands, whatever the tensors travel through.
    """

    rank: int
    size: int
    device: torch.device
    timeout_s: float
    control: Any  # torch's own type is not exported everywhere

    @classmethod
    def join(cls, device: torch.device, timeout_s: float) -> Group:
        """Meet the others, by torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

        Args:
            device: `cpu`, or `cuda`, of which LOCAL_RANK says which.
            timeout_s: seconds that a process waits for the others, here and later.

        Raises:
            RuntimeError: the others did not come.
        """
        backend = "gloo"
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=timeout_s)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = None
        if LISTEN_FD_VARIABLE in os.environ:
            # A launcher's own socket, on loopback: torch's would listen on every interface.
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                size,
                is_master=rank == _LEADER,
                timeout=timeout,
                master_listen_fd=int(os.environ[LISTEN_FD_VARIABLE]) if rank == _LEADER else None,
            )
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(rank, size, device, timeout_s, control)

    def tell(self, command: dict[str, Any]) -> None:
        """Tell the others what is computed next; the leader's.

        Args:
            command: tensors on the CPU and plain values.

        Raises:
            GroupBroken: one of them is gone.
        """
        buffer = io.BytesIO()
        torch.save(command, buffer)
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        self._broadcast(torch.tensor([data.numel()]))
        self._broadcast(data.clone())

    def hear(self) -> dict[str, Any]:
        """Wait for the leader's next command.

        Raises:
            GroupBroken: the leader is gone, or said nothing for `timeout_s`.
        """
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast(size)
        data = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(data)
        command: dict[str, Any] = torch.load(
            io.BytesIO(data.numpy().tobytes()), weights_only=True, map_location="cpu"
        )
        return command

    def _broadcast(self, tensor: torch.Tensor) -> None:
        try:
            dist.broadcast(tensor, src=_LEADER, group=self.control)
        except RuntimeError as exc:
            who = "a process" if self.rank == _LEADER else "the leader"
            raise GroupBroken(f"{who} of the group is gone, or silent: {exc!s:.300}") from exc

    def prove(self) -> None:
        """Run a collective on the group that tensors travel in, which one that timed out breaks.

        Raises:
            GroupBroken: it cannot be used any more.
        """
        try:
            dist.all_reduce(torch.zeros(1, device=self.device))
        except RuntimeError as exc:
            raise GroupBroken(f"the group's collectives fail: {exc!s:.300}") from exc

    def check_same(self, text: str, what: str) -> None:
        """Compare a text with the other ranks'.

        Raises:
            GroupBroken: it differs, or one of them is gone.
        """
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        others = self._others(digest)
        if others:
            raise GroupBroken(
                f"ranks {others} have other {what} than rank {self.rank}, which has {text:.500}"
            )

    def agree(self, outcome: BaseException | None) -> None:
        """Compare how a computation ended here with how it did elsewhere.

        Args:
            outcome: what it raised here, or None.

        Raises:
            GroupBroken: another process ended it in another way, or is gone.
        """
        name = "success" if outcome is None else type(outcome).__name__
        others = self._others(zlib.crc32(name.encode()))
        if others:
            raise GroupBroken(
                f"a computation ended with {name} on rank {self.rank} and in another way on ranks "
                f"{others}; their logs say how"
            ) from outcome

    def _others(self, code: int) -> list[int]:
        """Return the ranks whose code is another one."""
        mine = torch.tensor([code])
        codes = [torch.zeros_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(codes, mine, group=self.control)
        except RuntimeError as exc:
            raise GroupBroken(f"a process of the group is gone: {exc!s:.300}") from exc
        return [rank for rank, each in enumerate(codes) if int(each) != code]

    def leave(self) -> None:
        """Close the group's connections."""
        dist.destroy_process_group()
