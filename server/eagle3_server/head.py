"""The head for the rows that are needed, found and proven on a probe; never [B, T, V].

One hook on the output embeddings does it: it keeps the head's whole input and lets the model's own
forward go on with a single row, whatever the family does in between. The rows needed are then taken
through the head in chunks, and through what the model does to its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from eagle3_schemas.draft_head import ROW_MULTIPLE, LogitsTransform, pad_rows
from eagle3_server.layout import max_sequence_length, text_config

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
        return (args[0][:, -1:],)

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
    """

    module: nn.Module
    transform: LogitsTransform
    vocab_size: int
    chunk_rows: int

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
        transform = _find_transform(model, head_output, logits)
        itemsize = max(logits.element_size(), head_output.element_size())
        rows = max(chunk_bytes // (itemsize * logits.shape[-1]), 1)
        chunk_rows = max(rows // ROW_MULTIPLE, 1) * ROW_MULTIPLE
        found = cls(module, transform, logits.shape[-1], chunk_rows)
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
        with cut_head(self.module) as inputs:
            cut = forward(input_ids, attention_mask)
        if cut.shape[1] != 1 or len(inputs) != 1 or not torch.equal(inputs[0], head_input):
            raise HeadUnsupported("a forward with a cut head is not the same forward")
        rows = head_input.flatten(0, 1)
        for count in (1, 17, rows.shape[0]):
            got, expected = self.logits(rows[:count]), logits.flatten(0, 1)[:count]
            is_same = (
                torch.equal(got, expected)
                if rows.device.type == "cpu"
                # Another matmul shape takes other kernels on a GPU; an error of the method
                # (a missing scale, a wrong row) is orders of magnitude larger.
                else torch.allclose(got.float(), expected.float(), rtol=0.05, atol=0.05)
            )
            if not is_same:
                error = (got.float() - expected.float()).abs().max().item()
                raise HeadUnsupported(f"{count} rows differ from the full logits by {error:.3g}")

    def logits(self, head_input: torch.Tensor) -> torch.Tensor:
        """[N, H], N up to `chunk_rows` -> [N, V], as the model's own forward gives them."""
        return self.transform(self.module(pad_rows(head_input)))[: head_input.shape[0]]

    def draft_rows(
        self, selected_token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the head's weight [D, H] and bias [D] or None for a draft vocab.

        Raises:
            HeadUnsupported: the head is not a plain, unquantised linear.
        """
        if not self.is_plain_linear:
            raise HeadUnsupported("the head is not a plain unquantised linear")
        weight, bias = self.module.weight, self.module.bias
        rows = weight.detach().index_select(0, selected_token_ids)  # type: ignore[operator]
        return rows, None if bias is None else bias.detach()[selected_token_ids]  # type: ignore[operator]

    @property
    def is_plain_linear(self) -> bool:
        """Whether a trainer can rebuild logits from the head's rows (encoding `hidden`)."""
        return (
            type(self.module) is nn.Linear
            and self.module.weight.is_floating_point()
            and type(self.module.weight.data) is torch.Tensor
        )


def probe_batch(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fixed input_ids and attention_mask [2, <= 33] on the model's device."""
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    count = min(weight.shape[0], int(getattr(text_config(model), "vocab_size", weight.shape[0])))
    length = min(33, max_sequence_length(model) or 33)
    input_ids = torch.randint(count, (2, length), generator=generator).to(weight.device)
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
        options("logit_scale", "lm_head_multiplier"),
        options("logits_scaling"),
        options("final_logit_softcapping"),
    )
    for upcast, multiply, divide, softcap in candidates:
        transform = LogitsTransform(upcast, multiply, divide, softcap)
        result = transform(head_output)
        if result.dtype == logits.dtype and torch.equal(result, logits):
            return transform
    raise HeadUnsupported("the model changes its head's output in a way this version does not know")
