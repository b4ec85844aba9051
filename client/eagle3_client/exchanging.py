"""What every request with a batch does: copied, sent, its answer held to the target, and cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import torch

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.device import beside_the_trainer
from eagle3_client.fleet import Fleet
from eagle3_schemas import DraftVocab, ModelInfo, shift_left_with_zero
from eagle3_schemas.errors import (
    InvalidRequest,
    PackingUnsupported,
    ProtocolMismatch,
    TransportError,
    VocabMappingMissing,
)
from eagle3_schemas.frame import Frame
from eagle3_schemas.packing import check_packing
from eagle3_schemas.protocol import INSTANCE_HEADER
from eagle3_schemas.tokens import TokenBatch, check_batch_shapes, check_is_dense


def copy_batch(
    info: ModelInfo,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    loss_mask: torch.Tensor,
    packing: dict[str, torch.Tensor | None],
) -> TokenBatch:
    """Check a batch, and copy what is sent of it to the CPU.

    Raises:
        InvalidRequest: shapes or dtypes that are wrong whatever the target is.
        PackingUnsupported: packed rows, and the target takes none.
    """
    check_batch_shapes(input_ids, attention_mask, loss_mask)
    for name, tensor in packing.items():
        if tensor is not None:
            check_is_dense(name, tensor)
    check_packing(input_ids, attention_mask, **packing)
    seq_lens = packing["seq_lens"]
    if seq_lens is not None and info.packing is None:
        raise PackingUnsupported(
            f"{info.model_id} takes no packed rows there; send one document per row"
        )
    return TokenBatch(
        input_ids.detach().cpu().long(),
        attention_mask.detach().cpu().ne(0),
        loss_mask.detach().cpu().ne(0),
        None if seq_lens is None else _trimmed(seq_lens.detach().cpu().long()),
    )


@dataclass(frozen=True)
class TrainerInputs:
    """A batch's own tensors on the trainer's device, copied when it was submitted."""

    input_ids: torch.Tensor  # shifted
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor  # shifted
    packing: dict[str, torch.Tensor | None]

    @classmethod
    def of(
        cls,
        settings: ClientSettings,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        packing: dict[str, torch.Tensor | None],
    ) -> TrainerInputs:
        """Copy them there."""
        device = settings.device
        return cls(
            shift_left_with_zero(input_ids.detach()).to(device),
            attention_mask.detach().to(device, copy=True),
            shift_left_with_zero(loss_mask.detach()).to(device),
            {
                name: None if tensor is None else tensor.detach().to(device, copy=True)
                for name, tensor in packing.items()
            },
        )


def _trimmed(seq_lens: torch.Tensor) -> torch.Tensor:
    """Return lengths [B, max_docs] without the trailing columns that are 0 in every row."""
    used = seq_lens.ne(0).any(0).nonzero()
    return seq_lens[:, : int(used[-1]) + 1].contiguous()


def exchange(
    fleet: Fleet,
    connection: Connection,
    info: ModelInfo,
    request_id: str,
    draft_vocab: DraftVocab | None,
    ask: Callable[[Callable[[httpx.Headers], None]], Frame],
) -> Frame:
    """Send a request to a server, once; twice if it had forgotten the draft vocab.

    Args:
        fleet: whose target must answer.
        connection: the server.
        info: what the fleet serves.
        request_id: the answer must carry it.
        draft_vocab: what the request needs registered, or None.
        ask: sends the request; gives its argument the answer's headers.

    Raises:
        FingerprintMismatch: another target answered.
        RemoteEagle3Error: what the server said, or why there was no answer.
    """
    headers: list[httpx.Headers] = []
    if draft_vocab is not None:
        try:
            connection.ensure_registered(draft_vocab, info.vocab_size)
        except InvalidRequest:  # it fitted once: another target may be served there now
            fleet.check_fingerprint(connection.model_info().fingerprint, connection.url)
            raise
    try:
        frame = ask(headers.append)
    except VocabMappingMissing:
        if draft_vocab is None:
            raise
        # It restarted, perhaps with another model, which this draft vocab may not even fit.
        connection.forget_registered(draft_vocab.digest)
        fleet.check_fingerprint(connection.model_info().fingerprint, connection.url)
        connection.ensure_registered(draft_vocab, info.vocab_size)
        try:
            frame = ask(headers.append)
        except VocabMappingMissing as error:
            # Pushed out again by other trainers' draft vocabs: a later repeat will do.
            connection.forget_registered(draft_vocab.digest)
            error.is_retryable = True
            raise
    fleet.check_fingerprint(frame.fields.get("fingerprint"), connection.url)
    fleet.check_instance(headers[-1].get(INSTANCE_HEADER), connection)
    if frame.fields.get("request_id") != request_id:
        # Something in between mixed answers up: worth a repeat.
        raise TransportError(
            f"the response is to request {frame.fields.get('request_id')!r:.100}",
            url=connection.url,
            request_id=request_id,
        )
    return frame


@contextmanager
def as_mismatch(connection: Connection, request_id: str | None) -> Iterator[None]:
    """Turn what is wrong with an answer into ProtocolMismatch: a repeat would bring the same."""
    try:
        yield
    except InvalidRequest as exc:  # its checksums are right
        raise ProtocolMismatch(
            f"the response is not the one asked for: {exc.detail}. Check that both sides have "
            "the same version",
            url=connection.url,
            request_id=request_id,
        ) from exc


def cast_states(states: torch.Tensor, settings: ClientSettings) -> torch.Tensor:
    """Cast hidden states to the backend's `output_dtype`, if it has one.

    Raises:
        InvalidRequest: `exact` with one that loses bits of the model's dtype.
    """
    output_dtype = settings.output_dtype
    if output_dtype is None:
        return states
    is_lossless = torch.promote_types(states.dtype, output_dtype) == output_dtype
    if settings.exact and not is_lossless:
        raise InvalidRequest(
            f"exact=True forbids output_dtype {output_dtype}, which cannot hold every "
            f"{states.dtype} of the target; drop one of the two"
        )
    with beside_the_trainer(settings.device):
        return states.to(output_dtype)
