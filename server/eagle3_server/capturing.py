"""Outputs beyond EAGLE-3's: one forward, and what the head says of the supervised rows."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from eagle3_schemas.capture import HEAD_OUTPUTS
from eagle3_schemas.host_zeros import host_zeros
from eagle3_schemas.supervision import pack_bits, shift_left_with_zero
from eagle3_server.engine import CaptureJob
from eagle3_server.layout import decoder_layers
from eagle3_server.running import JobRunner, aux_names, check_finite
from eagle3_server.supervise import (
    HeadRows,
    Top,
    check_rows_finite,
    draft_columns,
    share_of,
    top_of,
)

_BLOCK_ROWS = 64  # ordered at once: bounds the copies of their draft-vocab logits


def capture(
    runner: JobRunner, job: CaptureJob, selected: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], float]:
    """Compute a job's outputs.

    Two forwards where `exact` needs the model's own full logits and the head's input besides: see
    `JobRunner.needs_full_head`.

    Args:
        runner: the target.
        job: the job.
        selected: as in `capture_rows`.

    Returns:
        The outputs as `CaptureResponse` lists them, and the seconds the head took.

    Raises:
        TargetFailed: states or logits that are not finite, with their position.
    """
    columns = runner.used_columns(job)
    attention_mask = job.attention_mask[:, :columns].to(runner.device)
    of_head = HEAD_OUTPUTS.intersection(job.outputs)
    is_full = bool(of_head) and runner.needs_full_head(job)
    layer_ids, last = list(job.aux_layer_ids), len(decoder_layers(runner.model)) - 1
    if "last_hidden_prenorm" in job.outputs and last not in layer_ids:
        layer_ids.append(last)
    head = None if is_full and "last_hidden" not in job.outputs else runner.head
    result = runner.run(job, columns, layer_ids, head)
    tensors: dict[str, torch.Tensor] = {}
    if "aux" in job.outputs:
        tensors["aux"] = result.attended_aux(attention_mask, len(job.aux_layer_ids))
        check_finite(tensors["aux"], attention_mask, aux_names(job.aux_layer_ids))
    states = {"last_hidden": result.head_input}
    if "last_hidden_prenorm" in job.outputs:
        states["last_hidden_prenorm"] = result.aux_states[layer_ids.index(last)]
    for name, state in states.items():
        if name in job.outputs:
            assert state is not None
            tensors[name] = state[attention_mask]
            check_finite(tensors[name], attention_mask, [f"non-finite {name}"])
    del states
    started = time.monotonic()
    if of_head:
        if is_full and head is not None:
            result, head = runner.run(job, columns, (), None), None
        source = runner.head_rows(head, result)
        del result  # frees the layers' outputs before the head runs
        loss_mask = job.loss_mask[:, :columns].to(runner.device)
        tensors |= runner.rows(
            lambda share: capture_rows(source, loss_mask, selected, of_head, share)
        )
    if "position_mask" in job.outputs:
        whole = torch.zeros(job.loss_mask.shape, dtype=torch.bool, device=runner.device)
        whole[:, :columns] = shift_left_with_zero(tensors["position_mask"])
        tensors["position_mask"] = pack_bits(whole)
    return {name: tensors[name] for name in job.outputs}, time.monotonic() - started


def capture_rows(
    source: HeadRows,
    loss_mask: torch.Tensor,
    selected: tuple[torch.Tensor, torch.Tensor] | None,
    outputs: Collection[str],
    share: tuple[int, int] = (0, 1),
) -> dict[str, torch.Tensor]:
    """Run the head over the supervised rows; memory grows with rows x D, never with T x V.

    Args:
        source: the head.
        loss_mask: [B, T] bool, unshifted.
        selected: the draft vocab's ids [D] int64 and mask [V] bool; None if no output needs it.
        outputs: names of `HEAD_OUTPUTS`.
        share: as in `supervise_rows`.

    Returns:
        The outputs, on the device of the head: `position_mask` as [B, T] bool, unshifted, the
        others as `CaptureResponse` lists them.

    Raises:
        TargetFailed: logits that are not finite, with their position.
    """
    loss_mask = loss_mask.to(source.device)
    if selected is not None:
        selected = selected[0].to(source.device), selected[1].to(source.device)
    supervised = loss_mask.clone()
    supervised[:, 0] = False  # no position precedes it
    positions = share_of(supervised, share)
    count = positions.numel()
    empty = positions.new_empty(0, dtype=torch.int64) if selected is None else selected[0]
    ordered, order = empty.sort()
    place = order.argsort()
    argmax = positions.new_empty(count)
    total, draft_total = (torch.empty(count, device=positions.device) for _ in range(2))
    shape = (count, ordered.numel())
    wanted = [name for name in ("loss_mask_probs", "loss_mask_logits") if name in outputs]
    # One row for each supervised position, ordered by id until a chunk is whole.
    drafts: dict[str, torch.Tensor] = {}
    for begin in range(0, count, source.chunk_rows):
        rows = slice(begin, begin + source.chunk_rows)
        chunk = positions[rows]
        top: Top | None = None
        total[rows] = draft_total[rows] = float("-inf")
        for start, logits in source.tiles(chunk):
            top = top_of(logits, start, top)
            if "logsumexp" in outputs:
                part = logits.float().logsumexp(-1)
                total[rows] = torch.logaddexp(total[rows], part)
            if "draft_logsumexp" in outputs or wanted:
                first, last, drafted = draft_columns(logits, start, ordered)
                for name in wanted:
                    if name not in drafts:
                        drafts[name] = _rows_of(shape, name, logits)
                    drafts[name][rows, first:last] = drafted
                if "draft_logsumexp" in outputs and last > first:
                    part = drafted.float().logsumexp(-1)
                    draft_total[rows] = torch.logaddexp(draft_total[rows], part)
        assert top is not None
        # A NaN counts as the largest, so the top logit tells of one anywhere in its row.
        check_rows_finite(top.values, chunk, loss_mask.shape[1])
        argmax[rows] = top.ids
        for name in wanted:
            for part in torch.split(drafts[name][rows], _BLOCK_ROWS):  # views of it
                in_order = part.gather(1, place.expand(part.shape[0], -1))
                check_rows_finite(in_order, chunk, loss_mask.shape[1])
                part.copy_(in_order.softmax(-1) if name == "loss_mask_probs" else in_order)
    result = {"argmax": argmax.int(), "logsumexp": total, "draft_logsumexp": draft_total}
    for name in wanted:
        if name not in drafts:  # no rows: their dtype is still the head's
            drafts[name] = _rows_of(shape, name, next(iter(source.tiles(positions)))[1])
        result[name] = drafts[name]
    if selected is not None and "position_mask" in outputs:
        in_vocab = torch.zeros_like(supervised).flatten()
        in_vocab[positions] = selected[1][argmax]
        result["position_mask"] = in_vocab.view_as(supervised)
    return {name: result[name] for name in outputs}


def _rows_of(shape: tuple[int, ...], name: str, logits: torch.Tensor) -> torch.Tensor:
    """Return room for an output's rows: float32 probabilities, or logits as the model gives."""
    dtype = torch.float32 if name == "loss_mask_probs" else logits.dtype
    if logits.device.type == "cpu":
        return host_zeros(shape, dtype)
    return logits.new_empty(shape, dtype=dtype)
