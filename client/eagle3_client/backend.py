"""`RemoteEagle3Backend`: tensors in, `Eagle3TargetBatch` out; chooses a server, retries."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Literal

import httpx
import torch

from eagle3_client.config import (
    DEFAULT_RETRY_FOR_S,
    DEFAULT_TIMEOUT_S,
    ClientSettings,
    check_device,
    split_urls,
)
from eagle3_client.device import hand_over
from eagle3_client.dispatch import Dispatcher
from eagle3_client.pace import choose_depth
from eagle3_client.prefetch import Batch, Prefetch
from eagle3_client.results import RemoteBatchHandle, TargetEmbeddings
from eagle3_client.submission import Submission
from eagle3_schemas import DraftVocab, Eagle3TargetBackend, Eagle3TargetBatch, ModelInfo
from eagle3_schemas.errors import InvalidRequest, VocabMappingMissing
from eagle3_schemas.exchange import check_is_dense, refuse_packing
from eagle3_schemas.messages import AuxDtype, Rows


class RemoteEagle3Backend(Eagle3TargetBackend):
    """A remote target that a trainer uses as if it were local. Thread-safe; a context manager.

    Nothing is sent before the first call. Call `set_vocab_mapping` before the first batch. Failures
    that pass (a server that restarts, a full queue, a broken connection) are repeated for
    `retry_for_s` seconds; batches are never skipped, resampled or reordered.

    Args:
        urls: one URL (`http://`, `https://`, `unix:///path`), a comma-separated list, or a
            sequence: servers of the same target.
        device: where batches are delivered.
        token: bearer token, if the servers ask for one.
        aux_layer_ids: three layers to capture (layer outputs); None takes the server's default.
        encoding: how supervision rows travel: `probs`, `logits`, `hidden`; `auto` chooses.
        aux_dtype: `float8_e4m3` sends aux states in fp8 (lossy); `model` as they are.
        exact: bit-for-bit equality with a co-located target of equal shapes, threads and builds.
        output_dtype: cast of `aux_hidden_states` after transfer, for a draft of another dtype.
        rows: rows of `target_probs` sent: `position_mask`, `loss_mask` (P-EAGLE) or `all`.
        timeout_s: seconds without a byte before an attempt is given up and repeated.
        retry_for_s: seconds after which a request that keeps failing raises.
        max_retries: also a limit on the number of repeats; None for none.
        max_in_flight: requests sent at once; None is two a server, more for a deeper `prefetch`.
        transport: httpx transport to use instead, such as `httpx.HTTPTransport(proxy=…)`.

    Raises:
        InvalidRequest: an argument that cannot work, with what would.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        device: str | torch.device = "cpu",
        token: str | None = None,
        aux_layer_ids: Sequence[int] | None = None,
        encoding: str = "auto",
        aux_dtype: AuxDtype = "model",
        exact: bool = False,
        output_dtype: torch.dtype | None = None,
        rows: Rows = "position_mask",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry_for_s: float = DEFAULT_RETRY_FOR_S,
        max_retries: int | None = None,
        max_in_flight: int | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._settings = ClientSettings(
            urls=split_urls(urls),
            device=torch.device(device),
            token=token,
            aux_layer_ids=None if aux_layer_ids is None else tuple(aux_layer_ids),
            encoding=encoding,
            aux_dtype=aux_dtype,
            rows=rows,
            exact=exact,
            output_dtype=output_dtype,
            timeout_s=timeout_s,
            retry_for_s=retry_for_s,
            max_retries=max_retries,
            max_in_flight=max_in_flight,
        )
        check_device(self._settings.device)
        self._dispatcher = Dispatcher(self._settings, transport)
        self._lock = threading.Lock()
        self._draft_vocab: DraftVocab | None = None
        self._embeddings: TargetEmbeddings | None = None

    @classmethod
    def from_urls(
        cls,
        urls: str | Sequence[str],
        *,
        device: str | torch.device = "cpu",
        timeout: float = DEFAULT_TIMEOUT_S,
        max_retries: int | None = None,
        **kwargs: object,
    ) -> RemoteEagle3Backend:
        """Build a backend with the names of NeMo AutoModel's client.

        Args:
            urls: as in the constructor, like the others that are not listed here.
            device: as in the constructor.
            timeout: the constructor's `timeout_s`.
            max_retries: None leaves it to `retry_for_s`.
            kwargs: any other argument of the constructor.
        """
        return cls(urls, device=device, timeout_s=timeout, max_retries=max_retries, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def from_env(cls, **kwargs: object) -> RemoteEagle3Backend:
        """Build a backend from EAGLE3_URLS (comma-separated) and EAGLE3_TOKEN; the rest by name.

        Raises:
            InvalidRequest: EAGLE3_URLS is not set.
        """
        urls = os.environ.get("EAGLE3_URLS", "")
        if not urls:
            raise InvalidRequest("EAGLE3_URLS is not set; set it to http://host:port[,…]")
        return cls(urls, token=os.environ.get("EAGLE3_TOKEN") or None, **kwargs)  # type: ignore[arg-type]

    def __enter__(self) -> RemoteEagle3Backend:
        """Return the backend itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the backend."""
        self.close()

    @property
    def supports_async(self) -> bool:
        """True: `generate_batch_async` overlaps the target with training."""
        return True

    @property
    def num_remote_servers(self) -> int:
        """How many requests are accepted in flight; NeMo's recipe caps its prefetch at this."""
        return self._settings.in_flight

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

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Block until every server's target is loaded, at most `timeout` seconds (`retry_for_s`).

        Raises:
            RemoteEagle3Error: not ready in time, with the last reason; or waiting does not help.
        """
        self._dispatcher.wait_until_ready(
            self._settings.retry_for_s if timeout is None else timeout
        )

    def get_input_embeddings(self) -> TargetEmbeddings:
        """Download the target's input embeddings once, and keep them on the device."""
        self._dispatcher.check_usable()
        with self._lock:
            if self._embeddings is None:
                weight = self._dispatcher.input_embeddings()
                self._embeddings = TargetEmbeddings(weight.to(self._settings.device))
            return self._embeddings

    def set_vocab_mapping(
        self, selected_token_ids: torch.Tensor, selected_token_mask: torch.Tensor
    ) -> None:
        """Register a draft vocab on every server and use it for the batches requested from now on.

        Requests already submitted keep theirs. Safe to repeat; on an error the former one stays.

        Args:
            selected_token_ids: [D] distinct ids in any order, which is kept; on any device.
            selected_token_mask: [V], true for exactly those ids; on any device.

        Raises:
            InvalidRequest: repeated ids, ids outside [0, V), or a mask that marks another set.
        """
        self._dispatcher.check_usable()
        check_is_dense("selected_token_ids", selected_token_ids)
        check_is_dense("selected_token_mask", selected_token_mask)
        vocab = DraftVocab.from_ids(selected_token_ids, selected_token_mask)
        self._dispatcher.register(vocab, selected_token_mask.numel())
        self._draft_vocab = vocab

    def generate_batch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Eagle3TargetBatch:
        """Get one batch's supervision from a server; blocks. Arguments as in the interface.

        Returns:
            `aux_hidden_states` [B, T, 3H] (model dtype or `output_dtype`; zeros where not
            attended), `target_probs` [B, T, D] float32 (zeros in rows not sent), `position_mask`
            [B, T, 1] bool, and the shifted inputs in the caller's dtypes, all on `device`.

        Raises:
            InvalidRequest, LimitExceeded: the batch must change; the message says how.
            VocabMappingMissing: call `set_vocab_mapping` first.
            TargetFailed: the forward failed; the server's log has the reason.
            FingerprintMismatch: a server came back with another target.
            TransportError, NotReady, QueueFull: it kept failing for `retry_for_s`.
        """
        submission = self._submission(
            input_ids, attention_mask, loss_mask, position_ids, seq_lens, doc_remaining
        )
        return hand_over(self._dispatcher.deliver(submission))

    def generate_batch_async(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> RemoteBatchHandle:
        """Start `generate_batch` and return a handle; arguments are copied before it returns.

        A request beyond `num_remote_servers`, or a prefetch's depth, waits. Bad arguments raise
        here, the rest later.
        """
        submission = self._submission(
            input_ids, attention_mask, loss_mask, position_ids, seq_lens, doc_remaining
        )
        return self._dispatcher.submit(submission)

    def prefetch(
        self, batches: Iterable[Batch], depth: int | Literal["auto"] = 2
    ) -> Prefetch[Batch]:
        """Iterate over `(batch, its supervision)` in order, with `depth` requests in flight.

        Several prefetches, and other requests, may run at once; they share the worker threads. Each
        batch is bound to the draft vocab set when it was submitted, up to `depth` batches early.

        Args:
            batches: an iterable of dicts with the names of `generate_batch`'s arguments, or of
                tuples in their order, such as a DataLoader. Other keys stay in the batch unread.
            depth: requests in flight, also more than `num_remote_servers`; each costs the memory of
                one batch. "auto" grows from 1 while the trainer waits and growing helps, at most
                to `max_in_flight`, or else 8 a server (`eagle3_client.pace.Depth` has the rule).

        Returns:
            An iterator, best used in a `with` block; `stats` says what the trainer waited for.

        Raises:
            InvalidRequest: `depth` is neither, or above `max_in_flight`; `batches` not iterable.
        """
        self._dispatcher.check_usable()
        chosen = choose_depth(depth, len(self._settings.urls), self._settings.max_in_flight)
        allow = self._dispatcher.allow_in_flight
        return Prefetch(self.generate_batch_async, batches, chosen, allow_in_flight=allow)

    def close(self) -> None:
        """End all requests and close the sockets; safe to repeat, affects no other client."""
        self._dispatcher.close()

    def _submission(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        *packing: torch.Tensor | None,
    ) -> Submission:
        """Check and encode a batch on the caller's thread, bound to the mapping current now."""
        self._dispatcher.check_usable()
        refuse_packing(*packing)
        if (vocab := self._draft_vocab) is None:
            raise VocabMappingMissing("no draft vocab is set; call set_vocab_mapping first")
        return Submission.build(
            self._settings, self.model_info(), vocab, input_ids, attention_mask, loss_mask
        )
