"""The seam between the service and whatever runs the target: two dataclasses and a Protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from eagle3_schemas import DraftVocab
from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.messages import AuxDtype, EncodingName, Rows
from eagle3_schemas.self_check import SelfCheck
from eagle3_schemas.target_head import NormForm
from eagle3_schemas.tensors import Checksum


@dataclass(frozen=True)
class TargetDescription:
    """What the target is; constant while it is loaded."""

    model_id: str
    revision: str | None
    architecture: str
    fingerprint: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int  # V, the width of the logits
    input_vocab_size: int  # rows of the input embeddings
    max_sequence_length: int | None
    dtype: str
    device: str
    device_name: str
    attn_implementation: str | None
    aux_layer_ids: tuple[int, ...] | None
    num_threads: int
    head: Literal["full", "rows"]
    head_reason: str | None
    encodings: tuple[EncodingName, ...]
    transform: LogitsTransform  # what follows the head, for who applies its rows
    quantization: str | None = None
    tokenizer_digest: str | None = None
    packing: Literal["masked", "documents"] | None = None
    packing_reason: str | None = None
    config_digest: str | None = None
    weights_digest: str | None = None
    outputs: tuple[str, ...] = ()  # names of `OUTPUTS` that `capture` gives
    outputs_reason: str | None = None  # why some, or the norm's form, are missing
    norm: NormForm | None = None
    hooks: Literal["verified", "not comparable"] | None = None
    hooks_reason: str | None = None  # why they were not comparable


@dataclass(frozen=True)
class Job:
    """One validated batch; its tensors are [B, T] on the CPU."""

    input_ids: torch.Tensor  # int64, every id within the embeddings
    attention_mask: torch.Tensor  # bool
    loss_mask: torch.Tensor  # bool, unshifted
    aux_layer_ids: tuple[int, ...]
    exact: bool
    seq_lens: torch.Tensor | None = field(default=None, kw_only=True)  # int64 [B, max_docs]


@dataclass(frozen=True)
class SupervisionJob(Job):
    """A batch to supervise."""

    draft_vocab: DraftVocab
    encoding: EncodingName
    rows: Rows
    aux_dtype: AuxDtype


@dataclass(frozen=True)
class CaptureJob(Job):
    """A batch of which some outputs are wanted."""

    outputs: tuple[str, ...]
    draft_vocab: DraftVocab | None


@dataclass(frozen=True)
class DeviceTensors:
    """A result on the target's device, perhaps not finished there."""

    tensors: dict[str, torch.Tensor]
    is_constant: bool = False
    """Whether they are weights, which never change, rather than this result's own memory."""
    ready: torch.cuda.Event | None = None
    """On a GPU: recorded when all work on the tensors has been queued. Set by `queued`."""
    head_seconds: float = 0.0
    """Time the head took, of the time of the work."""

    @classmethod
    def queued(
        cls,
        tensors: dict[str, torch.Tensor],
        device: torch.device,
        *,
        is_constant: bool = False,
        head_seconds: float = 0.0,
    ) -> DeviceTensors:
        """Build a result whose work has been queued on the current stream of `device`."""
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return cls(tensors, is_constant, ready, head_seconds)


@dataclass(frozen=True)
class HostTensors:
    """A result in host memory, each tensor with the checksum taken where it was computed."""

    tensors: dict[str, torch.Tensor]
    checksums: dict[str, Checksum]


class Target(Protocol):
    """An engine that supervises. All calls come from one thread, which owns the model.

    A result depends on its job alone: never on other jobs, the queue, or free memory.
    """

    def describe(self) -> TargetDescription:
        """Return what is served."""

    def supervise(self, job: SupervisionJob) -> DeviceTensors:
        """Run one job; `SupervisionResponse` lists the tensors.

        Raises:
            TargetFailed: non-finite values, or the forward failed.
            PackingUnsupported: packed rows that cannot be computed as asked for.
        """

    def capture(self, job: CaptureJob) -> DeviceTensors:
        """Run one job; `CaptureResponse` lists the tensors.

        Raises:
            TargetFailed: non-finite values, or the forward failed.
            PackingUnsupported: packed rows that cannot be computed as asked for.
        """

    def input_embeddings(self) -> DeviceTensors:
        """Return `weight` [input_vocab_size, H], model dtype."""

    def draft_head(self, draft_vocab: DraftVocab) -> DeviceTensors:
        """Return `weight` [D, H] and, if any, `bias` [D] of the head.

        Raises:
            InvalidRequest: the head is not a plain linear, so `hidden` is not offered.
        """

    def target_head(self) -> DeviceTensors:
        """Return the whole head and the final norm, as `TargetHeadFields` lists them.

        Raises:
            InvalidRequest: the head is not a plain linear.
        """

    def self_check(self, name: str) -> SelfCheck:
        """Check one of `SELF_CHECKS` anew, on the model and with what requests are served by."""
