"""`POST /v1/inspect`: a text, token by token, with what the target expects after each."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from starlette.requests import Request

from eagle3_schemas import DraftVocab, tokenizer_digest
from eagle3_schemas.capture import pack_capture
from eagle3_schemas.errors import InvalidRequest, LimitExceeded, TargetFailed
from eagle3_schemas.inspection import (
    ExpectedToken,
    InspectedToken,
    InspectRequest,
    InspectResponse,
    TokenText,
)
from eagle3_schemas.messages import Limits, parse_json
from eagle3_schemas.supervision import unpack_bits
from eagle3_schemas.tokens import TokenBatch
from eagle3_server.admission import admit_capture
from eagle3_server.asgi import read_json_body
from eagle3_server.engine import CaptureJob, HostTensors
from eagle3_server.record import record_of
from eagle3_server.response_size import capture_bytes
from eagle3_server.service import Service

MAX_INSPECT_TOKENS = 512
MAX_INSPECT_BODY_BYTES = 64 * 1024
_FAILED_FOR_S = 60.0

logger = logging.getLogger(__name__)


class TokenTexts:
    """The target's own tokenizer, loaded when it is first needed. Thread-safe.

    Args:
        load: returns a transformers tokenizer, or raises anything if there is none. A failure is
            not tried again for a minute.

    Attributes:
        turn: what a request holds while it uses the tokenizer on a thread of the event loop's, so
            that texts never keep more than one of them from trainers' requests.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self.turn = asyncio.Lock()
        self._load = load
        self._failure: tuple[float, InvalidRequest] | None = None
        self._lock = threading.Lock()  # transformers' tokenizers keep settings while they work
        self._tokenizer: Any = None
        self._names: dict[int, str] = {}

    def ids_of(self, text: str, expected_digest: str | None) -> list[int]:
        """Tokenize, with the special tokens that the tokenizer adds by default.

        Raises:
            InvalidRequest: the checkpoint has no tokenizer, or another one than when the target
                was loaded; or the text has no token, or one that the tokenizer does not take.
        """
        with self._lock:
            if self._tokenizer is None:
                self._take(expected_digest)
            try:
                ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
            except Exception as exc:  # one without a token for what it does not know, say
                raise InvalidRequest(
                    f"the target's tokenizer does not take this text ({type(exc).__name__}: "
                    f"{str(exc)[:200]}); send another"
                ) from exc
        if not ids:
            raise InvalidRequest("the target's tokenizer makes no token of this text; send another")
        return ids

    def text_of(self, token_id: int) -> TokenText:
        """Name a token; after `ids_of`."""
        token = self._names.get(token_id)
        if token is None:  # logits are often wider than the vocab
            return TokenText(token_id=token_id, token=None, text="")
        with self._lock:
            text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        # SentencePiece drops the space of what comes first.
        dropped = _leading(token, "\u2581") - _leading(text, " ")
        text = " " * dropped + text
        return TokenText(token_id=token_id, token=token, text=text)

    def _take(self, expected_digest: str | None) -> None:
        if self._failure is not None and time.monotonic() < self._failure[0] + _FAILED_FOR_S:
            raise self._failure[1]
        try:
            tokenizer = self._load()
        except Exception as exc:  # no such files, an unknown class, a missing package
            logger.warning("no tokenizer found, so no text can be inspected: %.500s", exc)
            failure = InvalidRequest(
                "text cannot be inspected, since the target's checkpoint has no tokenizer that "
                f"loads ({type(exc).__name__}; the server's log says more). Put the tokenizer's "
                "files (tokenizer.json, tokenizer_config.json) beside the weights and restart the "
                "server"
            )
            self._failure = (time.monotonic(), failure)
            raise failure from exc
        if expected_digest not in (None, tokenizer_digest(tokenizer)):
            raise InvalidRequest(
                "the tokenizer beside the target's weights is not the one that was there when the "
                "server loaded them; restart the server"
            )
        self._names = {number: token for token, number in tokenizer.get_vocab().items()}
        self._tokenizer = tokenizer


def _leading(text: str, character: str) -> int:
    return len(text) - len(text.lstrip(character))


