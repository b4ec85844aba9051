"""A batch's tokens on their way up: shared by every request that has a batch.

Padding does not travel: ids are sent where either mask is 1, when all the others are one pad id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.frame import Frame
from eagle3_schemas.messages import BatchRequest
from eagle3_schemas.packing import check_seq_lens
from eagle3_schemas.supervision import pack_bits, unpack_bits


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


def pack_tokens(batch: TokenBatch) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields and the tensors that carry a batch, as `BatchRequest` lists them.

    Args:
        batch: CPU tensors that passed `check_batch_shapes`.

    Raises:
        InvalidRequest: an id that does not fit int32.
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
    tensors = {
        "input_ids": ids.to(torch.int32),
        "attention_mask": pack_bits(batch.attention_mask),
        "loss_mask": pack_bits(batch.loss_mask),
    }
    if batch.seq_lens is not None:  # positions follow from it
        tensors["seq_lens"] = batch.seq_lens.to(torch.int32)
    fields = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "pad_token_id": pad_token_id,
    }
    return fields, tensors


def unpack_tokens(request: BatchRequest, frame: Frame) -> TokenBatch:
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
        if seq_lens.ndim == 2 and seq_lens.shape[1] > shape[1]:  # before it costs any time
            raise InvalidRequest(
                f"seq_lens of rows of {shape[1]} tokens may have as many documents; got shape "
                f"{list(seq_lens.shape)}. Leave out columns that are all 0"
            )
        check_seq_lens(seq_lens, attention_mask)
        seq_lens = seq_lens.long()
    return TokenBatch(input_ids, attention_mask, loss_mask, seq_lens)


def _expect(frame: Frame, dtypes: dict[str, torch.dtype]) -> None:
    """Raise InvalidRequest unless the frame has exactly these tensors."""
    got = {name: tensor.dtype for name, tensor in frame.tensors.items()}
    if got != dtypes:
        raise InvalidRequest(f"expected tensors {_names(dtypes)}; got {_names(got)}")


def _names(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} {str(dtype)[6:]}" for name, dtype in sorted(dtypes.items()))
