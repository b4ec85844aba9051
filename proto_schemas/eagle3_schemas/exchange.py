"""A supervision request and its response as frames: pack and unpack side by side.

Padding travels in neither direction: aux states come down where `attention_mask` is 1, supervision
for the rows asked for; `tokens` has what goes up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eagle3_schemas.aux_states import aux_shapes, decode_aux
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.draft_vocab import DraftVocab
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import MalformedPayload
from eagle3_schemas.frame import EncodedFrame, Frame, encode
from eagle3_schemas.messages import DraftHeadFields, SupervisionRequest, SupervisionResponse, parse
from eagle3_schemas.supervision import scatter_rows, shift_left_with_zero, unpack_bits
from eagle3_schemas.tokens import TokenBatch, pack_tokens


def pack_request(batch: TokenBatch, **fields: Any) -> tuple[SupervisionRequest, EncodedFrame]:
    """Encode a batch of CPU tensors as a request frame.

    Args:
        batch: CPU tensors that passed `check_batch_shapes`.
        fields: the other fields of `SupervisionRequest`.

    Raises:
        InvalidRequest: an id that does not fit int32, or a field `SupervisionRequest` refuses.
    """
    batch_fields, tensors = pack_tokens(batch)
    request = parse(SupervisionRequest, batch_fields | fields)
    return request, encode(request.model_dump(exclude_defaults=True), tensors)


@dataclass(frozen=True)
class Supervision:
    """A response rebuilt on the trainer's device."""

    aux_hidden_states: torch.Tensor  # [B, T, 3H] model dtype, zeros where not attended
    target_probs: torch.Tensor  # [B, T, D] float32, zeros in rows that were not sent
    position_mask: torch.Tensor  # [B, T, 1] bool


def rows_on_wire(rows: str, position_mask: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Return where supervision rows are sent, [B, T] bool in the shifted frame.

    Args:
        rows: `position_mask`, `loss_mask` or `all`.
        position_mask: [B, T] bool.
        loss_mask: [B, T] bool, already shifted left.

    The last column is never sent: its logits are zeros by definition, so its distribution is
    uniform whatever the model says.
    """
    if rows == "position_mask":
        return position_mask
    if rows == "loss_mask":
        return loss_mask
    mask = torch.ones_like(loss_mask)
    mask[:, -1] = False
    return mask


def unpack_response(
    frame: Frame,
    request: SupervisionRequest,
    batch: TokenBatch,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    draft_vocab_size: int,
    draft_head: DraftHead | None,
    device: torch.device,
) -> tuple[SupervisionResponse, Supervision]:
    """Rebuild the supervision a request asked for; every shape is checked first.

    Args:
        frame: the decoded response; its tensors are moved to `device`, then decoded and spread.
        request: the request it must answer.
        batch: the batch that was sent.
        hidden_size: H of the target.
        dtype: model dtype, of the aux states.
        draft_vocab_size: D of the mapping the request named.
        draft_head: that mapping's head on `device`, where the encoding needs one.
        device: where the result goes.

    Raises:
        MalformedPayload: it answers another request, or its tensors are not what was asked for.
    """
    response = parse(SupervisionResponse, frame.fields)
    for name in ("request_id", "draft_vocab_digest", "encoding", "rows", "aux_dtype"):
        asked, got = getattr(request, name), getattr(response, name)
        if got != asked:
            raise MalformedPayload(f"the answer is to another request: {name} {got}, not {asked}")
    if request.aux_layer_ids not in (None, response.aux_layer_ids):
        raise MalformedPayload(
            f"expected aux_layer_ids {request.aux_layer_ids}, got {response.aux_layer_ids}"
        )
    shape = (request.batch_size, request.sequence_length)
    attended = int(batch.attention_mask.sum())
    width = len(response.aux_layer_ids) * hidden_size
    encoding = ENCODINGS[request.encoding]
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        **aux_shapes(attended, width, request.aux_dtype, dtype),
        "position_mask": ((-(-shape[0] * shape[1] // 8),), torch.uint8),
    }
    for name, (extents, kind) in expected.items():
        tensor = frame.tensors.get(name)
        if tensor is None or tensor.shape != extents or tensor.dtype is not kind:
            got = None if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
            raise MalformedPayload(f"expected {name} {list(extents)} {kind}, got {got}")
    position_mask = unpack_bits(frame.tensors["position_mask"], shape)
    loss_mask = shift_left_with_zero(batch.loss_mask)
    if bool((position_mask & ~loss_mask).any()):
        raise MalformedPayload("position_mask marks positions outside the shifted loss_mask")
    mask = rows_on_wire(request.rows, position_mask, loss_mask)
    count = int(mask.sum())
    columns, dtypes = encoding.columns_and_dtypes(draft_vocab_size, dtype, draft_head)
    rows = frame.tensors.get(encoding.tensor_name)
    if rows is None or rows.shape != (count, columns) or rows.dtype not in dtypes:
        got = None if rows is None else f"{list(rows.shape)} {rows.dtype}"
        raise MalformedPayload(
            f"expected {encoding.tensor_name} [{count}, {columns}] {dtypes[0]}, got {got}"
        )
    # From pinned memory the copies only start here; the caller waits before it reuses that.
    on_device = {name: t.to(device, non_blocking=True) for name, t in frame.tensors.items()}
    probs = encoding.decode(on_device[encoding.tensor_name], draft_head)
    aux = decode_aux(on_device, request.aux_dtype, dtype)
    target_probs = scatter_rows(probs, mask.to(device))
    if request.rows == "all":
        target_probs[:, -1] = 1.0 / draft_vocab_size
    return response, Supervision(
        scatter_rows(aux, batch.attention_mask.to(device)),
        target_probs,
        position_mask.unsqueeze(-1).to(device),
    )


def unpack_draft_head(frame: Frame, draft_vocab: DraftVocab, device: torch.device) -> DraftHead:
    """Rebuild a draft vocab's head on `device`; every shape is checked first.

    Raises:
        InvalidRequest: another draft vocab's head, or its tensors are not [D, H] and [D].
    """
    fields = parse(DraftHeadFields, frame.fields)
    if fields.draft_vocab_digest != draft_vocab.digest:
        raise MalformedPayload(
            f"expected the head of draft vocab {draft_vocab.digest}, got that of "
            f"{fields.draft_vocab_digest}"
        )
    size = draft_vocab.draft_vocab_size
    weight, bias = frame.tensors.get("weight"), frame.tensors.get("bias")
    if weight is None or weight.ndim != 2 or weight.shape[0] != size:
        got = None if weight is None else list(weight.shape)
        raise MalformedPayload(f"expected weight [{size}, H] of the draft vocab's head, got {got}")
    if bias is not None and (bias.shape != (size,) or bias.dtype is not weight.dtype):
        raise MalformedPayload(
            f"expected bias [{size}] {weight.dtype}, got {list(bias.shape)} {bias.dtype}"
        )
    return DraftHead.build(
        weight.to(device),
        None if bias is None else bias.to(device),
        LogitsTransform(fields.upcast, fields.multiply, fields.divide, fields.softcap),
    )
