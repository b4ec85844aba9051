"""`Service`: the state behind the routes: the target, its pipeline, the draft vocabs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from importlib.metadata import version

import torch
from starlette.requests import Request

from eagle3_schemas import AUX_LAYER_CONVENTION, ModelInfo
from eagle3_schemas.errors import NotReady
from eagle3_schemas.messages import Limits
from eagle3_server.asgi import request_id_of
from eagle3_server.config import ServerSettings
from eagle3_server.copying import HostCopier
from eagle3_server.engine import DeviceTensors, HostTensors, Target
from eagle3_server.stage import StageThread
from eagle3_server.vocab import DraftVocabRegistry

_UNCOPIED_RESULTS = 2  # one being copied and one just computed: bounds the device memory they take

logger = logging.getLogger(__name__)


class Service:
    """Owns one target from loading to closing, and the stages behind it. Thread-safe.

    A request passes the compute thread, which alone owns the target, then the copy thread; the
    event loop sends. Each works on the next request while the following one works on this.

    Args:
        target: a loaded target, or a function that loads one on the compute thread.
        settings: limits.
    """

    def __init__(self, target: Target | Callable[[], Target], settings: ServerSettings) -> None:
        self._settings = settings
        self._compute = StageThread("compute", settings.max_queued_requests)
        self._copy = StageThread("copy", _UNCOPIED_RESULTS)
        self._uncopied = threading.BoundedSemaphore(_UNCOPIED_RESULTS)
        self._copier: HostCopier | None = None
        self._load: Callable[[], Target] | None = None
        self._target: Target | None = None
        if callable(target):
            self._load = target
        else:
            self._target = target
        self._not_ready_reason = "the target is loading; repeat later"
        self.draft_vocabs = DraftVocabRegistry(settings.max_draft_vocabs)

    def start(self, on_load_failure: Callable[[BaseException], None] | None = None) -> None:
        """Begin loading on the compute thread, if there is anything to load; returns at once."""
        load = self._load
        if load is None:
            return

        def run() -> None:
            try:
                self._target = load()
            except BaseException as exc:
                self._not_ready_reason = "the target failed to load; the server's log says why"
                logger.error("loading failed: %s", exc)
                if on_load_failure is None:
                    raise
                on_load_failure(exc)

        self._compute.submit(run)

    def close(self) -> None:
        """Finish what is queued, refuse the rest; safe to repeat. Does not wait for loading."""
        self._not_ready_reason = "the server is stopping"
        self._compute.close(wait=self._target is not None)
        self._copy.close(wait=self._target is not None)

    def loaded(self) -> Target:
        """Return the target.

        Raises:
            NotReady: it is loading, failed to load, or the server is stopping.
        """
        if self._target is None:
            raise NotReady(self._not_ready_reason, retry_after_s=1.0)
        return self._target

    async def compute(self, work: Callable[[], DeviceTensors], request: Request) -> HostTensors:
        """Run work on the compute thread and its result through the copy thread.

        The event loop stays free, and the next work starts while this result is copied.

        Raises:
            QueueFull: too many requests wait.
            RemoteEagle3Error: what the work raised.
        """
        request_id = request_id_of(request)
        computed = self._compute.submit(lambda: self._compute_one(work, request_id), request_id)
        copied: Future[HostTensors] = await asyncio.wrap_future(computed)
        return await asyncio.wrap_future(copied)

    def _compute_one(
        self, work: Callable[[], DeviceTensors], request_id: str
    ) -> Future[HostTensors]:
        """Compute on the calling thread and queue the copy, whose future is returned."""
        self._uncopied.acquire()
        try:
            result = work()
            copied = self._copy.submit(lambda: self._copy_one(result), request_id)
        except BaseException:
            self._uncopied.release()
            raise
        copied.add_done_callback(lambda _: self._uncopied.release())  # also if it is cancelled
        return copied

    def _copy_one(self, result: DeviceTensors) -> HostTensors:
        """Copy on the calling thread."""
        if self._copier is None:
            self._copier = HostCopier(torch.device(self.loaded().describe().device))
        return self._copier.to_host(result)

    def limits(self) -> Limits:
        """Return what one request may hold."""
        return Limits(
            max_tokens_per_request=self._settings.max_tokens_per_request,
            max_sequence_length=self.loaded().describe().max_sequence_length,
            max_body_bytes=self._settings.max_body_bytes,
        )

    def model_info(self) -> ModelInfo:
        """Return what is served."""
        target = self.loaded().describe()
        return ModelInfo(
            server_version=version("eagle3-remote"),
            model_id=target.model_id,
            revision=target.revision,
            architecture=target.architecture,
            fingerprint=target.fingerprint,
            num_hidden_layers=target.num_hidden_layers,
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            input_vocab_size=target.input_vocab_size,
            dtype=target.dtype,
            device=target.device,
            device_name=target.device_name,
            attn_implementation=target.attn_implementation,
            torch_version=torch.__version__,
            num_threads=target.num_threads,
            aux_layer_ids=target.aux_layer_ids,
            aux_layer_convention=AUX_LAYER_CONVENTION,
            head=target.head,
            head_reason=target.head_reason,
            encodings=target.encodings,
            limits=self.limits(),
        )
