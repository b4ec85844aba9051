"""Request body -> validated job. Everything is checked here, before the device sees any of it.

An out-of-range id on a GPU is a device-side assert that poisons the whole process.
"""

from __future__ import annotations

import torch

from eagle3_schemas import DraftVocab, validate_aux_layer_ids
from eagle3_schemas.aux_layers import example_aux_layer_ids, validate_layer_ids
from eagle3_schemas.capture import DRAFT_VOCAB_OUTPUTS, OUTPUTS, CaptureRequest, check_outputs
from eagle3_schemas.errors import InvalidRequest, LimitExceeded, PackingUnsupported
from eagle3_schemas.frame import Frame, decode
from eagle3_schemas.messages import BatchRequest, Limits, SupervisionRequest, parse
from eagle3_schemas.supervision import unpack_bits
from eagle3_schemas.tokens import TokenBatch, unpack_tokens
from eagle3_server.engine import CaptureJob, SupervisionJob, TargetDescription
from eagle3_server.vocab import DraftVocabRegistry


def admit_supervision(
    body: bytearray,
    description: TargetDescription,
    limits: Limits,
    registry: DraftVocabRegistry,
    *,
    deterministic: bool | None = None,
) -> tuple[SupervisionRequest, SupervisionJob]:
    """Decode and check a supervision request. Pure CPU work, safe on any thread.

    Raises:
        MalformedPayload: not a frame.
        InvalidRequest: a field or tensor is wrong.
        LimitExceeded: larger than the server admits.
        PackingUnsupported: packed rows, and the target takes none.
        VocabMappingMissing: the draft vocab is not registered here.
    """
    frame = decode(body)
    request = parse(SupervisionRequest, frame.fields)
    # First, so that a client of another model that was served here asks what is served now, rather
    # than reads about this model's limits.
    draft_vocab = registry.get(request.draft_vocab_digest)
    _check_size(request, limits)
    if request.encoding not in description.encodings:
        raise InvalidRequest(
            f"encoding must be one of {list(description.encodings)} for this target; got "
            f"{request.encoding!r}"
        )
    if request.exact and request.aux_dtype != "model":
        raise InvalidRequest(
            f"exact=True forbids aux_dtype {request.aux_dtype!r}, which is lossy; drop either"
        )
    _check_exact(request, description, deterministic)
    batch = _admit_batch(request, frame, description, limits)
    aux_layer_ids = request.aux_layer_ids
    if aux_layer_ids is None:
        aux_layer_ids = description.aux_layer_ids
        if aux_layer_ids is None:
            example = ",".join(map(str, example_aux_layer_ids(description.num_hidden_layers)))
            raise InvalidRequest(
                f"the target has only {description.num_hidden_layers} decoder layers, too few for "
                "the default rule; name three aux_layer_ids in the request or on the server, as "
                f"{example}"
            )
    return request, SupervisionJob(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        loss_mask=batch.loss_mask,
        aux_layer_ids=validate_aux_layer_ids(aux_layer_ids, description.num_hidden_layers),
        draft_vocab=draft_vocab,
        encoding=request.encoding,
        rows=request.rows,
        aux_dtype=request.aux_dtype,
        exact=request.exact,
        seq_lens=batch.seq_lens,
    )


def admit_capture(
    body: bytearray,
    description: TargetDescription,
    limits: Limits,
    registry: DraftVocabRegistry,
    *,
    deterministic: bool | None = None,
) -> tuple[CaptureRequest, CaptureJob]:
    """Decode and check a capture request; as `admit_supervision`."""
    frame = decode(body)
    request = parse(CaptureRequest, frame.fields)
    draft_vocab = None
    if request.draft_vocab_digest is not None:
        draft_vocab = registry.get(request.draft_vocab_digest)
    _check_size(request, limits)
    outputs = check_outputs(request.outputs, {name: OUTPUTS[name] for name in description.outputs})
    needs_vocab = not DRAFT_VOCAB_OUTPUTS.isdisjoint(outputs)
    if needs_vocab != (draft_vocab is not None):
        raise InvalidRequest(
            f"draft_vocab_digest goes with outputs out of {sorted(DRAFT_VOCAB_OUTPUTS)}, and only "
            f"with them; got {request.draft_vocab_digest} with {list(outputs)}"
        )
    aux_layer_ids: tuple[int, ...] = ()
    if "aux" in outputs:
        aux_layer_ids = validate_layer_ids(request.aux_layer_ids, description.num_hidden_layers)
    elif request.aux_layer_ids:
        raise InvalidRequest(
            f"aux_layer_ids go with the output 'aux'; got {list(request.aux_layer_ids)} with "
            f"{list(outputs)}. Ask for it, or name no layers"
        )
    _check_exact(request, description, deterministic)
    batch = _admit_batch(request, frame, description, limits)
    return request, CaptureJob(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        loss_mask=batch.loss_mask,
        aux_layer_ids=aux_layer_ids,
        exact=request.exact,
        outputs=outputs,
        draft_vocab=draft_vocab,
        seq_lens=batch.seq_lens,
    )


