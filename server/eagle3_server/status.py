"""What `GET /v1/status` and the gauges of `GET /metrics` say of a service."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Literal

from eagle3_schemas.messages import DraftVocabInfo
from eagle3_schemas.status import ServerStatus
from eagle3_server.config import ServerSettings
from eagle3_server.device_errors import allocated_bytes

if TYPE_CHECKING:
    from eagle3_server.service import Service

Phase = Literal["loading", "ready", "stopping", "broken"]


def export_gauges(service: Service) -> None:
    """Have the metrics say what the service holds at the time they are asked for."""

    def device_memory() -> float:
        return 0 if service.target is None else allocated_bytes(service.target)

    for name, text, value in (
        ("eagle3_ready", "1 if requests are served, else 0", lambda: service.is_ready),
        ("eagle3_queued_requests", "Requests that wait", lambda: service.queued_requests),
        ("eagle3_tokens_in_flight", "Tokens held", lambda: service.tokens.in_flight),
        ("eagle3_bytes_in_flight", "Host memory held", lambda: service.bytes.in_flight),
        ("eagle3_draft_vocabs", "Registered draft vocabs", lambda: len(service.draft_vocabs)),
        ("eagle3_device_memory_bytes", "Allocated there; 0 on the CPU", device_memory),
    ):
        service.telemetry.gauge(name, text, value)


def server_status(
    service: Service, settings: ServerSettings, *, state: str, phase: Phase
) -> ServerStatus:
    """Return what the server does now. Called on the event loop."""
    telemetry, target = service.telemetry, service.target
    shares = telemetry.bound_by.shares()
    padding, coverage = (None if math.isnan(x) else x for x in telemetry.shares())
    return ServerStatus(
        state=state,
        phase=phase,
        model_id=None if target is None else target.describe().model_id,
        uptime_s=time.monotonic() - telemetry.started,
        bound_by=max(shares, key=shares.__getitem__),
        bound_by_shares={name: share for name, share in shares.items()},
        queued_requests=service.queued_requests,
        max_queued_requests=settings.max_queued_requests,
        tokens_in_flight=service.tokens.in_flight,
        max_tokens_in_flight=settings.max_tokens_in_flight,
        bytes_in_flight=service.bytes.in_flight,
        max_bytes_in_flight=settings.max_bytes_in_flight,
        tokens=dict(telemetry.tokens),
        body_bytes=dict(telemetry.body_bytes),
        stages=telemetry.stages(),
        draft_vocabs=tuple(
            DraftVocabInfo(digest=vocab.digest, draft_vocab_size=vocab.draft_vocab_size)
            for vocab in service.draft_vocabs.known()
        ),
        padding_share=padding,
        draft_vocab_coverage=coverage,
        clients=telemetry.clients(),
        errors=telemetry.errors(),
    )
