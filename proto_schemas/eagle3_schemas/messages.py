"""Frozen pydantic models, one per message; ill-typed fields are errors, and so are unknown ones."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagle3_schemas.errors import InvalidRequest, MalformedPayload
from eagle3_schemas.protocol import PROTOCOL_VERSION, REQUEST_ID_PATTERN

Rows = Literal["position_mask", "loss_mask", "all"]
"""Which rows of `target_probs` are sent: those trained on (the default), every supervised one
(P-EAGLE), or every position. `position_mask` is sent whole in any case."""

EncodingName = Literal["probs", "logits", "hidden"]
AuxDtype = Literal["model", "float8_e4m3"]
"""How aux hidden states travel: as they are, or in fp8 with a scale per 64 (lossy)."""

RequestId = Annotated[str, Field(pattern=REQUEST_ID_PATTERN)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 40)]

_PROBLEMS, _NAME_LENGTH, _WORDS_LENGTH = 8, 60, 300


class Message(BaseModel):
    """Base of all messages: frozen, strict about types, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Description(Message):
    """Base of what a server tells about itself: fields that a reader does not know are ignored.

    So a newer server may tell more. A request stays strict, since a server must not pass over an
    option it does not know, and so does what numbers are computed from.
    """

    model_config = ConfigDict(extra="ignore")


AnyMessage = TypeVar("AnyMessage", bound=Message)


def parse(kind: type[AnyMessage], fields: object) -> AnyMessage:
    """Validate msgpack or JSON values as a message, saying which field was wrong.

    Raises:
        InvalidRequest: not a map, or a missing or ill-typed field, or one that must be known.
    """
    if not isinstance(fields, dict):  # what a JSON body holds at its top is the sender's choice
        raise InvalidRequest(f"{kind.__name__} must be a map of fields; got {fields!r:.100}")
    try:
        # Lax for tuples only: msgpack and JSON have lists alone.
        return kind.model_validate(
            {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in fields.items()
            }
        )
    except ValidationError as exc:
        raise InvalidRequest(_words(kind, exc)) from exc


def parse_json(kind: type[AnyMessage], body: bytes | bytearray) -> AnyMessage:
    """Validate a JSON text as a message, saying which field was wrong.

    Raises:
        MalformedPayload: not JSON.
        InvalidRequest: not a map, or a missing or ill-typed field, or one that must be known.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        is_json = all(error["type"] != "json_invalid" for error in exc.errors(include_url=False))
        raise (InvalidRequest if is_json else MalformedPayload)(_words(kind, exc)) from exc


def _words(kind: type[Message], exc: ValidationError) -> str:
    """Say what is wrong in few words: they are logged, and a sender may make many and long ones."""
    errors = exc.errors(include_url=False, include_input=False)
    problems = [
        f"{'.'.join(str(part)[:_NAME_LENGTH] for part in error['loc'][:5]) or 'message'}: "
        f"{error['msg'][:_WORDS_LENGTH]}"
        for error in errors[:_PROBLEMS]
    ]
    if len(errors) > _PROBLEMS:
        problems.append(f"and {len(errors) - _PROBLEMS} more")
    return f"{kind.__name__} is not valid: {'; '.join(problems)}"


class BatchRequest(Message):
    """Fields of every request that has a batch.

    Its tensors: `attention_mask` and `loss_mask` as bits ([ceil(B*T/8)] uint8, see `pack_bits`),
    and `input_ids` int32: [B*T], or, when `pad_token_id` is set, only the ids at positions where
    either mask is 1, in row order; the others are that pad id. Of packed rows also `seq_lens`,
    int32 [B, max_docs]: the documents' lengths, 0-padded, each row's sum T.
    """

    request_id: RequestId
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)]
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    pad_token_id: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    exact: bool = False


class SupervisionRequest(BatchRequest):
    """Fields of a supervision request's frame; its tensors are those of `BatchRequest`."""

    draft_vocab_digest: Digest
    aux_layer_ids: Annotated[tuple[int, ...], Field(max_length=256)] | None = None
    encoding: EncodingName = "probs"
    rows: Rows = "position_mask"
    aux_dtype: AuxDtype = "model"


