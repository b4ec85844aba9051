"""`Connection`: one server. HTTP in, project errors and decoded frames out; no retries here."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable

import httpx
import torch
from pydantic import ValidationError

from eagle3_client.config import UNIX_SCHEME
from eagle3_client.http1 import remedy_of_lasting
from eagle3_client.transport import HttpTransport
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.errors import (
    InvalidRequest,
    MalformedPayload,
    ProtocolMismatch,
    RemoteEagle3Error,
    TransportError,
    error_from_problem,
)
from eagle3_schemas.frame import EncodedFrame, Frame, decode, encode
from eagle3_schemas.host_buffers import HostBuffers
from eagle3_schemas.messages import Problem
from eagle3_schemas.protocol import (
    CLIENT_ID_HEADER,
    DEADLINE_HEADER,
    DRAFT_HEAD_PATH,
    DRAFT_VOCAB_PATH,
    EMBEDDINGS_PATH,
    FRAME_MEDIA_TYPE,
    MODEL_PATH,
    PROTOCOL_VERSION,
    READY_PATH,
    REQUEST_ID_HEADER,
    SUPERVISION_PATH,
)
from eagle3_schemas.supervision import pack_bits
from eagle3_schemas.tensors import byte_view

_CONNECT_TIMEOUT_S = 10.0
_MAX_RESPONSE_BYTES = 1 << 38  # no response is that large; a length that lies must not allocate it
_MAX_PROBLEM_BYTES = 1 << 16

Take = Callable[[int], torch.Tensor]


def _fresh(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def _client_id() -> str:
    """Return a name of this trainer process, for the server's queue, log and status."""
    name = f"{socket.gethostname()[:40]}-{os.environ.get('RANK', '0')[:6]}-{os.getpid()}"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


