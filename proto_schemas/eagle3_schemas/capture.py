"""Outputs beyond EAGLE-3's: their names and conventions, a request for some, and its answer.

`pack_capture` and `unpack_capture` are the client's sides, `CaptureRequest` and `CaptureResponse`
what travels. As with supervision, neither padding nor rows outside the loss mask do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Annotated, Any, Final

import torch
from pydantic import Field

from eagle3_schemas.errors import InvalidRequest, MalformedPayload
from eagle3_schemas.frame import EncodedFrame, Frame, encode
from eagle3_schemas.messages import BatchRequest, Digest, Message, RequestId, parse
from eagle3_schemas.supervision import scatter_rows, shift_left_with_zero, unpack_bits
from eagle3_schemas.tokens import TokenBatch, pack_tokens

OUTPUTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "aux": "[B, T, nH] model dtype: outputs of the n decoder layers aux_layer_ids, "
        "concatenated in that order; unshifted; zeros where attention_mask is 0",
        "last_hidden_prenorm": "[B, T, H] model dtype: output of the last decoder layer, which the "
        "final norm is given; unshifted; zeros where attention_mask is 0",
        "last_hidden": "[B, T, H]: output of the final norm, which the head is given; unshifted; "
        "zeros where attention_mask is 0",
        "argmax": "[B, T] int64: the most likely next token over V, ties to the lowest id; "
        "shifted left by one; zeros outside the shifted loss_mask",
        "logsumexp": "[B, T] float32: logsumexp of the logits over V; shifted left by one; zeros "
        "outside the shifted loss_mask",
        "position_mask": "[B, T, 1] bool: in the shifted loss_mask, and the argmax over V is in "
        "the draft vocab",
        "loss_mask_probs": "[B, T, D] float32: softmax over the draft vocab; shifted left by one; "
        "zeros outside the shifted loss_mask",
        "loss_mask_logits": "[B, T, D]: the draft vocab's logits, in the dtype the model gives; "
        "shifted left by one; zeros outside the shifted loss_mask",
        "draft_logsumexp": "[B, T] float32: logsumexp of the logits over the draft vocab; shifted "
        "left by one; zeros outside the shifted loss_mask; exp(draft_logsumexp - logsumexp) is "
        "the draft vocab's share of the probability",
    }
)
"""What a target can be asked for beside EAGLE-3 batches, and the convention of each."""

DRAFT_VOCAB_OUTPUTS: Final = frozenset(
    {"position_mask", "loss_mask_probs", "loss_mask_logits", "draft_logsumexp"}
)
"""Those that depend on the draft vocab."""

HEAD_OUTPUTS: Final = DRAFT_VOCAB_OUTPUTS | {"argmax", "logsumexp"}
"""Those that the target's head has to run for."""


class CaptureRequest(BatchRequest):
    """Fields of a capture request's frame; its tensors are those of `BatchRequest`."""

    outputs: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]
    aux_layer_ids: Annotated[tuple[int, ...], Field(max_length=256)] = ()
    """Distinct layers in any number; empty unless `aux` is asked for."""
    draft_vocab_digest: Digest | None = None
    """Set if an output needs a draft vocab, and only then."""


class CaptureResponse(Message):
    """Fields of a capture response's frame.

    Its tensors are the outputs by name: those of hidden states [n, C] at the n positions where
    `attention_mask` is 1, in row order; those of the head [m] or [m, D] at the m positions of the
    shifted loss mask; `argmax` as int32; `position_mask` as bits over [B, T].
    """

    request_id: RequestId
    fingerprint: str
    outputs: tuple[str, ...]
    aux_layer_ids: tuple[int, ...]
    draft_vocab_digest: Digest | None


@dataclass(frozen=True, eq=False)  # tensors have no truth to compare by
class Capture:
    """The outputs asked for, and only those: each is an attribute of its name.

    Attributes:
        outputs: by name; `OUTPUTS` has their shapes, dtypes and conventions.
        aux_layer_ids: the layers of `aux`, in order.
        input_ids: [B, T], shifted left, as in an `Eagle3TargetBatch`.
        attention_mask: [B, T], as the caller passed it.
        loss_mask: [B, T], shifted left, in the caller's dtype.
        position_ids: [B, T], as the caller passed it, or None.
        seq_lens: [B, max_docs], as the caller passed it, or None: the rows are not packed.
        doc_remaining: [B, T], as the caller passed it, or None.
    """

    outputs: Mapping[str, torch.Tensor]
    aux_layer_ids: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    doc_remaining: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Make the outputs read-only."""
        object.__setattr__(self, "outputs", MappingProxyType(dict(self.outputs)))

    def __reduce__(self) -> tuple[type[Capture], tuple[Any, ...]]:
        """Copy and pickle it as its parts: a read-only mapping itself cannot be."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self), tuple((values | {"outputs": dict(self.outputs)}).values())

    def __repr__(self) -> str:
        """Name the outputs and their shapes."""
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.outputs.items())
        return f"Capture({shapes}; aux_layer_ids={self.aux_layer_ids})"

    def __dir__(self) -> list[str]:
        """List the outputs too."""
        return [*super().__dir__(), *self.outputs]

    def __getattr__(self, name: str) -> torch.Tensor:
        """Return an output.

        Raises:
            AttributeError: it was not asked for.
        """
        if name not in OUTPUTS:
            raise AttributeError(f"a Capture has no {name!r}")
        if name not in self.outputs:
            raise AttributeError(
                f"{name} was not captured; ask for it: outputs={(*self.outputs, name)}"
            )
        return self.outputs[name]

    def aux_of(self, layer_id: int) -> torch.Tensor:
        """Return one layer's share of `aux`, a view [B, T, H].

        Args:
            layer_id: one of `aux_layer_ids`.

        Raises:
            AttributeError: `aux` was not asked for.
            InvalidRequest: the layer was not captured.
        """
        aux = self.aux
        if layer_id not in self.aux_layer_ids:
            raise InvalidRequest(
                f"layer {layer_id} was not captured, {list(self.aux_layer_ids)} were; name it in "
                "aux_layer_ids"
            )
        parts = aux.chunk(len(self.aux_layer_ids), dim=-1)
        return parts[self.aux_layer_ids.index(layer_id)]


