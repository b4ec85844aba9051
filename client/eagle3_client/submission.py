"""`Submission`: one batch on its way: encoded when submitted, sent, rebuilt on the device."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import torch

from eagle3_client.config import ClientSettings, choose_encoding
from eagle3_client.connection import Connection
from eagle3_client.device import beside_the_trainer
from eagle3_client.exchanging import TrainerInputs, as_mismatch, cast_states, copy_batch, exchange
from eagle3_client.fleet import Fleet
from eagle3_schemas import DraftVocab, Eagle3TargetBatch, ModelInfo
from eagle3_schemas.draft_head import DraftHead
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.exchange import Supervision, pack_request, unpack_response
from eagle3_schemas.frame import EncodedFrame, Frame
from eagle3_schemas.messages import SupervisionRequest
from eagle3_schemas.tensors import DTYPES
from eagle3_schemas.tokens import TokenBatch


@dataclass(frozen=True)
class Submission:
    """A request with everything it was bound to when it was submitted."""

    settings: ClientSettings
    request: SupervisionRequest
    frame: EncodedFrame
    draft_vocab: DraftVocab
    sent: TokenBatch
    inputs: TrainerInputs

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
            inputs=TrainerInputs.of(settings, input_ids, attention_mask, loss_mask, packing),
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
            return self.ask(connection, heard)

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

    def ask(self, connection: Connection, heard: Callable[[httpx.Headers], None]) -> Frame:
        """Send it, and wait for its answer, whose headers `heard` is given."""
        return connection.supervise(self.frame, self.request_id, heard)

    def batch(self, supervision: Supervision) -> Eagle3TargetBatch:
        """Join the supervision with the inputs it belongs to.

        Raises:
            InvalidRequest: `exact` with an `output_dtype` that loses bits of the model's dtype.
        """
        aux = cast_states(supervision.aux_hidden_states, self.settings)
        return Eagle3TargetBatch(
            aux_hidden_states=aux,
            input_ids=self.inputs.input_ids,
            attention_mask=self.inputs.attention_mask,
            loss_mask=self.inputs.loss_mask,
            target_probs=supervision.target_probs,
            position_mask=supervision.position_mask,
            **self.inputs.packing,
        )