def _check_size(request: BatchRequest, limits: Limits) -> None:
    tokens = request.batch_size * request.sequence_length
    if tokens > limits.max_tokens_per_request:
        raise LimitExceeded(
            f"a request may have {limits.max_tokens_per_request} tokens (max_tokens_per_request); "
            f"got {request.batch_size} x {request.sequence_length} = {tokens}. Send smaller "
            "batches, or raise the limit on the server (EAGLE3_MAX_TOKENS_PER_REQUEST)"
        )


def _check_exact(
    request: BatchRequest, description: TargetDescription, deterministic: bool | None
) -> None:
    if request.exact and deterministic is False:
        raise InvalidRequest(
            f"exact=True cannot be had: two runs of one batch differed on {description.device_name}"
            " when the server started (deterministic in model info). Drop exact, or serve with "
            "other kernels (--attn-implementation eager) or on another device"
        )


def _admit_batch(
    request: BatchRequest, frame: Frame, description: TargetDescription, limits: Limits
) -> TokenBatch:
    """Rebuild a batch whose size was checked, and check what the target can take of it."""
    batch = unpack_tokens(request, frame)
    longest = limits.max_sequence_length
    length, what = request.sequence_length, "sequences"
    if batch.seq_lens is not None:
        if description.packing is None:
            raise PackingUnsupported(
                "this target takes no packed rows (packing in model info is none); send one "
                "document per row"
            )
        length, what = int(batch.seq_lens.max()), "documents"
    if longest is not None and length > longest:
        raise LimitExceeded(
            f"the target has {longest} learned positions; got {what} of {length}. Cut the {what}"
        )
    lowest, highest = int(batch.input_ids.min()), int(batch.input_ids.max())
    if lowest < 0 or highest >= description.input_vocab_size:
        raise InvalidRequest(
            f"input_ids must be in [0, {description.input_vocab_size}), padding included; got "
            f"ids from {lowest} to {highest}. Use this target's tokenizer, and a valid pad id"
        )
    return batch


def admit_draft_vocab(body: bytearray, digest: str, vocab_size: int) -> DraftVocab:
    """Decode and check a draft vocab: ids distinct and in range, mask and digest theirs.

    Raises:
        MalformedPayload: not a frame.
        InvalidRequest: the ids, the mask or the digest do not fit.
    """
    tensors = decode(body).tensors
    ids, bits = tensors.get("selected_token_ids"), tensors.get("selected_token_mask")
    if ids is None or bits is None or len(tensors) != 2 or bits.dtype is not torch.uint8:
        raise InvalidRequest(
            "expected tensors selected_token_ids [D] and selected_token_mask (bits, uint8); got "
            f"{sorted(tensors)}"
        )
    if ids.numel() > vocab_size:  # before anything is made of them
        raise InvalidRequest(
            f"a draft vocab may have at most the target's {vocab_size} ids; got {ids.numel()}. "
            "Choose distinct ids of this target's vocab"
        )
    if bits.shape != (-(-vocab_size // 8),):
        raise InvalidRequest(
            f"selected_token_mask must be bits over the target's vocab of {vocab_size}; got "
            f"{list(bits.shape)} bytes. Build the mask with the target's vocab size"
        )
    vocab = DraftVocab.from_ids(ids)
    vocab.check_range(vocab_size)
    vocab = DraftVocab.from_ids(ids, unpack_bits(bits, (vocab_size,)))
    if vocab.digest != digest:
        raise InvalidRequest(f"the ids have digest {vocab.digest}; the path says {digest}")
    return vocab
