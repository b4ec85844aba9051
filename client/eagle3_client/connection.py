"""`Connection`: one server. HTTP in, project errors and decoded frames out; no retries here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import httpx
import torch
from pydantic import ValidationError

from eagle3_client.failures import is_refused
from eagle3_client.receiving import TimedAnswer
from eagle3_client.wire import Wire
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.errors import (
    MalformedPayload,
    ProtocolMismatch,
    RemoteEagle3Error,
    TransportError,
)
from eagle3_schemas.frame import EncodedFrame, Frame, decode, encode
from eagle3_schemas.protocol import (
    DRAFT_HEAD_PATH,
    DRAFT_VOCAB_PATH,
    EMBEDDINGS_PATH,
    HEALTH_PATH,
    MODEL_PATH,
    PROTOCOL_VERSION,
    READY_PATH,
    SELF_CHECK_PATH,
    SERVER_TIMING_HEADER,
    SUPERVISION_PATH,
    TARGET_HEAD_PATH,
)
from eagle3_schemas.self_check import SelfCheckResponse
from eagle3_schemas.supervision import pack_bits
from eagle3_schemas.tensors import byte_view

_HEALTH_TIMEOUT_S = 2.0


class Connection(Wire):
    """Speaks the protocol with one server. Thread-safe: requests run side by side.

    Arguments as `Wire` has them.
    """

    def has_ended(self, instance: str | None) -> bool | None:
        """Whether the process of that name is gone; None if nobody can tell.

        It is if another answers in its place, or the host refuses the connection.
        """
        try:
            self._send("GET", HEALTH_PATH, timeout_s=min(_HEALTH_TIMEOUT_S, self._timeout_s))
        except TransportError as exc:
            return True if is_refused(exc) else None
        except RemoteEagle3Error:
            return None
        return None if self.instances.is_balanced else self.instances.last != instance

    def check_alive(self, timeout_s: float) -> None:
        """Raise RemoteEagle3Error unless the server's process answers, whatever its target does."""
        self._send("GET", HEALTH_PATH, timeout_s=min(timeout_s, self._timeout_s))

    def check_ready(self, timeout_s: float) -> None:
        """Raise NotReady unless the server's target is loaded; waits `timeout_s` at most."""
        self._send("GET", READY_PATH, timeout_s=min(timeout_s, self._timeout_s))

    def model_info(self) -> ModelInfo:
        """Ask what is served.

        Raises:
            ProtocolMismatch: not an eagle3-remote server of this protocol version.
        """
        body = self._send("GET", MODEL_PATH)
        try:
            fields = json.loads(bytes(byte_view(body)))
            version = fields.get("protocol_version")
            if version != PROTOCOL_VERSION:
                raise ProtocolMismatch(
                    f"expected protocol version {PROTOCOL_VERSION}; the server speaks {version}. "
                    "Upgrade the older side",
                    url=self.url,
                )
            return ModelInfo.model_validate_json(bytes(byte_view(body)))
        except (ValueError, AttributeError, ValidationError, RecursionError) as exc:
            if isinstance(exc, RemoteEagle3Error):
                raise
            raise ProtocolMismatch(
                f"the answer to {MODEL_PATH} is not model info of protocol version "
                f"{PROTOCOL_VERSION}: {exc}. Check the URL and both sides' versions",
                url=self.url,
            ) from exc

    def self_check(self) -> SelfCheckResponse | None:
        """Have the server check its target anew; None if it is too old for that.

        Raises:
            ProtocolMismatch: the answer is none of this protocol version.
        """
        try:
            body = self._send("POST", SELF_CHECK_PATH)
        except ProtocolMismatch:  # 404: it does not have the path
            return None
        try:
            return SelfCheckResponse.model_validate_json(bytes(byte_view(body)))
        except ValidationError as exc:
            raise ProtocolMismatch(
                f"the answer to {SELF_CHECK_PATH} is none of protocol version {PROTOCOL_VERSION}: "
                f"{exc}. Check both sides' versions",
                url=self.url,
            ) from exc

    def input_embeddings(self) -> Frame:
        """Download the input embeddings: a frame with `weight`."""
        return self._decode(self._send("GET", EMBEDDINGS_PATH))

    def target_head(self) -> Frame:
        """Download the whole head and the final norm: a frame with `weight` and others."""
        return self._decode(self._send("GET", TARGET_HEAD_PATH))

    def draft_head(self, digest: str) -> Frame:
        """Download a registered draft vocab's head: `weight` [D, H], maybe `bias` [D]."""
        return self._decode(self._send("GET", DRAFT_HEAD_PATH.format(digest=digest)))

    def supervise(
        self,
        frame: EncodedFrame,
        request_id: str,
        heard: Callable[[httpx.Headers], None] | None = None,
        path: str = SUPERVISION_PATH,
    ) -> Frame:
        """Send one request with a batch and wait for its response; `heard` is given its headers."""
        return self._decode(
            self._send("POST", path, frame, request_id, take=self._take, heard=heard)
        )

    def supervise_timed(
        self,
        frame: EncodedFrame,
        request_id: str,
        heard: Callable[[httpx.Headers], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> TimedAnswer:
        """Do as `supervise`, and say what it took by `clock`, seconds."""
        headers: list[httpx.Headers] = []

        def note(came: httpx.Headers) -> None:
            headers.append(came)
            heard(came)

        started = clock()
        body = self._send("POST", SUPERVISION_PATH, frame, request_id, take=self._take, heard=note)
        elapsed_s = clock() - started
        timing = headers[0].get(SERVER_TIMING_HEADER, "")
        return TimedAnswer(self._decode(body), body.numel(), elapsed_s, timing)

    def ensure_registered(self, vocab: DraftVocab, vocab_size: int) -> None:
        """Register a draft vocab unless this server is known to have it."""
        with self._lock:
            if vocab.digest in self._registered:
                return
        tensors = {
            "selected_token_ids": vocab.selected_token_ids.to(torch.int32),
            "selected_token_mask": pack_bits(vocab.mask(vocab_size)),
        }
        path = DRAFT_VOCAB_PATH.format(digest=vocab.digest)
        self._send("PUT", path, encode({}, tensors))
        with self._lock:
            self._registered.add(vocab.digest)

    def forget_registered(self, digest: str | None = None) -> None:
        """Note that the server no longer has a draft vocab, or None: any."""
        with self._lock:
            if digest is None:
                self._registered.clear()
            self._registered.discard(digest or "")

    def _decode(self, body: torch.Tensor) -> Frame:
        try:
            return decode(body)
        except (MalformedPayload, ProtocolMismatch) as exc:
            # The server sends valid frames, of the version it said in its model info, so the bytes
            # changed on the way: worth a repeat.
            raise TransportError(f"the response is corrupted: {exc.detail}", url=self.url) from exc
