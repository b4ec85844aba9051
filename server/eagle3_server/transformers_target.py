"""`TransformersTarget`: the engine that runs a Hugging Face causal LM."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from eagle3_schemas import (
    AUX_LAYER_CONVENTION,
    DraftVocab,
    default_aux_layer_ids,
    shift_left_with_zero,
    validate_aux_layer_ids,
)
from eagle3_schemas.aux_states import encode_aux
from eagle3_schemas.draft_head import ROW_MULTIPLE, LogitsTransform
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest, TargetFailed
from eagle3_schemas.protocol import PROTOCOL_VERSION
from eagle3_schemas.supervision import pack_bits
from eagle3_server.engine import DeviceTensors, SupervisionJob, TargetDescription
from eagle3_server.fingerprint import (
    config_digest,
    quantization_of,
    target_fingerprint,
    weights_digest,
)
from eagle3_server.forward import ForwardResult, forward_logits, forward_with_aux
from eagle3_server.head import HeadUnsupported, RowsHead, probe_batch
from eagle3_server.layout import decoder_layers, max_sequence_length, positions_depend_on_length
from eagle3_server.packing import find_packing, forward_packed
from eagle3_server.supervise import HeadRows, supervise_rows

_CACHED_DRAFT_VOCABS = 16

logger = logging.getLogger(__name__)


class TransformersTarget:
    """A frozen causal LM that supervises. Not thread-safe: one thread owns it.

    A short forward at construction finds V (the width of the logits) and proves that the hooks
    catch every layer.

    Args:
        model: a causal LM on its device; put into eval mode, its parameters frozen.
        model_id: name shown to clients: a hub id, or a directory's name.
        revision: the hub revision served, or None.
        tokenizer_digest: of the checkpoint's tokenizer, or None.
        aux_layer_ids: layers used when a request names none; the default is the EAGLE-3 rule, or
            nothing if the target is too shallow for it.
        head_chunk_bytes: memory the full-vocab logits of a chunk of rows may take.

    Raises:
        InvalidRequest: bad `aux_layer_ids`, or no decoder layers found in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        model_id: str,
        revision: str | None = None,
        tokenizer_digest: str | None = None,
        aux_layer_ids: Sequence[int] | None = None,
        head_chunk_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        num_layers = len(decoder_layers(model))
        if aux_layer_ids is not None:
            default = validate_aux_layer_ids(aux_layer_ids, num_layers)
        else:
            try:
                default = default_aux_layer_ids(num_layers)
            except InvalidRequest:  # too shallow: every request must then name its own
                default = None
        self._on_device: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        embedding = self._embedding_weight()
        self._device = embedding.device
        probe = forward_with_aux(model, *probe_batch(model), range(num_layers))
        vocab_size = probe.logits.shape[-1]
        self._head: RowsHead | None = None
        head_reason = None
        try:
            forward = partial(forward_logits, model)
            self._head = RowsHead.find(model, forward, head_chunk_bytes)
        except HeadUnsupported as exc:
            head_reason = str(exc)
            logger.warning("the head runs for every position, not for rows alone: %s", exc)
        self._can_trim = not positions_depend_on_length(model)
        self._packing = find_packing(model)
        if self._packing.reason is not None:
            logger.info("packed documents run as rows of their own: %s", self._packing.reason)
        self._full_chunk_rows = max(head_chunk_bytes // (4 * vocab_size), 1)
        dtype = str(probe.aux_states[0].dtype).removeprefix("torch.")
        quantization = quantization_of(model)
        parts = {"config_digest": config_digest(model), "weights_digest": weights_digest(model)}
        self._description = TargetDescription(
            model_id=model_id,
            revision=revision,
            architecture=type(model).__name__,
            **parts,
            fingerprint=target_fingerprint(
                **parts,
                model_id=model_id,
                revision=revision,
                dtype=dtype,
                quantization=quantization,
                tokenizer_digest=tokenizer_digest,
                vocab_size=vocab_size,
                aux_layer_convention=AUX_LAYER_CONVENTION,
                protocol_version=PROTOCOL_VERSION,
            ),
            quantization=quantization,
            tokenizer_digest=tokenizer_digest,
            num_hidden_layers=num_layers,
            hidden_size=probe.aux_states[0].shape[-1],
            vocab_size=vocab_size,
            input_vocab_size=embedding.shape[0],
            max_sequence_length=max_sequence_length(model),
            dtype=dtype,
            device=str(self._device),
            device_name=_device_name(self._device),
            attn_implementation=getattr(model.config, "_attn_implementation", None),
            aux_layer_ids=default,
            num_threads=torch.get_num_threads(),
            head="full" if self._head is None else "rows",
            head_reason=head_reason,
            encodings=(
                ("probs", "logits", "hidden")
                if self._head is not None and self._head.is_plain_linear
                else ("probs", "logits")
            ),
            transform=LogitsTransform() if self._head is None else self._head.transform,
            packing=self._packing.route,
            packing_reason=self._packing.reason,
        )

    def describe(self) -> TargetDescription:
        """Return what is served."""
        return self._description

    def input_embeddings(self) -> DeviceTensors:
        """Return the input embeddings' `weight`."""
        weight = self._embedding_weight().detach()
        return DeviceTensors.queued({"weight": weight}, self._device, is_constant=True)

    def draft_head(self, draft_vocab: DraftVocab) -> DeviceTensors:
        """Return the head's rows for a draft vocab; see `Target`."""
        if self._head is None or not self._head.is_plain_linear:
            raise InvalidRequest(
                "encoding 'hidden' needs a head that is a plain linear, which this target's is "
                f"not; it offers {list(self._description.encodings)}"
            )
        ids, _ = self._draft_vocab(draft_vocab)
        weight, bias = self._head.draft_rows(ids)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return DeviceTensors.queued(tensors, self._device)

    def supervise(self, job: SupervisionJob) -> DeviceTensors:
        """Run the target on one job: one forward, then the head for the rows asked for."""
        columns = job.input_ids.shape[1]
        if self._can_trim and not job.exact and job.rows != "all" and job.seq_lens is None:
            columns = _used_columns(job)
        input_ids = job.input_ids[:, :columns].to(self._device)
        attention_mask = job.attention_mask[:, :columns].to(self._device)
        loss_mask = job.loss_mask[:, :columns].to(self._device)
        head = self._rows_head(job)
        to_cut = None if head is None else head.module
        layers = job.aux_layer_ids
        if job.seq_lens is None:
            result = forward_with_aux(self._model, input_ids, attention_mask, layers, to_cut)
        else:
            result = forward_packed(
                self._model, self._packing if job.exact else self._packing.by_document(),
                input_ids, job.seq_lens, layers, to_cut,
            )  # fmt: skip
        attended = result.attended_aux(attention_mask)
        source = self._head_rows(head, result)
        del result  # frees the layers' outputs before the head runs
        _check_finite(attended, attention_mask, job.aux_layer_ids)
        encoding = ENCODINGS[job.encoding]
        started = time.monotonic()
        supervision = supervise_rows(
            source,
            loss_mask,
            *self._draft_vocab(job.draft_vocab),
            encoding,
            job.rows,
            needs_draft_logits=not encoding.needs_draft_head,
        )
        head_seconds = time.monotonic() - started  # its checks have waited for the device
        position_mask = torch.zeros(job.loss_mask.shape, dtype=torch.bool, device=self._device)
        position_mask[:, :columns] = shift_left_with_zero(supervision.position_mask)
        return DeviceTensors.queued(
            {
                **encode_aux(attended, job.aux_dtype),
                "position_mask": pack_bits(position_mask),
                encoding.tensor_name: supervision.rows,
            },
            self._device,
            head_seconds=head_seconds,
        )

    def _rows_head(self, job: SupervisionJob) -> RowsHead | None:
        """Return the rows-only head unless the job needs the model's own full logits.

        For `exact`: on a GPU another matmul shape rounds differently, and on the CPU so does one of
        fewer than 16 rows.
        """
        tokens = job.input_ids.numel()
        if job.seq_lens is not None:
            tokens = self._packing.fewest_tokens(job.seq_lens)
        is_small = tokens < ROW_MULTIPLE
        if job.exact and (self._device.type != "cpu" or is_small):
            if job.encoding == "hidden":
                raise InvalidRequest(
                    "exact=True with encoding 'hidden' needs a CPU target and a batch of at least "
                    f"{ROW_MULTIPLE} tokens; use 'probs' or 'logits'"
                )
            return None
        return self._head

    def _head_rows(self, head: RowsHead | None, result: ForwardResult) -> HeadRows:
        if head is None or result.head_input is None:
            logits = result.logits.flatten(0, 1)
            return HeadRows(
                lambda positions: iter([(0, logits[positions])]),
                None,
                LogitsTransform(),
                self._full_chunk_rows,
            )
        head_input = result.head_input.flatten(0, 1)
        return HeadRows(
            lambda positions: head.tiles(head_input[positions]),
            head_input.__getitem__,
            head.transform,
            head.chunk_rows,
        )

    def _embedding_weight(self) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    def _draft_vocab(self, vocab: DraftVocab) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask on the device; the last few vocabs stay there."""
        cached = self._on_device.pop(vocab.digest, None)
        if cached is None:
            ids = vocab.selected_token_ids.to(self._device)
            cached = ids, vocab.mask(self._description.vocab_size).to(self._device)
        self._on_device[vocab.digest] = cached
        if len(self._on_device) > _CACHED_DRAFT_VOCABS:
            self._on_device.popitem(last=False)
        return cached


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _used_columns(job: SupervisionJob) -> int:
    """Return T without the trailing columns that no row attends to or is supervised on.

    Leading columns stay: without explicit positions their removal would move every token.
    """
    used = (job.attention_mask | job.loss_mask).any(dim=0).nonzero()
    return int(used[-1]) + 1 if used.numel() else 1


def _check_finite(
    attended: torch.Tensor, attention_mask: torch.Tensor, aux_layer_ids: tuple[int, ...]
) -> None:
    """Raise TargetFailed naming the first layer and row whose aux states are not finite."""
    # aminmax reads once, allocates nothing, and lets NaN through.
    if attended.numel() == 0 or all(bool(v.isfinite()) for v in torch.aminmax(attended)):
        return
    for layer_id, states in zip(aux_layer_ids, attended.chunk(len(aux_layer_ids), -1), strict=True):
        bad = (~states.isfinite().all(dim=-1)).nonzero()
        if bad.numel():
            row, position = attention_mask.nonzero()[bad[0, 0]].tolist()
            raise TargetFailed(
                f"decoder layer {layer_id} gave non-finite aux_hidden_states at row {row}, "
                f"position {position}; nothing was sent. Look at this row, or serve the target in "
                "a wider dtype (--dtype bfloat16 or float32)"
            )