def check_outputs(outputs: Sequence[str], offered: Mapping[str, str]) -> tuple[str, ...]:
    """Return the outputs as a tuple, if each is offered and named once.

    Raises:
        InvalidRequest: none, an unknown one, one this target does not give, or one twice.
    """
    names = tuple(outputs) if isinstance(outputs, Iterable) else (None,)
    if isinstance(outputs, str) or not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"outputs must be a sequence of names; got {outputs!r:.100}")
    wrong = [name for name in names if name not in offered]
    if not names or wrong or len(set(names)) != len(names):
        raise InvalidRequest(
            f"outputs must be distinct names out of {list(offered)}, which this target gives; got "
            f"{list(names)!s:.200}"
        )
    return names


def pack_capture(batch: TokenBatch, **others: Any) -> tuple[CaptureRequest, EncodedFrame]:
    """Encode a batch of CPU tensors as a capture request's frame.

    Args:
        batch: CPU tensors that passed `check_batch_shapes`.
        others: the other fields of `CaptureRequest`.

    Raises:
        InvalidRequest: an id that does not fit int32, or a field `CaptureRequest` refuses.
    """
    batch_fields, tensors = pack_tokens(batch)
    request = parse(CaptureRequest, batch_fields | others)
    return request, encode(request.model_dump(exclude_defaults=True), tensors)


def unpack_capture(
    frame: Frame,
    request: CaptureRequest,
    batch: TokenBatch,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    draft_vocab_size: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Rebuild the outputs a request asked for, each spread over [B, T]; every shape is checked.

    Args:
        frame: the decoded response; its tensors are moved to `device`, then spread.
        request: the request it must answer.
        batch: the batch that was sent.
        hidden_size: H of the target.
        dtype: model dtype.
        draft_vocab_size: D of the mapping the request named; 0 if it named none.
        device: where the result goes.

    Raises:
        MalformedPayload: it answers another request, or its tensors are not what was asked for.
    """
    response = parse(CaptureResponse, frame.fields)
    for name in ("request_id", "outputs", "aux_layer_ids", "draft_vocab_digest"):
        asked, got = getattr(request, name), getattr(response, name)
        if got != asked:
            raise MalformedPayload(f"the answer is to another request: {name} {got}, not {asked}")
    loss_mask = shift_left_with_zero(batch.loss_mask)
    _check_tensors(frame, request, batch, loss_mask, hidden_size, dtype, draft_vocab_size)
    # From pinned memory the copies only start here; the caller waits before it reuses that.
    on_device = {name: t.to(device, non_blocking=True) for name, t in frame.tensors.items()}
    where = {True: loss_mask.to(device), False: batch.attention_mask.to(device)}
    result = {}
    for name in request.outputs:
        rows = on_device[name]
        if name == "position_mask":
            shape = tuple(batch.input_ids.shape)
            result[name] = unpack_bits(frame.tensors[name], shape).unsqueeze(-1).to(device)
        elif rows.ndim == 1:
            rows = rows.long() if name == "argmax" else rows
            result[name] = scatter_rows(rows.unsqueeze(1), where[True]).squeeze(-1)
        else:
            result[name] = scatter_rows(rows, where[name in HEAD_OUTPUTS])
    return result


def _check_tensors(
    frame: Frame,
    request: CaptureRequest,
    batch: TokenBatch,
    loss_mask: torch.Tensor,
    hidden_size: int,
    dtype: torch.dtype,
    draft_vocab_size: int,
) -> None:
    attended, supervised = int(batch.attention_mask.sum()), int(loss_mask.sum())
    any_dtype = (dtype, torch.float32, torch.bfloat16, torch.float16)
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "aux": ((attended, len(request.aux_layer_ids) * hidden_size), (dtype,)),
        "last_hidden_prenorm": ((attended, hidden_size), (dtype,)),
        # The final norm, and what follows the head, may give another dtype than the layers.
        "last_hidden": ((attended, hidden_size), any_dtype),
        "argmax": ((supervised,), (torch.int32,)),
        "logsumexp": ((supervised,), (torch.float32,)),
        "draft_logsumexp": ((supervised,), (torch.float32,)),
        "loss_mask_probs": ((supervised, draft_vocab_size), (torch.float32,)),
        "loss_mask_logits": ((supervised, draft_vocab_size), any_dtype),
        "position_mask": ((-(-batch.input_ids.numel() // 8),), (torch.uint8,)),
    }
    if set(frame.tensors) != set(request.outputs):
        raise MalformedPayload(f"expected {sorted(request.outputs)}, got {sorted(frame.tensors)}")
    for name in request.outputs:
        tensor = frame.tensors[name]
        shape, dtypes = expected[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise MalformedPayload(
                f"expected {name} {list(shape)} {dtypes[0]}, got {list(tensor.shape)} "
                f"{tensor.dtype}"
            )
    mask = frame.tensors.get("position_mask")
    shape = tuple(batch.input_ids.shape)
    if mask is not None and bool((unpack_bits(mask, shape) & ~loss_mask).any()):
        raise MalformedPayload("position_mask marks positions outside the shifted loss_mask")
