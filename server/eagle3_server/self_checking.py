"""`POST /v1/self-check`: what was proved of the target at load, proved anew between requests."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request

from eagle3_schemas.errors import InvalidRequest, QueueFull, TargetFailed
from eagle3_schemas.self_check import SELF_CHECKS, SelfCheck, SelfCheckResponse
from eagle3_server.engine import Target
from eagle3_server.record import RequestRecord, record_of
from eagle3_server.self_check import PROBE_TOKENS
from eagle3_server.service import Service


class SelfChecks:
    """Makes the checks of one server, one request's at a time. Used on the event loop alone.

    Each check is a job of its own in the queue, so that other clients' requests take their turns
    between them. It is nobody's training, and counts for no trainer.

    Args:
        service: whose target is checked.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._is_running = False

    async def answer(self, request: Request) -> SelfCheckResponse:
        """Check the target.

        Raises:
            QueueFull: another request's self-check is under way.
            RemoteEagle3Error: what admission and the queue raise.
        """
        service, record = self._service, record_of(request)
        target = service.loaded()
        tokens = min(PROBE_TOKENS, service.tokens.total)
        record.held.enter_context(service.tokens.reserve(record.client, tokens))
        checks = await service.shared(lambda: self._run(target, record), request)
        return SelfCheckResponse(
            request_id=record.request_id,
            fingerprint=target.describe().fingerprint,
            checks=checks,
        )

    async def _run(self, target: Target, record: RequestRecord) -> tuple[SelfCheck, ...]:
        if self._is_running:
            raise QueueFull(
                "a self-check is under way, and the server makes one at a time; repeat later",
                retry_after_s=1.0,
            )
        self._is_running = True
        try:
            return tuple([await self._one(target, name, record) for name in SELF_CHECKS])
        finally:
            self._is_running = False

    async def _one(self, target: Target, name: str, record: RequestRecord) -> SelfCheck:
        try:
            check = await self._service.on_compute_thread(partial(target.self_check, name), record)
        except (TargetFailed, InvalidRequest) as exc:  # what a forward raises
            return SelfCheck(name=name, status="failed", words=exc.detail)
        if name == "bits_repeat" and check.status == "failed" and not self._claims_to_repeat:
            words = f"{check.words}, as the server found at load: it refuses exact"
            check = check.model_copy(update={"status": "not_applicable", "words": words})
        return check

    @property
    def _claims_to_repeat(self) -> bool:
        return self._service.deterministic is not False