class SupervisionResponse(Message):
    """Fields of a supervision response's frame.

    Its tensors: `aux_hidden_states` [n, 3H] in model dtype, the n positions where `attention_mask`
    is 1 in row order (or `aux_codes` and `aux_scales`, see `encode_aux`); `position_mask` as bits
    over [B, T]; and the encoding's tensor [m, C] for the rows asked for, in row order, without the
    last column (`rows_on_wire`). It repeats what it answers, so that a client can tell it is its
    own.
    """

    request_id: RequestId
    fingerprint: str
    draft_vocab_digest: Digest
    aux_layer_ids: tuple[int, ...]
    encoding: EncodingName
    rows: Rows
    aux_dtype: AuxDtype


class HeadFields(Message):
    """What follows a head: upcast to float32, `multiply`, `divide`, `softcap`, in this order."""

    fingerprint: str
    upcast: bool
    multiply: float | None
    divide: float | None
    softcap: float | None


class DraftHeadFields(HeadFields):
    """Fields of a draft head's frame; its tensors: `weight` [D, H] and, if any, `bias` [D]."""

    draft_vocab_digest: Digest


class TargetHeadFields(HeadFields):
    """Fields of a target head's frame.

    Its tensors: `weight` [V, H] and, if any, `bias` [V], `norm_weight` [H], `norm_bias` [H]. The
    norm is as `NormForm` in `target_head.py` describes; None: of no form known.
    """

    norm: Literal["rms", "layer"] | None
    norm_eps: float | None
    norm_gain_in_float32: bool


class Limits(Description):
    """What the server admits in one request."""

    max_tokens_per_request: Count
    """Largest B * T, padding included."""
    max_sequence_length: Count | None
    """Largest T, where the target has a table of learned positions; None: no such table."""
    max_body_bytes: Count


class ModelInfo(Description):
    """What the server serves (`GET /v1/model`)."""

    protocol_version: int = PROTOCOL_VERSION
    server_version: str
    model_id: str
    revision: str | None
    architecture: str
    fingerprint: str
    """Short digest of what is served: name, revision, config, weights (names, shapes, dtypes and
    sampled bytes), dtype, quantization, tokenizer, layer convention and protocol."""
    config_digest: str | None = None
    weights_digest: str | None = None
    """Its parts, so that two servers' difference has a name."""
    quantization: str | None = None
    """How the weights are quantised, such as `bitsandbytes nf4`, or None."""
    tokenizer_digest: str | None = None
    """`eagle3_schemas.tokenizer_digest` of the checkpoint's tokenizer; None if it has none."""
    num_hidden_layers: Count
    hidden_size: Count
    vocab_size: Count
    """V, the width of the logits."""
    input_vocab_size: Count
    """Bound of `input_ids`: rows of the input embeddings."""
    dtype: str
    device: str
    device_name: str
    attn_implementation: str | None
    torch_version: str
    num_threads: Count
    """torch's intra-op threads: on the CPU part of what `exact` depends on."""
    deterministic: bool | None = None
    """Whether two runs of the warm-up gave the same bits; None: not tried. If not, no `exact`."""
    aux_layer_ids: tuple[int, ...] | None
    """Used when a request names none; None: the target is too shallow for the default rule."""
    aux_layer_convention: str
    hooks: Literal["verified", "not comparable"] | None = None
    """Whether the captured layers were, at load, bit for bit transformers' own `hidden_states`; a
    target whose were not is not served. None: not tried."""
    hooks_reason: str | None = None
    """Why they could not be compared, or None."""
    head: Literal["full", "rows"]
    """Whether the head runs for the rows needed, or (a fallback) for every position."""
    head_reason: str | None = None
    """Why it is a fallback, or None."""
    encodings: tuple[str, ...]
    """What this target offers; `hidden` needs a plain linear head."""
    packing: Literal["masked", "documents"] | None = None
    """How packed rows are computed with `exact`: in one forward under a block-causal mask, or each
    document as a row of its own, as they are without `exact`. None: they are refused."""
    packing_reason: str | None = None
    """Why it is not `masked`, or None."""
    outputs: dict[str, str] = {}
    """What `POST /v1/capture` gives of this target: each output's shape, dtype and convention."""
    outputs_reason: str | None = None
    """Why some of `eagle3_schemas.capture.OUTPUTS` are not among them, or None."""
    limits: Limits


class DraftVocabInfo(Description):
    """A registered draft vocab."""

    digest: Digest
    draft_vocab_size: Count


class Problem(BaseModel):
    """Body of every error, `application/problem+json` (RFC 9457); unknown members are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    title: str = ""
    status: int = 0
    code: str | None = None
    detail: str = ""
    request_id: str | None = None
