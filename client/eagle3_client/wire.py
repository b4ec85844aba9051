"""`Wire`: the sockets to one server. Bytes in, bytes out, and its words as our errors."""

from __future__ import annotations

import threading
from collections.abc import Callable

import httpx
import torch

from eagle3_client.config import UNIX_SCHEME, client_id
from eagle3_client.failures import problem_error, transport_error
from eagle3_client.instances import Instances
from eagle3_client.receiving import Take, fresh, receive
from eagle3_client.transport import HttpTransport
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error
from eagle3_schemas.frame import EncodedFrame
from eagle3_schemas.host_buffers import HostBuffers
from eagle3_schemas.protocol import (
    CLIENT_ID_HEADER,
    DEADLINE_HEADER,
    FRAME_MEDIA_TYPE,
    INSTANCE_HEADER,
    REQUEST_ID_HEADER,
)

_CONNECT_TIMEOUT_S = 10.0


class Wire:
    """Sends requests to one server. Thread-safe: they run side by side.

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
        self._registered: set[str] = set()  # digests of the draft vocabs the server has
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
