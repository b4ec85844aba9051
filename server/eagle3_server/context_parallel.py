"""`ContextParallel`: one forward whose sequence is split over processes that hold the whole model.

Each rank runs the decoder on its own columns, one after another in the order of ranks. To the model
the columns before them are a cache: transformers' masks, windows and positions for a prompt that is
prefilled in chunks then hold as they are. Only that the cache is not kept from an earlier forward,
but gathered from the ranks, layer by layer, when attention asks for it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from eagle3_schemas.errors import InvalidRequest, TargetFailed
from eagle3_schemas.tensors import byte_view, flat_bytes
from eagle3_server.device_errors import is_out_of_memory

logger = logging.getLogger(__name__)

_FEWEST_COLUMNS = 16  # of a rank: matmuls of fewer rows take other kernels


@dataclass(frozen=True)
class ContextParallel:
    """The ranks a sequence is split over. Not thread-safe: every rank calls the same, in order.

    Attributes:
        group: torch's process group; None is the default one.
        rank: of this process in it.
        size: of the group.
        device: that the group's tensors are on.
    """

    group: Any  # torch's own type is not exported everywhere
    rank: int
    size: int
    device: torch.device

    @classmethod
    def of_mesh(cls, mesh: Any, device: torch.device) -> ContextParallel:
        """Take the group of a one-dimensional `DeviceMesh`, for a model on `device`.

        Raises:
            InvalidRequest: a mesh of several dimensions; take the submesh that is meant.
        """
        if mesh.ndim != 1:
            raise InvalidRequest(
                f"cp_mesh must have one dimension, got {mesh.ndim}: {mesh}. Pass the submesh, as "
                'mesh["cp"]'
            )
        return cls(mesh.get_group(), mesh.get_local_rank(), mesh.size(), device)

    def splits(self, length: int) -> bool:
        """Whether sequences of so many columns are split; shorter ones every rank runs whole."""
        return self.size > 1 and length >= _FEWEST_COLUMNS * self.size

    def span(self, length: int) -> tuple[int, int]:
        """Return this rank's columns of so many: the first, and the one after the last."""
        return self._span(self.rank, length)

    def _span(self, rank: int, length: int) -> tuple[int, int]:
        each, longer = divmod(length, self.size)
        start = rank * each + min(rank, longer)
        return start, start + each + (rank < longer)

    def cache(self, num_layers: int, length: int) -> Cache:
        """Return what the model takes for the keys and values of the columns before this rank's."""
        return Cache(layers=[_GatheringLayer(self, length)] * num_layers)

    def gather(
        self, part: torch.Tensor, dim: int, length: int, ranks: int | None = None
    ) -> torch.Tensor:
        """Return all columns, of which this rank has `span`.

        Args:
            part: of any dtype, this rank's columns along `dim`.
            dim: of the columns.
            length: of all columns.
            ranks: how many ranks' columns to return, from the first; all by default.
        """
        counts = [stop - start for start, stop in (self._span(r, length) for r in range(self.size))]
        return self._gather(part, dim, counts, self.size if ranks is None else ranks)

    def _gather(self, part: torch.Tensor, dim: int, counts: list[int], ranks: int) -> torch.Tensor:
        dim %= part.ndim
        short = max(counts) - part.shape[dim]
        if short:  # every rank sends as much
            part = pad(part, [0, 0] * (part.ndim - 1 - dim) + [0, short])
        part = part.contiguous()
        everyone = part.new_empty(self.size, *part.shape)
        if part.numel():
            # As bytes: not every backend knows every dtype.
            dist.all_gather([flat_bytes(each) for each in everyone], flat_bytes(part), self.group)
        taken = zip(everyone, counts[:ranks], strict=False)
        return torch.cat([each.narrow(dim, 0, count) for each, count in taken], dim)

    def share_rows(
        self, compute: Callable[[tuple[int, int]], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Compute each rank's share of some rows, and return all of them.

        Args:
            compute: (rank, ranks) -> that share's tensors: `position_mask` [B, T] bool, true in its
                share alone, and others [n, …], one row for each of its own.

        Raises:
            TargetFailed: of the first rank that raised it.
            torch.OutOfMemoryError: a rank ran out of memory.
            RuntimeError: a rank raised something else, which its log has.
        """
        words, tensors = "", {}
        try:
            tensors = compute((self.rank, self.size))
        except Exception as exc:  # of this rank's rows alone: the others must hear of it
            words = _in_words(exc)
        self._raise_first(words)
        whole: dict[str, torch.Tensor] = {}
        for name, part in sorted(tensors.items()):  # one order for all, whatever the dict's is
            if name == "position_mask":
                either = part.to(torch.uint8)
                dist.all_reduce(either, dist.ReduceOp.MAX, self.group)
                whole[name] = either.bool()
            else:
                whole[name] = self._gather(part, 0, self._counts(part.shape[0]), self.size)
        return whole

    def _counts(self, count: int) -> list[int]:
        """Return every rank's count."""
        counts = torch.zeros(self.size, 1, dtype=torch.int64, device=self.device)
        dist.all_gather([*counts], counts.new_full((1,), count), self.group)
        return [int(each) for each in counts]

    def _raise_first(self, words: str) -> None:
        """Raise what the first rank that has words says, on every rank."""
        mine = torch.tensor(list(words.encode()), dtype=torch.uint8, device=self.device)
        counts = self._counts(mine.numel())
        for said in torch.split(self._gather(mine, 0, counts, self.size), counts):
            if said.numel():
                kind, _, detail = bytes(said.tolist()).decode().partition(":")
                raise _KINDS[kind](detail)

    def check_same(self, call: int, *tensors: torch.Tensor | None) -> None:
        """Compare what this rank is about to compute with the others'.

        Args:
            call: how many came before it.
            tensors: of the batch.

        Raises:
            InvalidRequest: another rank has another batch, on every rank.
        """
        digest = hashlib.sha256(str(call).encode())
        for each in tensors:
            shape = None if each is None else (each.shape, each.dtype)
            digest.update(str(shape).encode())
            if each is not None:
                digest.update(byte_view(each.detach().cpu().contiguous()))
        codes = self._counts(int.from_bytes(digest.digest()[:7], "big"))
        others = [rank for rank, code in enumerate(codes) if code != codes[self.rank]]
        if others:
            raise InvalidRequest(
                f"rank {self.rank} of the context-parallel mesh has another batch than ranks "
                f"{others}: expected the same tensors in the same order on every rank. Shard data "
                "over the other dimensions of the mesh, not over this one"
            )


_KINDS: Final[dict[str, type[Exception]]] = {
    "rows": TargetFailed,
    "memory": torch.OutOfMemoryError,
    "other": RuntimeError,
}


def _in_words(error: Exception) -> str:
    """Return what ranks tell one another of an error: a key of `_KINDS`, a colon, its words."""
    if isinstance(error, TargetFailed):
        return f"rows:{error.detail}"
    if is_out_of_memory(error):
        return f"memory:{error}"
    logger.error("the head's rows failed on this rank", exc_info=error)
    return f"other:{type(error).__name__} on a rank: {error!s:.500}"


class _GatheringLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer's keys and values up to this rank's last column, whatever the layer."""

    def __init__(self, context: ContextParallel, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._context, self._length = context, length
        self._start, self._stop = context.span(length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is kept."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [B, heads, columns, head size] of all columns up to this rank's last one.

        No query sees further, and so this is what a cache would hold.
        """
        ranks = self._context.rank + 1
        keys, values = (
            self._context.gather(states, -2, self._length, ranks)
            for states in (key_states, value_states)
        )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there are, and the first one's position."""
        return self._stop, 0

    def get_seq_length(self) -> int:
        """Return how many columns come before this rank's."""
        return self._start

    def get_max_length(self) -> int:
        """Say that there is none."""
        return -1
