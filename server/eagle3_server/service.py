"""`Service`: the state behind the routes: the target, its pipeline, the draft vocabs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request

from eagle3_schemas import ModelInfo
from eagle3_schemas.errors import DeadlineExceeded, NotReady, QueueFull
from eagle3_schemas.messages import Limits
from eagle3_schemas.status import ServerStatus
from eagle3_server.budget import Budget
from eagle3_server.computations import PASSED, Computations, Identity
from eagle3_server.config import ServerSettings
from eagle3_server.copying import HostCopier
from eagle3_server.device_errors import attempt
from eagle3_server.engine import DeviceTensors, HostTensors, Target
from eagle3_server.leading import Keeper, LeadingTarget
from eagle3_server.model_info import limits_of, model_info
from eagle3_server.record import RequestRecord, record_of
from eagle3_server.stage import StageThread
from eagle3_server.status import Phase, export_gauges, server_status
from eagle3_server.telemetry import Telemetry
from eagle3_server.vocab import DraftVocabRegistry
from eagle3_server.warm_up import WarmUp, warm_up

_CLOSE_S = 1.0
_UNCOPIED_RESULTS = 2  # one being copied and one just computed: bounds the device memory they take

Result = TypeVar("Result")
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
        # Twice: one client may have half of a stage's places, and here all come from one.
        self._copy = StageThread("copy", 2 * _UNCOPIED_RESULTS)
        self._uncopied = threading.BoundedSemaphore(_UNCOPIED_RESULTS)
        self._copier: HostCopier | None = None
        self._load = target if callable(target) else None
        self._target = None if callable(target) else target
        self._warmed = WarmUp(settings.max_tokens_per_request, deterministic=None)
        self._phase: Phase = "loading"  # until there is a target
        self._not_ready_reason = "the target is loading; repeat later"
        self._on_failure: Callable[[BaseException], None] | None = None
        self._is_admitting = True
        self._computations = Computations()
        self._keeper: Keeper | None = None
        self.telemetry = Telemetry()
        self.instance = uuid.uuid4().hex
        self.tokens = Budget(settings.max_tokens_in_flight, "tokens", "max_tokens_in_flight")
        self.bytes = Budget(settings.max_bytes_in_flight, "bytes", "max_bytes_in_flight")
        self.draft_vocabs = DraftVocabRegistry(settings.max_draft_vocabs)
        export_gauges(self)

    def start(
        self,
        on_failure: Callable[[BaseException], None] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        """Begin to load and warm up on the compute thread, if there is need; returns at once."""
        load, self._on_failure = self._load, on_failure
        if load is None:
            return

        def run() -> None:
            try:
                target = load()
                self._warmed = warm_up(target, self._settings.max_tokens_per_request)
                self._target = target
                if isinstance(target, LeadingTarget):
                    self._keeper = Keeper(target, self._say)
                if on_ready is not None:
                    on_ready()
            except BaseException as exc:
                self._phase = "broken"
                self._not_ready_reason = (
                    "the target failed to load or to warm up; the server's log says why"
                )
                logger.error("loading failed: %s", exc)
                if on_failure is None:
                    raise
                on_failure(exc)

        self._compute.submit(run)

    def drain(self) -> None:
        """Refuse new requests, and be unready; those admitted are finished. Safe to repeat."""
        self._phase = "stopping"
        self._not_ready_reason = "the server is stopping; ask another"
        self._is_admitting = False

    def close(self) -> None:
        """Finish what is queued, refuse the rest; safe to repeat.

        Waits neither for loading nor long for work whose client gave it up: see `is_working`.
        """
        self.drain()
        ends = time.monotonic() + (0.0 if self._target is None else _CLOSE_S)
        for stage in (self._compute, self._copy):
            stage.close(max(ends - time.monotonic(), 0.0))
        if self._keeper is not None and not self._compute.is_alive:
            self._keeper.end()  # after what was queued; this thread alone uses the group now

    def _say(self, work: Callable[[], None]) -> None:
        """Run a leader's word to its group on the compute thread, if that has a place for it."""
        with suppress(NotReady, QueueFull):  # stopping, or at work: then others hear of it anyway
            self._compute.submit(lambda: self._attempt(work, "keep-alive"))

    @property
    def is_working(self) -> bool:
        """Whether a thread of it runs, idle or not; not after a `close` that waited long enough."""
        return self._compute.is_alive or self._copy.is_alive

    def loaded(self) -> Target:
        """Return the target, for a request that is to be admitted.

        Raises:
            NotReady: it is loading, failed to load, broke, or the server is stopping.
        """
        if self._target is None or not self._is_admitting:
            raise NotReady(self._not_ready_reason, retry_after_s=1.0)
        return self._target

    def reserve_bytes(self, request: Request, nbytes: int) -> None:
        """Take host memory for an answer from the budget, until it has been sent.

        Raises:
            LimitExceeded: more than there is in all.
            QueueFull: more than is free now.
        """
        record = record_of(request)
        own = record.body_bytes
        record.held.enter_context(self.bytes.reserve(record.client, nbytes, own=own))

    async def compute(
        self, work: Callable[[], DeviceTensors], request: Request, body: bytes | bytearray = b""
    ) -> HostTensors:
        """Run work on the compute thread and its result through the copy thread.

        The event loop stays free, and the next work starts while this result is copied. A request
        that repeats one under way (same token, id, path and body) shares its result.

        Raises:
            QueueFull: too many requests wait.
            DeadlineExceeded: the request's deadline passed; if it still waited, it is not computed.
            ClientDisconnect: the client went away; likewise.
            RemoteEagle3Error: what the work raised.
        """
        record = record_of(request)
        return await self.shared(lambda: self._run(work, record), request, body)

    async def shared(
        self,
        start: Callable[[], Coroutine[Any, Any, Result]],
        request: Request,
        body: bytes | bytearray = b"",
    ) -> Result:
        """Wait for what `start` begins, or for what a repeated request began; as `compute`."""
        record = record_of(request)
        identity = Identity.of(request, record.request_id, body)
        return await self._computations.result(start, identity, request.receive, record.deadline)

    async def on_compute_thread(self, work: Callable[[], Result], record: RequestRecord) -> Result:
        """Run work that gives no tensors where the target is, when it is its client's turn.

        Raises:
            QueueFull, NotReady, RemoteEagle3Error: as `compute`.
        """

        def compute() -> Result:
            with self.telemetry.bound_by.model():
                return self._attempt(work, record.request_id)

        return await asyncio.wrap_future(
            self._compute.submit(compute, record.request_id, record.client)
        )

    async def _run(self, work: Callable[[], DeviceTensors], record: RequestRecord) -> HostTensors:
        queued = time.monotonic()

        def compute() -> Future[HostTensors]:
            if record.deadline is not None and time.monotonic() >= record.deadline:
                raise DeadlineExceeded(PASSED)
            record.spent("queue", time.monotonic() - queued)
            return self._compute_one(work, record)

        computed = self._compute.submit(compute, record.request_id, record.client)
        copied = await asyncio.wrap_future(computed)
        return await asyncio.wrap_future(copied)

    def _compute_one(
        self, work: Callable[[], DeviceTensors], record: RequestRecord
    ) -> Future[HostTensors]:
        """Compute on the calling thread and queue the copy, whose future is returned."""
        self._uncopied.acquire()
        try:
            started = time.monotonic()
            with self.telemetry.bound_by.model():
                result = self._attempt(work, record.request_id)
            # The checks for finite values wait for the device, so this is its time too.
            record.spent("compute", time.monotonic() - started - result.head_seconds)
            record.spent("head", result.head_seconds)
            copied = self._copy.submit(lambda: self._copy_one(result, record), record.request_id)
        except BaseException:
            self._uncopied.release()
            raise
        copied.add_done_callback(lambda _: self._uncopied.release())  # also if it is cancelled
        return copied

    def _attempt(self, work: Callable[[], Result], request_id: str) -> Result:
        """Run work; once more, with all memory freed, if the device had none left.

        Raises:
            TargetOutOfMemory: there is not enough for this request.
            NotReady: the device failed for good, now or before.
        """
        if (target := self._target) is None:
            raise NotReady(self._not_ready_reason, retry_after_s=1.0)
        return attempt(work, target.describe().device, request_id, self._break)

    def _break(self, exc: Exception) -> NotReady:
        """Be unready for good: after such an error every result of the device would be wrong."""
        logger.critical("the device failed for good", exc_info=exc)
        self._phase = "broken"
        self._not_ready_reason = (
            f"the device failed for good ({type(exc).__name__}), and the server ends; its "
            "supervisor has to start it again"
        )
        self._target = None
        if self._on_failure is not None:
            self._on_failure(exc)
        return NotReady(self._not_ready_reason, retry_after_s=1.0)

    def _copy_one(self, result: DeviceTensors, record: RequestRecord) -> HostTensors:
        """Copy on the calling thread."""
        started = time.monotonic()
        if self._copier is None:
            self._copier = HostCopier(next(iter(result.tensors.values())).device)
        copier = self._copier
        # On a GPU the errors of kernels come up here, where the device is waited for.
        copies = self._attempt(lambda: copier.to_host(result), record.request_id)
        record.spent("copy", time.monotonic() - started)
        return copies

    @property
    def is_ready(self) -> bool:
        """Whether requests are admitted."""
        return self._target is not None and self._is_admitting

    @property
    def target(self) -> Target | None:
        """The target, whether or not requests are admitted; None while there is none."""
        return self._target

    @property
    def queued_requests(self) -> int:
        """Requests that wait for the model."""
        return len(self._compute)

    def status(self) -> ServerStatus:
        """Return what the server does now."""
        state = "ready" if self.is_ready else self._not_ready_reason
        phase: Phase = "ready" if self.is_ready else self._phase
        return server_status(self, self._settings, state=state, phase=phase)

    @property
    def deterministic(self) -> bool | None:
        """Whether the target repeats its bits, as the warm-up found; None if there was none."""
        return self._warmed.deterministic

    def limits(self) -> Limits:
        """Return what one request may hold."""
        most = self._warmed.max_tokens_per_request
        return limits_of(self.loaded().describe(), most, self._settings.max_body_bytes)

    def model_info(self) -> ModelInfo:
        """Return what is served."""
        return model_info(self.loaded().describe(), self.limits(), self.deterministic)
