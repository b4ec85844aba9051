"""`Fleet`: the servers of one target; hands out the least busy one and guards their sameness."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import torch

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.device import receive_buffers
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.draft_head import DraftHead
from eagle3_schemas.errors import FingerprintMismatch, InvalidRequest, ProtocolMismatch
from eagle3_schemas.exchange import unpack_draft_head

_CACHED_HEADS = 2  # the current draft vocab, and one that requests in flight may still name
_SAME_EVERYWHERE = (
    "fingerprint",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "dtype",
    "attn_implementation",
    "head",
)


class Fleet:
    """One connection per URL. Thread-safe.

    Args:
        settings: URLs, token, timeouts.
        transport: httpx transport that all connections use instead of the network's.
    """

    def __init__(self, settings: ClientSettings, transport: httpx.BaseTransport | None) -> None:
        buffers = receive_buffers(settings.device)
        self.connections = [
            Connection(
                url,
                token=settings.token,
                timeout_s=settings.timeout_s,
                buffers=buffers,
                transport=transport,
            )
            for url in settings.urls
        ]
        self._lock = threading.Lock()
        self._busy = [0] * len(self.connections)
        self._turn = 0
        self._info: ModelInfo | None = None
        self._head_lock = threading.Lock()  # held while downloading: the others need it too
        self._heads: OrderedDict[str, DraftHead] = OrderedDict()

    @property
    def bytes_received(self) -> int:
        """Body bytes received from all servers so far."""
        return sum(connection.bytes_received for connection in self.connections)

    @contextmanager
    def least_busy(self) -> Iterator[Connection]:
        """Lend the connection with the fewest requests under way; equals take turns.

        A request that failed is so most likely repeated at another server.
        """
        with self._lock:
            count = len(self.connections)
            order = [(self._turn + i) % count for i in range(count)]
            index = min(order, key=lambda i: self._busy[i])
            self._turn = (index + 1) % count
            self._busy[index] += 1
        try:
            yield self.connections[index]
        finally:
            with self._lock:
                self._busy[index] -= 1

    def model_info(self) -> ModelInfo:
        """Ask every server once what it serves; they must agree.

        Raises:
            FingerprintMismatch: two servers differ; the message names them and the difference.
        """
        if self._info is not None:
            return self._info
        infos = [connection.model_info() for connection in self.connections]
        for connection, info in zip(self.connections, infos, strict=True):
            for name in _SAME_EVERYWHERE:
                expected, got = getattr(infos[0], name), getattr(info, name)
                if got != expected:
                    raise FingerprintMismatch(
                        f"all servers must serve the same target: {name} is {expected} at "
                        f"{self.connections[0].url} ({infos[0].model_id}) and {got} at "
                        f"{connection.url} ({info.model_id}). Serve one model everywhere",
                        url=connection.url,
                    )
        self._info = infos[0]
        return self._info

    def draft_head(
        self, draft_vocab: DraftVocab, connection: Connection, device: torch.device
    ) -> DraftHead:
        """Return a draft vocab's head on the device; downloaded once, the last few are kept.

        Raises:
            FingerprintMismatch: another target answered.
            ProtocolMismatch: the answer is not that head.
        """
        with self._head_lock:
            head = self._heads.pop(draft_vocab.digest, None)
            if head is None:
                frame = connection.draft_head(draft_vocab.digest)
                self.check_fingerprint(frame.fields.get("fingerprint"), connection.url)
                try:
                    head = unpack_draft_head(frame, draft_vocab, device)
                except InvalidRequest as exc:
                    raise ProtocolMismatch(
                        f"the draft head is not the one asked for: {exc.detail}. Check that both "
                        "sides have the same version",
                        url=connection.url,
                    ) from exc
            self._heads[draft_vocab.digest] = head
            if len(self._heads) > _CACHED_HEADS:
                self._heads.popitem(last=False)
            return head

    def check_fingerprint(self, fingerprint: object, url: str) -> None:
        """Raise FingerprintMismatch if a response came from another target than the first."""
        if self._info is not None and fingerprint != self._info.fingerprint:
            raise FingerprintMismatch(
                f"expected target {self._info.fingerprint} ({self._info.model_id}); the response "
                f"is from {fingerprint}: the server came back with another model. Serve the same "
                "one, or start a new run",
                url=url,
            )

    def close(self) -> None:
        """Close all connections."""
        for connection in self.connections:
            connection.close()
