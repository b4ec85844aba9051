"""The head for the rows that are needed, found and proven on a probe; never [B, T, V].

One hook on the output embeddings does it: it keeps the head's whole input and lets the model's own
forward go on with a single row, whatever the family does in between. The rows needed are then taken
through the head in tiles of rows x ids, and through what the model does to its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import nn
from torch.nn.functional import linear

from eagle3_schemas.draft_head import ROW_MULTIPLE, LogitsTransform, pad_rows
from eagle3_server.layout import max_sequence_length, text_config
from eagle3_server.placement import device_of, is_offloaded, weights_of
from eagle3_server.sharding import is_sharded, whole

_CPU_TILE_BYTES = 4 * 1024 * 1024  # stays in the cache between the matmul and the reductions
_CPU_CHUNK_ROWS = 2048  # a matmul packs the weights anew: dear for few rows
_SAME_HEAD = 1e-3  # relative: the same matmul, and no quantised activation comes so close
_MIN_TILE_IDS = 64  # of fewer than 16 columns, matmuls take other kernels

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""input_ids and attention_mask [B, T] -> the model's own logits."""


class HeadUnsupported(Exception):
    """The rows-only head cannot serve this model; the message says why."""


@contextmanager
def cut_head(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Let forwards inside the block compute one row of logits; yields the head's whole input."""
    inputs: list[torch.Tensor] = []

    def keep_and_cut(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        inputs.append(args[0])
        # Contiguous: else linear is a bmm, which reads the weights once for every row.
        return (args[0][:, -1:].contiguous(),)

    handle = head.register_forward_pre_hook(keep_and_cut)
    try:
        yield inputs
    finally:
        handle.remove()


@dataclass(frozen=True)
class RowsHead:
    """A model's output embeddings and what follows them, proven equal to its own full logits.

    Attributes:
        module: the output embeddings.
        transform: what the model does to their output.
        vocab_size: V, the width of the logits.
        chunk_rows: rows taken through the head at once, a multiple of 16.
        tile_bytes: memory that a tile's logits may take; None takes all ids at once.
        device: where the head computes, and its rows must lie.
        is_plain_linear: whether a trainer can rebuild logits from the head's rows (`hidden`).
    """

    module: nn.Module
    transform: LogitsTransform
    vocab_size: int
    chunk_rows: int
    tile_bytes: int | None
    device: torch.device
    is_plain_linear: bool

    @classmethod
    def find(cls, model: nn.Module, forward: Forward, chunk_bytes: int) -> RowsHead:
        """Find the head, and prove it on a probe of two unequal rows.

        Args:
            model: the target.
            forward: runs the model and returns its logits.
            chunk_bytes: memory that a chunk's logits may take.

        Raises:
            HeadUnsupported: no head module, or its rows are not the model's logits.
        """
        getter = getattr(model, "get_output_embeddings", None)
        module = getter() if getter is not None else None
        if not isinstance(module, nn.Module):
            raise HeadUnsupported("the model has no output embeddings module")
        input_ids, attention_mask = probe_batch(model)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen.append((args[0] if args else torch.empty(0), out))

        handle = module.register_forward_hook(keep)
        try:
            logits = forward(input_ids, attention_mask)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0][0].shape[:2] != input_ids.shape or seen[0][0].ndim != 3:
            raise HeadUnsupported(
                "its forward does not call the output embeddings once on [B, T, H]"
            )
        head_input, head_output = seen[0]
        logits = logits.to(head_output.device)  # accelerate gives them where the ids were
        transform = _find_transform(model, head_output, logits)
        itemsize = max(logits.element_size(), head_output.element_size())
        tile_bytes, ids, most_rows = None, logits.shape[-1], chunk_bytes
        is_plain = _is_plain_linear(module) and _is_its_weights(module, head_input, head_output)
        is_whole = is_plain and not is_sharded(module.weight)  # type: ignore[arg-type]
        if is_whole and not is_offloaded(module) and head_output.device.type == "cpu":
            tile_bytes = min(chunk_bytes, _CPU_TILE_BYTES)
            ids, most_rows = _MIN_TILE_IDS, _CPU_CHUNK_ROWS
        rows = min(chunk_bytes // (itemsize * ids), most_rows)
        chunk_rows = max(rows // ROW_MULTIPLE, 1) * ROW_MULTIPLE
        device = head_output.device
        width = logits.shape[-1]
        found = cls(module, transform, width, chunk_rows, tile_bytes, device, is_plain)
        found._prove(forward, input_ids, attention_mask, head_input, logits)
        return found

    def _prove(
        self,
        forward: Forward,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        head_input: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """Raise HeadUnsupported unless the cut forward and the chunked rows give the same."""
        try:
            with cut_head(self.module) as inputs:
                cut = forward(input_ids, attention_mask)
        except Exception as exc:  # whatever the model does with logits of an unexpected shape
            raise HeadUnsupported(f"its forward fails with a cut head: {exc}") from exc
        if cut.shape[1] != 1 or len(inputs) != 1 or not torch.equal(inputs[0], head_input):
            raise HeadUnsupported("a forward with a cut head is not the same forward")
        for count, error, is_same in self.compare(head_input, logits):
            if not is_same:
                raise HeadUnsupported(f"{count} rows differ from the full logits by {error:.3g}")

    def compare(
        self, head_input: torch.Tensor, logits: torch.Tensor
    ) -> Iterator[tuple[int, float, bool]]:
        """Take one row, some, and all through the head, and hold them against full logits.

        Args:
            head_input: [B, T, H], what the model gave its head.
            logits: [B, T, V], what it made of that.

        Yields:
            A number of rows, their largest difference, and whether that is none, or rounding.
        """
        rows, full = head_input.flatten(0, 1).to(self.device), logits.flatten(0, 1).to(self.device)
        for count in (1, 17, rows.shape[0]):
            got = torch.cat([tile for _, tile in self.tiles(rows[:count])], dim=-1)
            expected = full[:count]
            if got.shape != expected.shape:
                yield count, float("inf"), False
                continue
            is_same = (
                torch.equal(got, expected)
                if rows.device.type == "cpu"
                # Another matmul shape takes other kernels on a GPU; an error of the method
                # (a missing scale, a wrong row) is orders of magnitude larger.
                else torch.allclose(got.float(), expected.float(), rtol=0.05, atol=0.05)
            )
            yield count, (got.float() - expected.float()).abs().max().item(), is_same

    def tiles(self, head_input: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Give the rows' logits as the model's own forward does, tile by tile in the order of ids.

        On the CPU a tile is all rows by some ids: the head's weights are read once, as in one
        matmul over all rows, and the tile is still in the cache when it is reduced.

        Args:
            head_input: [N, H] on the head's device, N up to `chunk_rows`.

        Yields:
            The first id of a tile, and the logits [N, ids in the tile].
        """
        count, rows = head_input.shape[0], pad_rows(head_input)
        if self.tile_bytes is None:
            yield 0, self.transform(self.module(rows))[:count]
            return
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        bias: torch.Tensor | None = self.module.bias  # type: ignore[assignment]
        row_bytes = max(rows.shape[0], ROW_MULTIPLE) * rows.element_size()
        width = max(self.tile_bytes // row_bytes, _MIN_TILE_IDS)
        parts = max(self.vocab_size // width, 1)
        # All about as wide: a narrow last tile would take another kernel.
        edges = [self.vocab_size * i // parts // ROW_MULTIPLE * ROW_MULTIPLE for i in range(parts)]
        for start, end in pairwise([*edges, self.vocab_size]):
            part = linear(rows, weight[start:end], None if bias is None else bias[start:end])
            yield start, self.transform(part)[:count]

    def draft_rows(
        self, selected_token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the head's weight [D, H] and bias [D] or None for a draft vocab.

        Raises:
            HeadUnsupported: the head is not a plain, unquantised linear.
        """
        if not self.is_plain_linear:
            raise HeadUnsupported("the head is not a plain unquantised linear")
        ids = selected_token_ids.to(self.device)
        with weights_of(self.module):
            weight, bias = self.module.weight, self.module.bias
            rows = whole(weight.detach()).index_select(0, ids)  # type: ignore[operator]
            return rows, None if bias is None else whole(bias.detach())[ids]  # type: ignore[operator]


def _is_plain_linear(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.is_floating_point()
        and (type(module.weight.data) is torch.Tensor or is_sharded(module.weight.data))
    )


def _is_its_weights(module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether a head gives what its weights say.

    Packages that quantise may leave the class, and replace a module's forward.
    """
    if is_sharded(module.weight):  # type: ignore[arg-type]
        return True
    with torch.no_grad(), weights_of(module):
        expected = linear(given.to(output.device), module.weight, module.bias)  # type: ignore[arg-type]
    error = (output.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12)
    return float(error) <= _SAME_HEAD


def probe_batch(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fixed input_ids and attention_mask [2, <= 33] where the model takes its inputs."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    weight: torch.Tensor = embeddings.weight
    generator = torch.Generator().manual_seed(0)
    count = min(weight.shape[0], int(getattr(text_config(model), "vocab_size", weight.shape[0])))
    length = min(33, max_sequence_length(model) or 33)
    input_ids = torch.randint(count, (2, length), generator=generator).to(device_of(embeddings))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, length - 4 :] = 0
    return input_ids, attention_mask


def _find_transform(
    model: nn.Module, head_output: torch.Tensor, logits: torch.Tensor
) -> LogitsTransform:
    """Find what the model does to its head's output, by trying what families do, bit for bit."""
    config = text_config(model)

    def options(*names: str) -> list[float | None]:
        values = [getattr(source, name, None) for name in names for source in (model, config)]
        return [None, *{float(v) for v in values if isinstance(v, int | float) and v}]

    candidates = product(
        (False, True),
        # Cohere; Falcon-H1; HyperCLOVA X, which multiplies by what Granite divides by.
        options("logit_scale", "lm_head_multiplier", "logits_scaling"),
        options("logits_scaling"),
        # Gemma; RecurrentGemma.
        options("final_logit_softcapping", "logits_soft_cap"),
    )
    for upcast, multiply, divide, softcap in candidates:
        transform = LogitsTransform(upcast, multiply, divide, softcap)
        result = transform(head_output)
        if result.dtype == logits.dtype and torch.equal(result, logits):
            return transform
    raise HeadUnsupported("the model changes its head's output in a way this version does not know")
