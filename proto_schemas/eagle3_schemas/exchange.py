"""A supervision request and its response as frames: pack and unpack side by side.

Padding travels in neither direction: ids go up where either mask is 1 (when all the others are one
pad id), aux states come down where `attention_mask` is 1, supervision for the rows asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest, MalformedPayload
from eagle3_schemas.frame import EncodedFrame, Frame, encode
from eagle3_schemas.messages import SupervisionRequest, SupervisionResponse, parse
from eagle3_schemas.supervision import pack_bits, scatter_rows, shift_left_with_zero, unpack_bits


@dataclass(frozen=True)
class TokenBatch:
    """One batch's inputs, [B, T] each."""

    input_ids: torch.Tensor  # int64
    attention_mask: torch.Tensor  # bool
    loss_mask: torch.Tensor  # bool, unshifted


def check_batch_shapes(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, loss_mask: torch.Tensor
) -> None:
    """Raise InvalidRequest unless all three are [B, T] with B, T >= 1 and the ids are integers."""
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
    return request, encode(request.model_dump(exclude_defaults=True), tensors)


def unpack_request(request: SupervisionRequest, frame: Frame) -> TokenBatch:
    """Rebuild the batch of a request whose size was admitted.

    Raises:
        InvalidRequest: a tensor is missing, unknown, or not of the shape the fields imply.
    """
    shape = (request.batch_size, request.sequence_length)
    count = shape[0] * shape[1]
    bits = -(-count // 8)
    _expect(
        frame, {"input_ids": torch.int32, "attention_mask": torch.uint8, "loss_mask": torch.uint8}
    )
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
    return TokenBatch(input_ids, attention_mask, loss_mask)


@dataclass(frozen=True)
class Supervision:
    """A response rebuilt on the trainer's device."""

    aux_hidden_states: torch.Tensor  # [B, T, 3H] model dtype, zeros where not attended
    target_probs: torch.Tensor  # [B, T, D] float32, zeros in rows that were not sent
    position_mask: torch.Tensor  # [B, T, 1] bool


def unpack_response(
    frame: Frame,
    request: SupervisionRequest,
    batch: TokenBatch,
    *,
    hidden_size: int,
    draft_vocab_size: int,
    device: torch.device,
) -> tuple[SupervisionResponse, Supervision]:
    """Rebuild the supervision a request asked for; every shape is checked first.

    Args:
        frame: the decoded response; its tensors are moved to `device`, then spread.
        request: the request it must answer.
        batch: the batch that was sent.
        hidden_size: H of the target.
        draft_vocab_size: D of the mapping the request named.
        device: where the result goes.

    Raises:
        MalformedPayload: it answers another request, or its tensors are not what was asked for.
    """
    response = parse(SupervisionResponse, frame.fields)
    for name in ("request_id", "draft_vocab_digest", "encoding", "rows", "aux_layer_ids"):
        asked, got = getattr(request, name), getattr(response, name)
        if got != asked and not (name == "aux_layer_ids" and asked is None):
            raise MalformedPayload(f"the answer is to another request: {name} {got}, not {asked}")
    shape = (request.batch_size, request.sequence_length)
    attended = int(batch.attention_mask.sum())
    aux = frame.tensors.get("aux_hidden_states")
    bits = frame.tensors.get("position_mask")
    width = len(response.aux_layer_ids) * hidden_size
    if aux is None or aux.shape != (attended, width):
        got = None if aux is None else list(aux.shape)
        raise MalformedPayload(f"expected aux_hidden_states [{attended}, {width}], got {got}")
    if (
        bits is None
        or bits.dtype is not torch.uint8
        or bits.shape != (-(-shape[0] * shape[1] // 8),)
    ):
        raise MalformedPayload(f"expected position_mask as bits over {list(shape)}")
    position_mask = unpack_bits(bits, shape)
    loss_mask = shift_left_with_zero(batch.loss_mask)
    rows = {
        "position_mask": position_mask,
        "loss_mask": loss_mask,
        "all": torch.ones_like(loss_mask),
    }[request.rows]
    if bool((position_mask & ~loss_mask).any()):
        raise MalformedPayload("position_mask marks positions outside the shifted loss_mask")
    on_device = {name: tensor.to(device) for name, tensor in frame.tensors.items()}
    try:
        probs = ENCODINGS[request.encoding].decode(on_device, int(rows.sum()), draft_vocab_size)
    except ValueError as exc:
        raise MalformedPayload(str(exc)) from exc
    return response, Supervision(
        scatter_rows(on_device["aux_hidden_states"], batch.attention_mask.to(device)),
        scatter_rows(probs, rows.to(device)),
        position_mask.unsqueeze(-1).to(device),
    )


def _expect(frame: Frame, dtypes: dict[str, torch.dtype]) -> None:
    """Raise InvalidRequest unless the frame has exactly these tensors."""
    got = {name: tensor.dtype for name, tensor in frame.tensors.items()}
    if got != dtypes:
        raise InvalidRequest(f"expected tensors {_names(dtypes)}; got {_names(got)}")


def _names(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(
        f"{name} {str(d).removeprefix('torch.')}" for name, d in sorted(dtypes.items())
    )
