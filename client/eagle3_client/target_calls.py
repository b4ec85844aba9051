"""`TargetCalls`: what a backend tells of its target, and downloads of it once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import httpx

from eagle3_client.config import ClientSettings
from eagle3_client.dispatch import Dispatcher
from eagle3_client.draft_config import draft_config
from eagle3_client.preflight import (
    DEFAULT_SUPERVISED_SHARE,
    DEFAULT_TIME_LIMIT_S,
    run_preflight,
)
from eagle3_client.preflight_report import PreflightReport
from eagle3_client.results import TargetEmbeddings
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.errors import VocabMappingMissing
from eagle3_schemas.self_check import SelfCheck
from eagle3_schemas.tokenizer import HasVocab


class TargetCalls:
    """The calls of `RemoteEagle3Backend` that are about the target itself. Thread-safe."""

    _settings: ClientSettings
    _transport: httpx.BaseTransport | None
    _dispatcher: Dispatcher
    _draft_vocab: DraftVocab | None
    _lock: threading.Lock
    _embeddings: TargetEmbeddings | None = None

    @property
    def bytes_received(self) -> int:
        """Body bytes received from all servers so far."""
        return self._dispatcher.fleet.bytes_received

    def model_info(self) -> ModelInfo:
        """Return what the servers serve; asked once, then kept.

        Raises:
            FingerprintMismatch: the servers do not serve the same target.
        """
        return self._dispatcher.model_info()

    @property
    def fingerprint(self) -> str:
        """Short name of the target, the same for as long as it gives the same supervision.

        Keep it with the checkpoint of a run, and give it as `expect_fingerprint` to resume. Covers
        name, revision, config, weights, dtype, quantization and tokenizer.

        Raises:
            RemoteEagle3Error: as `model_info`.
        """
        return self.model_info().fingerprint

    def preflight(
        self,
        tokenizer: HasVocab | None = None,
        expect_aux_layer_ids: Sequence[int] | None = None,
        *,
        draft_vocab_size: int | None = None,
        supervised_share: float = DEFAULT_SUPERVISED_SHARE,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    ) -> PreflightReport:
        """Check every server before a run, on connections of its own; retries nothing.

        Args:
            tokenizer: of the trainer, to compare with the served checkpoint's.
            expect_aux_layer_ids: layer outputs that the draft was, or is to be, trained on.
            draft_vocab_size: D, for the bytes per token; None is that of the draft vocab set, or
                else 32000.
            supervised_share: assumed share of the tokens that are supervised, in (0, 1].
            time_limit_s: seconds after which what has not answered has failed.

        Returns:
            A report, whatever failed: see `has_passed`, or print it.

        Raises:
            InvalidRequest: an argument that cannot work, with what would.
        """
        self._dispatcher.check_usable()
        if draft_vocab_size is None and self._draft_vocab is not None:
            draft_vocab_size = self._draft_vocab.draft_vocab_size
        return run_preflight(
            self._settings,
            tokenizer=tokenizer,
            expect_aux_layer_ids=expect_aux_layer_ids,
            draft_vocab_size=draft_vocab_size,
            supervised_share=supervised_share,
            time_limit_s=time_limit_s,
            transport=self._transport,
        )

    def self_check(self) -> tuple[SelfCheck, ...] | None:
        """Have a server check anew what it proved of its target when it loaded it.

        Between other clients' requests; of several servers, one does. Seconds on a CPU.

        Returns:
            The checks, each passed, failed or not applicable; None of a server too old for it.

        Raises:
            RemoteEagle3Error: as `generate_batch`; another self-check under way is waited for.
        """
        self._dispatcher.check_usable()
        self._dispatcher.model_info()
        return self._dispatcher.self_check()

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Block until every server's target is loaded, at most `timeout` seconds (`retry_for_s`).

        Raises:
            RemoteEagle3Error: not ready in time, with the last reason; or waiting does not help.
        """
        self._dispatcher.wait_until_ready(
            self._settings.retry_for_s if timeout is None else timeout
        )

    def get_input_embeddings(self) -> TargetEmbeddings:
        """Return the target's input embeddings, downloaded once and kept on the device.

        With a `cache_dir`, at most one process at a time downloads them, and the others read its
        file. On a terminal, a download of more than 64 MiB shows its progress.
        """
        self._dispatcher.check_usable()
        with self._lock:
            if self._embeddings is None:
                weight = self._dispatcher.input_embeddings()
                self._embeddings = TargetEmbeddings(weight.to(self._settings.device))
            return self._embeddings

    def draft_config(self) -> dict[str, Any]:
        """Return what must travel with a draft trained here, JSON-able, for its checkpoint.

        Who goes on with that draft gives it to a backend as `expect_draft_config`.

        Returns:
            `eagle_aux_hidden_state_layer_ids`: the `aux_layer_ids` as vLLM and speculators name
            them (layer inputs, ours + 1); `draft_vocab_size`; `draft_vocab_digest` of the ordered
            ids; `target_hidden_size`; `target_model_id`, `target_revision` (None if unknown) and
            `target_fingerprint`.

        Raises:
            VocabMappingMissing: call `set_vocab_mapping` first.
            InvalidRequest: the backend's `aux_layer_ids` are not layers of the target.
        """
        self._dispatcher.check_usable()
        vocab = self._vocab()
        return draft_config(self.model_info(), self._settings.aux_layer_ids, vocab)

    def _vocab(self) -> DraftVocab:
        if (vocab := self._draft_vocab) is None:
            raise VocabMappingMissing("no draft vocab is set; call set_vocab_mapping first")
        return vocab