async def inspect_text(
    service: Service, texts: TokenTexts, http_request: Request
) -> InspectResponse:
    """Answer a request: an ordinary job, which takes its turn and its share of all limits.

    It is nobody's training, so it counts for no coverage, no padding and no trainer.

    Raises:
        RemoteEagle3Error: what admission, the queue and the target raise.
    """
    target = service.loaded()
    description = target.describe()
    body = await read_json_body(http_request, MAX_INSPECT_BODY_BYTES, service.bytes)
    request = parse_json(InspectRequest, body)
    digest = request.draft_vocab_digest
    vocabs = service.draft_vocabs
    vocab = vocabs.latest(description.vocab_size) if digest is None else vocabs.get(digest)
    record = record_of(http_request)

    def admit() -> tuple[list[int], CaptureJob]:
        ids = texts.ids_of(request.text, description.tokenizer_digest)
        _check_length(len(ids), service.limits())
        _, frame = pack_capture(
            _batch_of(ids),
            request_id=record.request_id,
            outputs=("loss_mask_probs", "argmax", "position_mask"),
            draft_vocab_digest=vocab.digest,
        )
        packed = bytearray(frame.to_bytes())
        return ids, admit_capture(packed, description, service.limits(), service.draft_vocabs)[1]

    async with texts.turn:
        ids, job = await asyncio.to_thread(admit)
    record.held.enter_context(service.tokens.reserve(record.client, job.input_ids.numel()))
    service.reserve_bytes(http_request, capture_bytes(job, description))
    try:
        result = await service.compute(lambda: target.capture(job), http_request, body)
    except TargetFailed as exc:
        raise TargetFailed(
            f"{exc.detail}. Positions are the text's tokens, counted from 1: a filler is at 0"
        ) from exc
    async with texts.turn:
        tokens = await asyncio.to_thread(_tokens_of, ids, result, vocab, texts, request.top_k)
    return InspectResponse(
        request_id=record.request_id,
        fingerprint=description.fingerprint,
        draft_vocab_digest=vocab.digest,
        draft_vocab_size=vocab.draft_vocab_size,
        tokens=tokens,
    )


def _check_length(count: int, limits: Limits) -> None:
    """Refuse a text of too many tokens; `_batch_of` adds one."""
    bounds = {"of this path": MAX_INSPECT_TOKENS}
    bounds["max_tokens_per_request - 1"] = limits.max_tokens_per_request - 1
    if limits.max_sequence_length is not None:
        bounds["the target's learned positions"] = limits.max_sequence_length
    name = min(bounds, key=bounds.__getitem__)
    if count > bounds[name]:
        raise LimitExceeded(
            f"a text may have {bounds[name]} tokens (limit: {name}); this one has {count}, special "
            "tokens included. Send a shorter piece of it"
        )


def _batch_of(ids: list[int]) -> TokenBatch:
    """Pack it behind a document of one token, with every position supervised.

    Supervision is shifted: column t has the target's logits at t + 1, so that those of a row's
    first position are in no column. Packed, the text is computed from position 0 as it is alone,
    and only the other document's token has no row: what is left is a row for each of the text's.
    """
    row = torch.tensor([[ids[0], *ids]])
    every = torch.ones_like(row, dtype=torch.bool)
    return TokenBatch(row, every, every, seq_lens=torch.tensor([[1, len(ids)]]))


def _tokens_of(
    ids: list[int], result: HostTensors, vocab: DraftVocab, texts: TokenTexts, top_k: int
) -> tuple[InspectedToken, ...]:
    """Join the text's tokens with their rows: row t is what comes after token t."""
    rows, argmax = result.tensors["loss_mask_probs"], result.tensors["argmax"].tolist()
    shape = (1, len(ids) + 1)
    in_vocab = unpack_bits(result.tensors["position_mask"], shape)[0].tolist()
    tokens = []
    for t, (token_id, row) in enumerate(zip(ids, rows, strict=True)):  # a row at a time: memory
        likeliest = row.topk(min(top_k, vocab.draft_vocab_size))
        expected = zip(
            vocab.selected_token_ids[likeliest.indices].tolist(),
            likeliest.values.tolist(),
            strict=True,
        )
        tokens.append(
            InspectedToken(
                **dict(texts.text_of(token_id)),
                next_expected=tuple(
                    ExpectedToken(**dict(texts.text_of(each)), probability=probability)
                    for each, probability in expected
                ),
                next_entropy_nats=float(torch.special.entr(row).sum(dtype=torch.float64)),
                next_argmax=texts.text_of(argmax[t]),
                next_argmax_in_draft_vocab=in_vocab[t],
            )
        )
    return tuple(tokens)