class Connection:
    """Speaks the protocol with one server. Thread-safe: requests run side by side.

    Every failure is a RemoteEagle3Error that carries the server's words and URL.

    Args:
        url: `http://host:port`, `https://host:port` or `unix:///path/of/socket`.
        token: bearer token, or None.
        timeout_s: seconds without a byte before an attempt is given up.
        buffers: pool to receive supervision into; None takes fresh memory, which batches may keep.
        transport: httpx transport to use instead of `HttpTransport`.

    Raises:
        InvalidRequest: a `unix://` URL and a transport, which connects elsewhere.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_s: float,
        buffers: HostBuffers | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url
        self.bytes_received = 0
        self._lock = threading.Lock()
        self._registered: set[str] = set()
        self._take = _fresh if buffers is None else buffers.take
        self._timeout_s = timeout_s
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        headers = {"accept-encoding": "identity", CLIENT_ID_HEADER: _client_id()}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        uds = url.removeprefix(UNIX_SCHEME) if url.startswith(UNIX_SCHEME) else None
        if transport is None:
            transport = HttpTransport(uds=uds)
        elif uds is not None:
            raise InvalidRequest(
                f"{url} brings its own transport; got another. Drop one of the two, or name the "
                "socket in yours, as httpx.HTTPTransport(uds=...), and http://localhost as the URL"
            )
        self._http = httpx.Client(
            base_url="http://localhost" if uds is not None else url,
            headers=headers,
            timeout=self._timeout,
            transport=transport,
            # A target is a direct peer: an ambient http_proxy could not reach a cluster's address.
            trust_env=False,
        )

    def close(self) -> None:
        """Close the sockets; requests under way fail at once.

        With another transport than `HttpTransport` one that waits for a byte may go on waiting.
        """
        self._http.close()

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

    def input_embeddings(self) -> Frame:
        """Download the input embeddings: a frame with `weight`."""
        return self._decode(self._send("GET", EMBEDDINGS_PATH))

    def draft_head(self, digest: str) -> Frame:
        """Download a registered draft vocab's head: `weight` [D, H], maybe `bias` [D]."""
        return self._decode(self._send("GET", DRAFT_HEAD_PATH.format(digest=digest)))

    def supervise(self, frame: EncodedFrame, request_id: str) -> Frame:
        """Send one supervision request and wait for its response."""
        return self._decode(
            self._send("POST", SUPERVISION_PATH, frame, request_id, take=self._take)
        )

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

    def forget_registered(self, digest: str) -> None:
        """Note that the server no longer has a draft vocab (it restarted, or dropped it)."""
        with self._lock:
            self._registered.discard(digest)

    def _decode(self, body: torch.Tensor) -> Frame:
        try:
            return decode(body)
        except MalformedPayload as exc:
            # The server sends valid frames, so the bytes changed on the way: worth a repeat.
            raise TransportError(f"the response is corrupted: {exc.detail}", url=self.url) from exc

    def _send(
        self,
        method: str,
        path: str,
        frame: EncodedFrame | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        take: Take = _fresh,
    ) -> torch.Tensor:
        """Send a request and return the body of a 200 answer as a 1-D uint8 tensor."""
        timeout = self._timeout if timeout_s is None else timeout_s
        # An answer that has not begun by then comes too late, so the server need not compute it.
        headers = {DEADLINE_HEADER: str(int(1000 * self._timeout_s))}
        if request_id is not None:
            headers[REQUEST_ID_HEADER] = request_id
        content = None
        if frame is not None:
            headers["content-type"] = FRAME_MEDIA_TYPE
            content = frame.to_bytes()
        try:
            with self._http.stream(
                method,
                path,
                headers=headers,
                content=content,
                timeout=timeout,
            ) as response:
                if response.status_code != 200:
                    raise self._problem(response)
                body = self._receive(response, take)
        except httpx.TransportError as exc:
            if self._http.is_closed:
                raise RemoteEagle3Error("the backend was closed", url=self.url) from exc
            lasting = remedy_of_lasting(exc)
            remedy = lasting or "check that the server runs, and that the URL is right"
            error = TransportError(
                f"{type(exc).__name__}: {exc or 'no answer'}; {remedy}",
                url=self.url,
                request_id=request_id,
            )
            error.is_retryable = lasting is None
            raise error from exc
        except RuntimeError as exc:
            if not self._http.is_closed:
                raise
            raise RemoteEagle3Error("the backend was closed", url=self.url) from exc
        with self._lock:
            self.bytes_received += body.numel()
        return body

    def _receive(self, response: httpx.Response, take: Take) -> torch.Tensor:
        """Read a body straight into one buffer of its announced length."""
        length = response.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or int(length[:20]) > _MAX_RESPONSE_BYTES:
            raise TransportError(
                f"expected a content-length up to {_MAX_RESPONSE_BYTES}; got {length[:40]!r}",
                url=self.url,
            )
        body = take(int(length))
        view = byte_view(body)
        received = 0
        if (readinto := response.extensions.get("readinto")) is not None:
            while received < view.nbytes and (count := readinto(view[received:])):
                received += count
        else:
            for chunk in response.iter_raw():
                if received + len(chunk) > view.nbytes:
                    raise TransportError(
                        f"the response is longer than its {length} bytes", url=self.url
                    )
                view[received : received + len(chunk)] = chunk
                received += len(chunk)
        if received != view.nbytes:
            raise TransportError(
                f"expected {length} bytes; the response ended after {received}", url=self.url
            )
        return body

    def _problem(self, response: httpx.Response) -> RemoteEagle3Error:
        """Rebuild the server's error, keeping its words."""
        text = _text(response)
        try:
            problem = Problem.model_validate_json(text)
        except ValidationError:
            problem = Problem(detail=text[:500] or response.reason_phrase)
        error = error_from_problem(
            problem.code, response.status_code, problem.detail, problem.request_id
        )
        error.url = self.url
        after = response.headers.get("retry-after", "")
        error.retry_after_s = float(after) if after.isascii() and after.isdigit() else None
        return error


def _text(response: httpx.Response) -> str:
    """Return the beginning of a body as text: a gateway's may have any length."""
    body = b""
    try:
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _MAX_PROBLEM_BYTES:
                break
    except httpx.DecodingError:  # a gateway's body, compressed though we asked for identity
        return ""
    return body.decode(errors="replace")
