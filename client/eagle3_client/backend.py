"""`RemoteEagle3Backend`: tensors in, `Eagle3TargetBatch` out; chooses a server, retries."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import httpx
import torch

from eagle3_client.capturing import CaptureCalls
from eagle3_client.config import (
    DEFAULT_RETRY_FOR_S,
    DEFAULT_TIMEOUT_S,
    ClientSettings,
    check_device,
    split_urls,
)
from eagle3_client.device import hand_over
from eagle3_client.dispatch import Dispatcher
from eagle3_client.prefetch import Batch, Prefetch
from eagle3_client.results import RemoteBatchHandle
from eagle3_client.submission import Submission
from eagle3_client.target_calls import TargetCalls
from eagle3_schemas import DraftVocab, Eagle3TargetBackend, Eagle3TargetBatch
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.messages import AuxDtype, Rows
from eagle3_schemas.tokens import check_is_dense

_URLS_VARIABLE = "EAGLE3_URLS"


class RemoteEagle3Backend(TargetCalls, CaptureCalls, Eagle3TargetBackend):
    """A remote target that a trainer uses as if it were local. Thread-safe; a context manager.

    Nothing is sent before the first call. Call `set_vocab_mapping` before the first batch. Failures
    that pass (a server that restarts, a full queue, a broken connection) are repeated for
    `retry_for_s` seconds; batches are never skipped, resampled or reordered.

    Args:
        urls: one URL (`http://`, `https://`, `unix:///path`), a comma-separated list, or a
            sequence: servers of the same target.
        device: where batches are delivered.
        token: bearer token, if the servers ask for one.
        aux_layer_ids: three layers to capture (layer outputs), any number if only `capture` is
            called; None takes the server's default.
        encoding: how supervision rows travel: `probs`, `logits`, `hidden`; `auto` chooses.
        aux_dtype: `float8_e4m3` sends aux states in fp8 (lossy); `model` as they are.
        exact: bit-for-bit equality with a co-located target of equal shapes, threads and builds.
        output_dtype: cast of `aux_hidden_states` after transfer, for a draft of another dtype.
        rows: rows of `target_probs` sent: `position_mask`, `loss_mask` (P-EAGLE) or `all`.
        timeout_s: seconds without a byte before an attempt is given up and repeated.
        retry_for_s: seconds after which a request that keeps failing raises.
        max_retries: also a limit on the number of repeats; None for none.
        expect_fingerprint: the only target accepted, as `fingerprint` gave it when a run began.
        expect_draft_config: what `draft_config()` returned when it began, of the draft that it goes
            on with; implies `expect_fingerprint` and `aux_layer_ids`, and the draft vocab's digest.
        max_in_flight: requests sent at once; None is two a server, more for a deeper `prefetch`.
        cache_dir: folder that keeps the downloaded embeddings and draft heads by the target's
            fingerprint, for trainers of many ranks on a host, which then download them once, or
            that start often; only you should be able to write there. None keeps nothing.
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
        expect_fingerprint: str | None = None,
        expect_draft_config: Mapping[str, Any] | None = None,
        max_in_flight: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
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
            expect_fingerprint=expect_fingerprint,
            expect_draft_config=expect_draft_config,
            max_in_flight=max_in_flight,
            cache_dir=cache_dir,
        )
        check_device(self._settings.device)
        self._transport = transport
        self._dispatcher = Dispatcher(self._settings, transport)
        self._lock = threading.Lock()
        self._draft_vocab: DraftVocab | None = None

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
        """Build a backend with the names of NeMo AutoModel's client; see docs/integrations.md.

        The token is EAGLE3_TOKEN's unless one is given.

        Args:
            urls: as in the constructor; "EAGLE3_URLS" or ["EAGLE3_URLS"], which a recipe's YAML
                can say, takes them from that variable.
            device: as in the constructor.
            timeout: the constructor's `timeout_s`.
            max_retries: None leaves it to `retry_for_s`.
            kwargs: any other argument of the constructor.

        Raises:
            InvalidRequest: EAGLE3_URLS is asked for and not set; or as the constructor.
        """
        named: dict[str, Any] = {"device": device, "timeout_s": timeout, "max_retries": max_retries}
        if urls == _URLS_VARIABLE or list(urls) == [_URLS_VARIABLE]:
            return cls.from_env(**named, **kwargs)
        kwargs.setdefault("token", os.environ.get("EAGLE3_TOKEN") or None)
        return cls(urls, **named, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def from_env(cls, **kwargs: object) -> RemoteEagle3Backend:
        """Build a backend from EAGLE3_URLS (comma-separated) and EAGLE3_TOKEN; the rest by name.

        Args:
            kwargs: any other argument of the constructor.

        Raises:
            InvalidRequest: EAGLE3_URLS is not set.
        """
        urls = os.environ.get(_URLS_VARIABLE, "")
        if not urls:
            raise InvalidRequest(f"{_URLS_VARIABLE} is not set; set it to http://host:port[,…]")
        kwargs.setdefault("token", os.environ.get("EAGLE3_TOKEN") or None)
        return cls(urls, **kwargs)  # type: ignore[arg-type]

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
        return self._dispatcher.in_flight

    def set_vocab_mapping(
        self, selected_token_ids: torch.Tensor, selected_token_mask: torch.Tensor
    ) -> None:
        """Register a draft vocab on every server and use it for the batches requested from now on.

        Requests already submitted keep theirs. Safe to repeat; on an error the former one stays.

        Args:
            selected_token_ids: [D] distinct ids in any order, which is kept; on any device.
            selected_token_mask: [V], true for exactly those ids; on any device.

        Raises:
            InvalidRequest: repeated ids, ids outside [0, V), a mask that marks another set, or
                another draft vocab than that of `expect_draft_config`.
        """
        self._dispatcher.check_usable()
        check_is_dense("selected_token_ids", selected_token_ids)
        check_is_dense("selected_token_mask", selected_token_mask)
        vocab = DraftVocab.from_ids(selected_token_ids, selected_token_mask)
        if (draft := self._settings.expected_draft) is not None:
            draft.check_vocab(vocab)
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
    ) -> RemoteBatchHandle[Eagle3TargetBatch]:
        """Start `generate_batch` and return a handle; arguments are copied before it returns.

        Arguments as `generate_batch` has them. A request beyond `num_remote_servers`, or a
        prefetch's depth, waits. Bad arguments raise here, the rest later.
        """
        submission = self._submission(
            input_ids, attention_mask, loss_mask, position_ids, seq_lens, doc_remaining
        )
        return self._dispatcher.submit(submission)

    def prefetch(
        self, batches: Iterable[Batch], depth: int | Literal["auto"] = 2
    ) -> Prefetch[Batch, Eagle3TargetBatch]:
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
        return self._dispatcher.prefetch(self.generate_batch_async, batches, depth)

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
        vocab = self._vocab()
        return Submission.build(
            self._settings, self.model_info(), vocab,
            input_ids, attention_mask, loss_mask, *packing,
        )  # fmt: skip
