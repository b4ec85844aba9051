"""`Submission`: one batch on its way: encoded when submitted, sent, rebuilt on the device."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import torch

from eagle3_client.config import ClientSettings, choose_encoding
from eagle3_client.connection import Connection
from eagle3_client.device import beside_the_trainer
from eagle3_client.fleet import Fleet
from eagle3_schemas import DraftVocab, Eagle3TargetBatch, ModelInfo, shift_left_with_zero
from eagle3_schemas.draft_head import DraftHead
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import (
    InvalidRequest,
    PackingUnsupported,
    ProtocolMismatch,
    TransportError,
    VocabMappingMissing,
)
from eagle3_schemas.exchange import Supervision, pack_request, unpack_response
from eagle3_schemas.frame import EncodedFrame, Frame
from eagle3_schemas.messages import SupervisionRequest
from eagle3_schemas.packing import check_packing
from eagle3_schemas.protocol import INSTANCE_HEADER
from eagle3_schemas.tensors import DTYPES
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


@dataclass(frozen=True)
class Submission:
    """A request with everything it was bound to when it was submitted."""

    settings: ClientSettings
    request: SupervisionRequest
    frame: EncodedFrame
    draft_vocab: DraftVocab
    sent: TokenBatch
    input_ids: torch.Tensor  # shifted, on the trainer's device
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor  # shifted
    packing: dict[str, torch.Tensor | None]  # what describes packed rows, for the trainer

    @classmethod
    def build(
        cls,
        settings: ClientSettings,
        info: ModelInfo,
        draft_vocab: DraftVocab,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Submission:
        """Check and encode a batch; it is copied, so the caller may fill its tensors anew.

        Raises:
            InvalidRequest: shapes or dtypes that are wrong whatever the target is.
            PackingUnsupported: packed rows, and the target takes none.
        """
        packing = {
            "position_ids": position_ids, "seq_lens": seq_lens, "doc_remaining": doc_remaining
        }  # fmt: skip
        sent = copy_batch(info, input_ids, attention_mask, loss_mask, packing)
        request, frame = pack_request(
            sent,
            request_id=uuid.uuid4().hex,
            draft_vocab_digest=draft_vocab.digest,
            # Never left to the server: replicas, or one that restarts, may have other defaults.
            aux_layer_ids=(
                info.aux_layer_ids if settings.aux_layer_ids is None else settings.aux_layer_ids
            ),
            encoding=choose_encoding(settings, info),
            rows=settings.rows,
            aux_dtype=settings.aux_dtype,
            exact=settings.exact,
        )
        return cls(
            settings=settings,
            request=request,
            frame=frame,
            draft_vocab=draft_vocab,
            sent=sent,
            input_ids=shift_left_with_zero(input_ids.detach()).to(settings.device),
            attention_mask=attention_mask.detach().to(settings.device, copy=True),
            loss_mask=shift_left_with_zero(loss_mask.detach()).to(settings.device),
            packing={
                name: None if tensor is None else tensor.detach().to(settings.device, copy=True)
                for name, tensor in packing.items()
            },
        )

    @property
    def request_id(self) -> str:
        """Id under which both sides log this request."""
        return self.request.request_id

    def attempt(self, fleet: Fleet, connection: Connection, info: ModelInfo) -> Supervision:
        """Send to a server, once; twice if it had forgotten the draft vocab.

        Raises:
            FingerprintMismatch: another target answered.
            ProtocolMismatch: the answer is not of the form asked for.
            RemoteEagle3Error: what the server said, or why there was no answer.
        """
        head: DraftHead | None = None

        def ask(heard: Callable[[httpx.Headers], None]) -> Frame:
            nonlocal head
            if ENCODINGS[self.request.encoding].needs_draft_head:
                head = fleet.heads.get(self.draft_vocab, connection)
            return connection.supervise(self.frame, self.request_id, heard)

        frame = exchange(fleet, connection, info, self.request_id, self.draft_vocab, ask)
        with (
            as_mismatch(connection, self.request_id),
            beside_the_trainer(self.settings.device),
        ):
            _, supervision = unpack_response(
                frame,
                self.request,
                self.sent,
                hidden_size=info.hidden_size,
                dtype=DTYPES[info.dtype],
                draft_vocab_size=self.draft_vocab.draft_vocab_size,
                draft_head=head,
                device=self.settings.device,
            )
        return supervision

    def batch(self, supervision: Supervision) -> Eagle3TargetBatch:
        """Join the supervision with the inputs it belongs to.

        Raises:
            InvalidRequest: `exact` with an `output_dtype` that loses bits of the model's dtype.
        """
        aux = cast_states(supervision.aux_hidden_states, self.settings)
        return Eagle3TargetBatch(
            aux_hidden_states=aux,
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            loss_mask=self.loss_mask,
            target_probs=supervision.target_probs,
            position_mask=supervision.position_mask,
            **self.packing,
        )
