"""A supervision request and its response as frames: pack and unpack side by side.

Padding travels in neither direction: ids go up where either mask is 1 (when all the others are one
pad id), aux states come down where `attention_mask` is 1, supervision for the rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eagle3_schemas.aux_states import aux_shapes, decode_aux
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.draft_vocab import DraftVocab
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest, MalformedPayload
from eagle3_schemas.frame import EncodedFrame, Frame, encode
from eagle3_schemas.messages import (
    DraftHeadFields,
    SupervisionRequest,
    SupervisionResponse,
    parse,
)
from eagle3_schemas.packing import check_seq_lens
from eagle3_schemas.supervision import pack_bits, scatter_rows, shift_left_with_zero, unpack_bits


@dataclass(frozen=True)
class TokenBatch:
    """One batch's inputs, [B, T] each."""

    input_ids: torch.Tensor  # int64
    attention_mask: torch.Tensor  # bool
    loss_mask: torch.Tensor  # bool, unshifted
    seq_lens: torch.Tensor | None = None  # int64 [B, max_docs], of packed rows


def check_is_dense(name: str, tensor: object) -> None:
    """Raise InvalidRequest unless it is an ordinary torch.Tensor that holds data."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InvalidRequest(f"{name} must be a dense tensor with data; got {tensor.layout}")


def check_batch_shapes(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, loss_mask: torch.Tensor
) -> None:
    """Raise InvalidRequest unless all three are [B, T] with B, T >= 1 and the ids are integers."""
    for name, tensor in (
        ("input_ids", input_ids),
        ("attention_mask", attention_mask),
        ("loss_mask", loss_mask),
    ):
        check_is_dense(name, tensor)
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise InvalidRequest(
            f"input_ids must be [B, T] with B, T >= 1; got shape {list(input_ids.shape)}"
        )
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype is torch.bool:
        raise InvalidRequest(f"input_ids must be integers; got {input_ids.dtype}")
    for name, mask in (("attention_mask", attention_mask), ("loss_mask", loss_mask)):
        if mask.shape != input_ids.shape:
            raise InvalidRequest(
                f"{name} must have the shape of input_ids, {list(input_ids.shape)}; got "
                f"{list(mask.shape)}"
            )
        if mask.is_floating_point() and not bool((mask.float() > -1e4).all()):
            # An additive mask (0 attends, -inf does not) would be read the wrong way round.
            raise InvalidRequest(
                f"{name} must be non-zero where true and 0 elsewhere; got NaN or below -1e4. "
                "Pass the 2-D mask of the tokenizer, not an additive one"
            )


def pack_request(batch: TokenBatch, **fields: Any) -> tuple[SupervisionRequest, EncodedFrame]:
    """Encode a batch of CPU tensors as a request frame.

    Args:
        batch: CPU tensors that passed `check_batch_shapes`.
        fields: the other fields of `SupervisionRequest`.

    Raises:
        InvalidRequest: an id that does not fit int32, or a field `SupervisionRequest` refuses.
    """
    ids = batch.input_ids.reshape(-1)
    if int(ids.min()) < -(1 << 31) or int(ids.max()) >= 1 << 31:
        raise InvalidRequest("input_ids must fit int32")
    used = (batch.attention_mask | batch.loss_mask).reshape(-1)
    unused = ids[~used]
    pad_token_id = None
    if unused.numel() and bool((unused == unused[0]).all()):
        pad_token_id = int(unused[0])
        ids = ids[used]
    batch_size, sequence_length = batch.input_ids.shape
    request = parse(
        SupervisionRequest,
        {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "pad_token_id": pad_token_id,
            **fields,
        },
    )
    tensors = {
        "input_ids": ids.to(torch.int32),
        "attention_mask": pack_bits(batch.attention_mask),
        "loss_mask": pack_bits(batch.loss_mask),
    }
    if batch.seq_lens is not None:  # positions follow from it
        tensors["seq_lens"] = batch.seq_lens.to(torch.int32)
    return request, encode(request.model_dump(exclude_defaults=True), tensors)


def unpack_request(request: SupervisionRequest, frame: Frame) -> TokenBatch:
    """Rebuild the batch of a request whose size was admitted.

    Raises:
        InvalidRequest: a tensor is missing, unknown, or not of the shape the fields imply.
    """
    shape = (request.batch_size, request.sequence_length)
    count = shape[0] * shape[1]
    bits = -(-count // 8)
    expected_dtypes = {
        "input_ids": torch.int32, "attention_mask": torch.uint8, "loss_mask": torch.uint8
    }  # fmt: skip
    if "seq_lens" in frame.tensors:
        expected_dtypes["seq_lens"] = torch.int32
    _expect(frame, expected_dtypes)
    for name in ("attention_mask", "loss_mask"):
        if frame.tensors[name].shape != (bits,):
            raise InvalidRequest(
                f"{name} of a {list(shape)} batch must be [{bits}] bytes of bits; got "
                f"{list(frame.tensors[name].shape)}"
            )
    attention_mask = unpack_bits(frame.tensors["attention_mask"], shape)
    loss_mask = unpack_bits(frame.tensors["loss_mask"], shape)
    ids = frame.tensors["input_ids"]
    used = attention_mask | loss_mask
    expected = count if request.pad_token_id is None else int(used.sum())
    if ids.shape != (expected,):
        raise InvalidRequest(
            f"input_ids must be [{expected}] for a {list(shape)} batch with "
            f"pad_token_id={request.pad_token_id}; got {list(ids.shape)}"
        )
    if request.pad_token_id is None:
        input_ids = ids.long().view(shape)
    else:
        input_ids = torch.full(shape, request.pad_token_id, dtype=torch.int64)
        input_ids[used] = ids.long()
    seq_lens = frame.tensors.get("seq_lens")
    if seq_lens is not None:
        check_seq_lens(seq_lens, attention_mask)
        seq_lens = seq_lens.long()
    return TokenBatch(input_ids, attention_mask, loss_mask, seq_lens)


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


def _expect(frame: Frame, dtypes: dict[str, torch.dtype]) -> None:
    """Raise InvalidRequest unless the frame has exactly these tensors."""
    got = {name: tensor.dtype for name, tensor in frame.tensors.items()}
    if got != dtypes:
        raise InvalidRequest(f"expected tensors {_names(dtypes)}; got {_names(got)}")


def _names(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} {str(dtype)[6:]}" for name, dtype in sorted(dtypes.items()))
