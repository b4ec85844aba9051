"""`RequestRecord`: what is known of one request from its arrival to its last byte."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import torch
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from eagle3_schemas.protocol import (
    BATCH_PATHS,
    CLIENT_ID_HEADER,
    DEADLINE_HEADER,
    REQUEST_ID_HEADER,
    REQUEST_ID_PATTERN,
)
from eagle3_schemas.tensors import byte_view
from eagle3_server.engine import Job


@dataclass(frozen=True)
class TokenCounts:
    """Positions of one supervision request."""

    sent: int  # B * T, padding included
    real: int  # attention_mask
    supervised: int  # shifted loss_mask
    trained: int  # position_mask: supervised, and the target's argmax is in the draft vocab

    @classmethod
    def of(cls, job: Job, position_mask: torch.Tensor | None) -> TokenCounts:
        """Count a job's positions; `position_mask` as bits, uint8, on the CPU.

        Without one nothing is known of the draft vocab's coverage, so none count as supervised.
        """
        supervised = trained = 0
        if position_mask is not None:
            supervised = int(job.loss_mask[:, 1:].sum())
            trained = int.from_bytes(byte_view(position_mask), "little").bit_count()
        real = int(job.attention_mask.sum())
        return cls(job.input_ids.numel(), real, supervised, trained)


@dataclass
class RequestRecord:
    """One request, as the log, the metrics and the stages see it. Lives on the event loop."""

    request_id: str
    client: str
    """Whose turn it takes in the queue."""
    deadline: float | None
    """`time.monotonic()` after which nobody wants the answer."""
    arrived: float = field(default_factory=time.monotonic)
    code: str = "ok"
    detail: str = ""
    """Words of the error it was answered with."""
    bytes_received: int = 0
    body_bytes: int = 0
    """Announced for its body, and reserved."""
    bytes_sent: int = 0
    is_service: bool = False
    """Whether it asks for the target's work, rather than about the server."""
    draft_vocab_digest: str | None = None
    tokens: TokenCounts | None = None
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage."""
    held: ExitStack = field(default_factory=ExitStack)
    """What is given back when the answer is gone."""

    @classmethod
    def arriving(cls, scope: Scope) -> RequestRecord:
        """Begin the record of a request whose head has been read, and attach it.

        An id that is not safe to log is replaced.
        """
        headers = Headers(scope=scope)
        request_id = headers.get(REQUEST_ID_HEADER, "")
        if not re.match(REQUEST_ID_PATTERN, request_id):
            request_id = uuid.uuid4().hex
        client = headers.get(CLIENT_ID_HEADER, "")
        if not re.match(REQUEST_ID_PATTERN, client):
            client = scope["client"][0] if scope.get("client") else "unix"
        record = cls(request_id, client, None, is_service=scope["path"] in BATCH_PATHS)
        remaining = headers.get(DEADLINE_HEADER, "")
        if remaining.isascii() and remaining.isdigit() and len(remaining) < 16:
            # Milliseconds left rather than a time of day: the two hosts' clocks need not agree.
            record.deadline = record.arrived + int(remaining) / 1000
        scope.setdefault("state", {})["record"] = record
        return record

    def spent(self, stage: str, seconds: float) -> None:
        """Add to a stage's time."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def server_timing(self) -> str:
        """Return the time up to now as a `server-timing` header: the stages', and the total."""
        stages = self.stages | {"total": time.monotonic() - self.arrived}
        return ", ".join(f"{name};dur={1000 * spent:.3f}" for name, spent in stages.items())

    def summary(self, path: str, status: int) -> dict[str, object]:
        """Return what the log says of the request."""
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "client": self.client,
            "path": path,
            "status": status,
            "code": self.code,
            "bytes_received": self.bytes_received,
            "bytes_sent": self.bytes_sent,
        }
        if self.tokens is not None:
            fields |= {f"tokens_{kind}": count for kind, count in asdict(self.tokens).items()}
        fields |= {f"{stage}_ms": round(1000 * spent, 1) for stage, spent in self.stages.items()}
        if self.detail:
            fields["detail"] = self.detail
        fields["total_ms"] = round(1000 * (time.monotonic() - self.arrived), 1)
        return fields


def record_of(request: Request) -> RequestRecord:
    """Return the record that belongs to a request."""
    record: RequestRecord = request.state.record
    return record
