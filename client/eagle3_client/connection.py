"""`Connection`: one server. HTTP in, project errors and decoded frames out; no retries here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import httpx
import torch
from pydantic import ValidationError

from eagle3_client.config import UNIX_SCHEME, client_id
from eagle3_client.failures import is_refused, problem_error, transport_error
from eagle3_client.instances import Instances
from eagle3_client.receiving import Take, TimedAnswer, fresh, receive
from eagle3_client.transport import HttpTransport
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.errors import (
    InvalidRequest,
    MalformedPayload,
    ProtocolMismatch,
    RemoteEagle3Error,
    TransportError,
)
from eagle3_schemas.frame import EncodedFrame, Frame, decode, encode
from eagle3_schemas.host_buffers import HostBuffers
from eagle3_schemas.protocol import (
    CLIENT_ID_HEADER,
    DEADLINE_HEADER,
    DRAFT_HEAD_PATH,
    DRAFT_VOCAB_PATH,
    EMBEDDINGS_PATH,
    FRAME_MEDIA_TYPE,
    HEALTH_PATH,
    INSTANCE_HEADER,
    MODEL_PATH,
    PROTOCOL_VERSION,
    READY_PATH,
    REQUEST_ID_HEADER,
    SELF_CHECK_PATH,
    SERVER_TIMING_HEADER,
    SUPERVISION_PATH,
    TARGET_HEAD_PATH,
)
from eagle3_schemas.self_check import SelfCheckResponse
from eagle3_schemas.supervision import pack_bits
from eagle3_schemas.tensors import byte_view

_CONNECT_TIMEOUT_S = 10.0
_HEALTH_TIMEOUT_S = 2.0


class Connection:
    """Speaks the protocol with one server. Thread-safe: requests run side by side.

    Every failure is a RemoteEagle3Error that carries the server's words and URL.

    Args:
        url: `http://host:port`, `https://host:port` or `unix:///path/of/socket`.
        address: IP address to use of those the host has; None leaves it to each connect.
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
        address: str | None = None,
        token: str | None,
        timeout_s: float,
        buffers: HostBuffers | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url if address is None else f"{url} [{address}]"
        self.bytes_received = 0
        self.instances = Instances()
        """The server's processes, by their answers."""
        self._lock = threading.Lock()
        self._registered: set[str] = set()
        self._token = token
        self._take = fresh if buffers is None else buffers.take
        self._timeout_s = timeout_s
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        headers = {"accept-encoding": "identity", CLIENT_ID_HEADER: client_id()}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        uds = url.removeprefix(UNIX_SCHEME) if url.startswith(UNIX_SCHEME) else None
        if transport is None:
            transport = HttpTransport(uds=uds, address=address)
        elif uds is not None:
            raise InvalidRequest(
                f"{url} brings its own transport; got another. Drop one of the two, or name the "
                "socket in yours, as httpx.HTTPTransport(uds=...), and http://localhost as the URL"
            )
        self._transport = transport
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

    def interrupt(self) -> None:
        """Fail the requests under way, so that they are repeated elsewhere; it stays usable.

        With another transport than `HttpTransport` nothing happens.
        """
        if isinstance(self._transport, HttpTransport):
            self._transport.interrupt()

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

    def _send(
        self,
        method: str,
        path: str,
        frame: EncodedFrame | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        take: Take = fresh,
        heard: Callable[[httpx.Headers], None] | None = None,
    ) -> torch.Tensor:
        """Send a request and return the body of a 200 answer as a 1-D uint8 tensor.

        `heard` is given the headers of that answer before its body is read.
        """
        timeout = self._timeout if timeout_s is None else timeout_s
        # An answer that has not begun by then comes too late, so the server need not compute it.
        # A little sooner than it is given up here, so that the server's own words arrive.
        headers = {DEADLINE_HEADER: str(int(950 * self._timeout_s))}
        if request_id is not None:
            headers[REQUEST_ID_HEADER] = request_id
        content = None
        if frame is not None:
            headers["content-type"] = FRAME_MEDIA_TYPE
            content = frame.to_bytes()
        last_at_sending = self.instances.last
        try:
            with self._http.stream(
                method,
                path,
                headers=headers,
                content=content,
                timeout=timeout,
                extensions={"may_repeat": method != "POST"},
            ) as response:
                self.instances.note(response.headers.get(INSTANCE_HEADER), last_at_sending)
                if response.status_code != 200:
                    raise problem_error(response, self.url, hide=self._token)
                if heard is not None:
                    heard(response.headers)
                body = receive(response, take, self.url)
        except httpx.TransportError as exc:
            if self._http.is_closed:
                raise RemoteEagle3Error("the backend was closed", url=self.url) from exc
            raise transport_error(exc, self.url, request_id) from exc
        except RuntimeError as exc:
            if not self._http.is_closed:
                raise
            raise RemoteEagle3Error("the backend was closed", url=self.url) from exc
        with self._lock:
            self.bytes_received += body.numel()
        return body
