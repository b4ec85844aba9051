"""`CaptureCalls`: what a backend gives beside EAGLE-3 batches: any outputs, and the whole head."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import httpx
import torch

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.device import beside_the_trainer, hand_over
from eagle3_client.dispatch import Dispatcher
from eagle3_client.exchanging import (
    TrainerInputs,
    as_mismatch,
    cast_states,
    copy_batch,
    exchange,
)
from eagle3_client.fleet import Fleet
from eagle3_client.prefetch import Batch, Prefetch
from eagle3_client.results import RemoteBatchHandle
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.aux_layers import validate_layer_ids
from eagle3_schemas.capture import (
    DRAFT_VOCAB_OUTPUTS,
    Capture,
    CaptureRequest,
    check_outputs,
    pack_capture,
    unpack_capture,
)
from eagle3_schemas.errors import InvalidRequest, VocabMappingMissing
from eagle3_schemas.frame import EncodedFrame, Frame
from eagle3_schemas.protocol import CAPTURE_PATH
from eagle3_schemas.target_head import TargetHead, unpack_target_head
from eagle3_schemas.tensors import DTYPES
from eagle3_schemas.tokens import TokenBatch

_STATES = ("aux", "last_hidden_prenorm", "last_hidden")


@dataclass(frozen=True)
class CaptureSubmission:
    """A capture with everything it was bound to when it was submitted."""

    settings: ClientSettings
    request: CaptureRequest
    frame: EncodedFrame
    draft_vocab: DraftVocab | None
    sent: TokenBatch
    inputs: TrainerInputs

    @property
    def request_id(self) -> str:
        """Id under which both sides log this request."""
        return self.request.request_id

    def attempt(
        self, fleet: Fleet, connection: Connection, info: ModelInfo
    ) -> dict[str, torch.Tensor]:
        """Send to a server and rebuild its answer; see `exchange`.

        Raises:
            ProtocolMismatch: the answer is not of the form asked for.
            RemoteEagle3Error: what the server said, or why there was no answer.
        """

        def ask(heard: Callable[[httpx.Headers], None]) -> Frame:
            return connection.supervise(self.frame, self.request_id, heard, path=CAPTURE_PATH)

        frame = exchange(fleet, connection, info, self.request_id, self.draft_vocab, ask)
        size = 0 if self.draft_vocab is None else self.draft_vocab.draft_vocab_size
        with (
            as_mismatch(connection, self.request_id),
            beside_the_trainer(self.settings.device),
        ):
            return unpack_capture(
                frame,
                self.request,
                self.sent,
                hidden_size=info.hidden_size,
                dtype=DTYPES[info.dtype],
                draft_vocab_size=size,
                device=self.settings.device,
            )

    def batch(self, outputs: dict[str, torch.Tensor]) -> Capture:
        """Join the outputs with the inputs they belong to.

        Raises:
            InvalidRequest: `exact` with an `output_dtype` that loses bits of the model's dtype.
        """
        cast = {
            name: cast_states(tensor, self.settings) if name in _STATES else tensor
            for name, tensor in outputs.items()
        }
        return Capture(
            cast,
            self.request.aux_layer_ids,
            self.inputs.input_ids,
            self.inputs.attention_mask,
            self.inputs.loss_mask,
            **self.inputs.packing,
        )


class CaptureCalls:
    """The calls of `RemoteEagle3Backend` for trainers other than EAGLE-3's. Thread-safe."""

    _settings: ClientSettings
    _dispatcher: Dispatcher
    _draft_vocab: DraftVocab | None
    _lock: threading.Lock
    _target_head: TargetHead | None = None

    def capture(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
        *,
        outputs: Sequence[str],
        aux_layer_ids: Sequence[int] | None = None,
    ) -> Capture:
        """Get some outputs of the target for a batch; blocks. The batch is as `generate_batch`'s.

        Args:
            input_ids: [B, T] integer, like the five others as `generate_batch` takes them.
            attention_mask: [B, T].
            loss_mask: [B, T], not shifted.
            position_ids: [B, T] or None.
            seq_lens: [B, max_docs] or None.
            doc_remaining: [B, T] or None.
            outputs: names out of `model_info().outputs`, which has each one's convention: `aux`,
                `last_hidden_prenorm`, `last_hidden`, `argmax`, `logsumexp`, `position_mask`,
                `loss_mask_probs`, `loss_mask_logits`, `draft_logsumexp`. The last four need
                `set_vocab_mapping`.
            aux_layer_ids: layers of `aux`, distinct layer outputs in any number; None takes the
                backend's, or else the server's default.

        Returns:
            A record of exactly those outputs, on `device`. `output_dtype` casts the three hidden
            states, nothing else; `aux_dtype`, `encoding` and `rows` are of `generate_batch` alone.

        Raises:
            InvalidRequest: an output that the target does not give, layers it does not have, or
                layers without `aux`.
            VocabMappingMissing: an output needs a draft vocab; call `set_vocab_mapping` first.
            RemoteEagle3Error: as `generate_batch`.
        """
        packing = position_ids, seq_lens, doc_remaining
        submission = self._capture(
            outputs, aux_layer_ids, input_ids, attention_mask, loss_mask, *packing
        )
        return hand_over(self._dispatcher.deliver(submission))

    def capture_async(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
        *,
        outputs: Sequence[str],
        aux_layer_ids: Sequence[int] | None = None,
    ) -> RemoteBatchHandle[Capture]:
        """Start `capture` and return a handle; as `generate_batch_async`."""
        packing = position_ids, seq_lens, doc_remaining
        submission = self._capture(
            outputs, aux_layer_ids, input_ids, attention_mask, loss_mask, *packing
        )
        return self._dispatcher.submit(submission)

    def prefetch_capture(
        self,
        batches: Iterable[Batch],
        depth: int | Literal["auto"] = 2,
        *,
        outputs: Sequence[str],
        aux_layer_ids: Sequence[int] | None = None,
    ) -> Prefetch[Batch, Capture]:
        """Iterate over `(batch, its Capture)` in order; as `prefetch`, with what `capture` takes.

        Raises:
            InvalidRequest: as `prefetch`. What is wrong with the outputs, the first batch raises.
        """
        submit = partial(self.capture_async, outputs=outputs, aux_layer_ids=aux_layer_ids)
        return self._dispatcher.prefetch(submit, batches, depth)

    def get_target_head(self) -> TargetHead:
        """Return the target's whole head and final norm, downloaded once and kept on the device.

        V x H of the model's dtype: a gigabyte for a large target. With a `cache_dir`, processes of
        a host share it, as with `get_input_embeddings`.

        Raises:
            InvalidRequest: the head is not a plain linear.
            RemoteEagle3Error: as `generate_batch`.
        """
        self._dispatcher.check_usable()
        with self._lock:
            if self._target_head is None:
                info = self._dispatcher.model_info()
                frame = self._dispatcher.target_head()
                self._target_head = unpack_target_head(
                    frame, info.vocab_size, info.hidden_size, self._settings.device
                )
            return self._target_head

    def _capture(
        self,
        outputs: Sequence[str],
        aux_layer_ids: Sequence[int] | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        *packing: torch.Tensor | None,
    ) -> CaptureSubmission:
        """Check and encode on the caller's thread, bound to the mapping current now."""
        self._dispatcher.check_usable()
        settings, info = self._settings, self._dispatcher.model_info()
        names = check_outputs(outputs, info.outputs)
        layers: tuple[int, ...] = ()
        if "aux" in names:
            default = settings.aux_layer_ids or info.aux_layer_ids
            if aux_layer_ids is None and default is None:
                raise InvalidRequest(
                    f"the target has only {info.num_hidden_layers} decoder layers, too few for the "
                    "default rule; name aux_layer_ids"
                )
            chosen = aux_layer_ids if aux_layer_ids is not None else default
            layers = validate_layer_ids(chosen or (), info.num_hidden_layers)
        elif aux_layer_ids is not None:
            raise InvalidRequest(
                f"aux_layer_ids go with the output 'aux'; got {aux_layer_ids!r:.100} with "
                f"{list(names)}. Ask for it, or drop them"
            )
        vocab = None
        if not DRAFT_VOCAB_OUTPUTS.isdisjoint(names):
            vocab = self._draft_vocab
            if vocab is None:
                raise VocabMappingMissing(
                    f"{sorted(DRAFT_VOCAB_OUTPUTS.intersection(names))} need a draft vocab; call "
                    "set_vocab_mapping first"
                )
        named = dict(zip(("position_ids", "seq_lens", "doc_remaining"), packing, strict=True))
        sent = copy_batch(info, input_ids, attention_mask, loss_mask, named)
        request, frame = pack_capture(
            sent,
            request_id=uuid.uuid4().hex,
            outputs=names,
            aux_layer_ids=layers,
            draft_vocab_digest=None if vocab is None else vocab.digest,
            exact=settings.exact,
        )
        return CaptureSubmission(
            settings=settings,
            request=request,
            frame=frame,
            draft_vocab=vocab,
            sent=sent,
            inputs=TrainerInputs.of(settings, input_ids, attention_mask, loss_mask, named),
        )
