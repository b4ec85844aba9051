"""`JobRunner`: one forward for a job, and where its logits come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from eagle3_schemas.draft_head import ROW_MULTIPLE, LogitsTransform
from eagle3_schemas.errors import TargetFailed
from eagle3_server.context_parallel import ContextParallel
from eagle3_server.engine import Job
from eagle3_server.forward import ForwardResult, forward_with_aux
from eagle3_server.head import RowsHead
from eagle3_server.packing import Packing, forward_packed
from eagle3_server.supervise import HeadRows


@dataclass(frozen=True)
class JobRunner:
    """A model with what was found of it. Not thread-safe, as the model is not.

    Attributes:
        model: the causal LM.
        device: where it takes its inputs; of several devices, the one results are brought to.
        head: the rows-only head, or None.
        packing: how packed rows run when they must as a co-located trainer's.
        can_trim: whether trailing padding may be cut off.
        full_chunk_rows: rows of full logits to take at once.
        context: ranks that split each sequence, and the head's rows; or None.
    """

    model: nn.Module
    device: torch.device
    head: RowsHead | None
    packing: Packing
    can_trim: bool
    full_chunk_rows: int
    context: ContextParallel | None = None

    def used_columns(self, job: Job) -> int:
        """Return how many columns have to be computed: T, or less without trailing padding.

        Leading columns stay: without explicit positions their removal would move every token.
        """
        if not self.can_trim or job.exact or job.seq_lens is not None:
            return job.input_ids.shape[1]
        used = (job.attention_mask | job.loss_mask).any(dim=0).nonzero()
        return int(used[-1]) + 1 if used.numel() else 1

    def run(
        self, job: Job, columns: int, layer_ids: Sequence[int], head: RowsHead | None
    ) -> ForwardResult:
        """Run the first `columns` of a job, with a head to cut or None."""
        input_ids = job.input_ids[:, :columns].to(self.device)
        to_cut = None if head is None else head.module
        if job.seq_lens is None:
            mask = job.attention_mask[:, :columns].to(self.device)
            return forward_with_aux(
                self.model, input_ids, mask, layer_ids, to_cut, context=self.context
            )
        whole = job.exact or not self.can_trim
        packing = self.packing if whole else self.packing.by_document()
        return forward_packed(
            self.model, packing, input_ids, job.seq_lens, layer_ids, to_cut, self.context
        )

    def rows(
        self, compute: Callable[[tuple[int, int]], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Compute rows of the head, each rank its share; see `ContextParallel.share_rows`."""
        return compute((0, 1)) if self.context is None else self.context.share_rows(compute)

    def needs_full_head(self, job: Job) -> bool:
        """Whether only the model's own full logits are exact.

        On a GPU another matmul shape rounds differently, and on the CPU so does one of fewer than
        16 rows.
        """
        if not job.exact:
            return False
        tokens = job.input_ids.numel()
        if job.seq_lens is not None:
            tokens = self.packing.fewest_tokens(job.seq_lens)
        return self.device.type != "cpu" or tokens < ROW_MULTIPLE

    def head_rows(self, head: RowsHead | None, result: ForwardResult) -> HeadRows:
        """Return the source of a forward's logits, with the head it was cut at."""
        if head is None or result.head_input is None:
            logits = result.logits.flatten(0, 1)
            return HeadRows(
                lambda positions: iter([(0, logits[positions])]),
                None,
                LogitsTransform(),
                self.full_chunk_rows,
                logits.device,
            )
        head_input = result.head_input.flatten(0, 1).to(head.device)
        return HeadRows(
            lambda positions: head.tiles(head_input[positions]),
            head_input.__getitem__,
            head.transform,
            head.chunk_rows,
            head.device,
        )


def check_finite(rows: torch.Tensor, attention_mask: torch.Tensor, names: Sequence[str]) -> None:
    """Raise TargetFailed naming the first state and position that is not finite.

    Args:
        rows: [n, C], states at the attended positions; C is split evenly over `names`.
        attention_mask: [B, T] bool, the positions.
        names: what each part is, for the message.
    """
    # aminmax reads once, allocates nothing, and lets NaN through.
    if rows.numel() == 0 or all(bool(v.isfinite()) for v in torch.aminmax(rows)):
        return
    for name, states in zip(names, rows.chunk(len(names), -1), strict=True):
        bad = (~states.isfinite().all(dim=-1)).nonzero()
        if bad.numel():
            row, position = attention_mask.nonzero()[bad[0, 0]].tolist()
            raise TargetFailed(
                f"{name} at row {row}, position {position}; nothing was sent. Look at this row, "
                "or serve the target in a wider dtype (--dtype bfloat16 or float32)"
            )


def aux_names(layer_ids: Sequence[int]) -> list[str]:
    """Return what `check_finite` calls the layers' states."""
    return [f"decoder layer {i} gave non-finite aux_hidden_states" for i in layer_ids]
