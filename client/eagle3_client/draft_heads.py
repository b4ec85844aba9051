"""`DraftHeads`: the heads that encoding `hidden` needs, each downloaded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.draft_head import DraftHead
from eagle3_schemas.errors import InvalidRequest, ProtocolMismatch
from eagle3_schemas.exchange import unpack_draft_head
from eagle3_schemas.frame import Frame

_CACHED_HEADS = 2  # the current draft vocab, and one that requests in flight may still name

Cached = Callable[[str, str, Callable[[], Frame]], Frame]
"""`(kind, name, download)`: a frame that is kept somewhere, or else from `download`."""


class DraftHeads:
    """Heads by draft vocab; the last few are kept. Thread-safe.

    Args:
        device: where they are kept.
        check_fingerprint: given the answer's fingerprint and URL, raises if it is another target's.
    """

    def __init__(
        self, device: torch.device, check_fingerprint: Callable[[object, str], None]
    ) -> None:
        self._device, self._check_fingerprint = device, check_fingerprint
        self.cached: Cached = lambda _kind, _name, download: download()
        """Where heads may be kept on disk; set before the first `get`."""
        self._lock = threading.Lock()  # held while downloading: the others need it too
        self._heads: OrderedDict[str, DraftHead] = OrderedDict()

    def get(self, draft_vocab: DraftVocab, connection: Connection) -> DraftHead:
        """Return a draft vocab's head; ask `connection` for one that is not here.

        Raises:
            FingerprintMismatch: another target answered.
            ProtocolMismatch: the answer is not that head.
        """
        with self._lock:
            head = self._heads.pop(draft_vocab.digest, None)
            if head is None:
                head = self._download(draft_vocab, connection)
            self._heads[draft_vocab.digest] = head
            if len(self._heads) > _CACHED_HEADS:
                self._heads.popitem(last=False)
            return head

    def _download(self, draft_vocab: DraftVocab, connection: Connection) -> DraftHead:
        def download() -> Frame:
            frame = connection.draft_head(draft_vocab.digest)
            self._check_fingerprint(frame.fields.get("fingerprint"), connection.url)
            unpack(frame, torch.device("cpu"))  # a wrong one must not stay on disk
            return frame

        def unpack(frame: Frame, device: torch.device) -> DraftHead:
            try:
                return unpack_draft_head(frame, draft_vocab, device)
            except InvalidRequest as exc:
                raise ProtocolMismatch(
                    f"the draft head is not the one asked for: {exc.detail}. Check that both "
                    "sides have the same version",
                    url=connection.url,
                ) from exc

        return unpack(self.cached("draft_head", draft_vocab.digest, download), self._device)
