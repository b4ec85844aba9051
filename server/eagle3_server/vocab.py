"""`DraftVocabRegistry`: the draft vocabs clients registered, by digest."""

from __future__ import annotations

import threading
from collections import OrderedDict

from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import VocabMappingMissing


class DraftVocabRegistry:
    """Holds the last used draft vocabs; the least recently used goes first. Thread-safe.

    Trainers never share one by accident: every request names its own by digest.

    Args:
        max_draft_vocabs: how many are kept; a client whose vocab was dropped registers it again.
    """

    def __init__(self, max_draft_vocabs: int) -> None:
        self._max = max_draft_vocabs
        self._lock = threading.Lock()
        self._vocabs: OrderedDict[str, DraftVocab] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vocabs)

    def register(self, vocab: DraftVocab) -> None:
        """Add a checked draft vocab, or mark a known one as used."""
        with self._lock:
            self._vocabs[vocab.digest] = self._vocabs.pop(vocab.digest, vocab)
            if len(self._vocabs) > self._max:
                self._vocabs.popitem(last=False)

    def known(self) -> tuple[DraftVocab, ...]:
        """Return all, the last used first."""
        with self._lock:
            return tuple(reversed(self._vocabs.values()))

    def latest(self, vocab_size: int) -> DraftVocab:
        """Return the one used last; the whole vocab, which fleets compare servers on, comes last.

        Args:
            vocab_size: V of the target.

        Raises:
            VocabMappingMissing: there is none.
        """
        known = self.known()
        if not known:
            raise VocabMappingMissing(
                "no trainer has registered a draft vocab on this server since it started; start "
                "one, or call set_vocab_mapping, then repeat"
            )
        return next((each for each in known if each.draft_vocab_size < vocab_size), known[0])

    def get(self, digest: str) -> DraftVocab:
        """Return a registered draft vocab.

        Raises:
            VocabMappingMissing: it was never registered here, or dropped. Register it again.
        """
        with self._lock:
            vocab = self._vocabs.pop(digest, None)
            if vocab is not None:
                self._vocabs[digest] = vocab
                return vocab
        raise VocabMappingMissing(
            f"draft vocab {digest[:12]}… is not registered on this server (it restarted, or "
            "dropped the least recently used); call set_vocab_mapping, then repeat"
        )
