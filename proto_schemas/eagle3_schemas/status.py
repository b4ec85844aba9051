"""What `GET /v1/status` answers, for people and their page."""

from __future__ import annotations

from typing import Literal

from eagle3_schemas.messages import Count, Description, DraftVocabInfo


class ClientStatus(Description):
    """A trainer that was served."""

    client: str
    requests: Count
    seconds_ago: float
    """Since its last answer."""
    draft_vocab_digest: str | None


class RecentError(Description):
    """A request that was refused or failed."""

    code: str
    detail: str
    request_id: str
    client: str
    seconds_ago: float


class StageStatus(Description):
    """How long the last requests (256 at most) spent in a stage."""

    requests: Count
    median_s: float
    p90_s: float
    longest_s: float


class ServerStatus(Description):
    """What the server does now (`GET /v1/status`)."""

    state: str
    """`ready`, or why it is not."""
    phase: Literal["loading", "ready", "stopping", "broken"]
    """The same as one word."""
    model_id: str | None
    """What is served; None while it loads. `GET /v1/model` says more."""
    uptime_s: float
    bound_by: Literal["model", "network", "trainers"]
    """What the server waited for most in the last minute: the model (add servers, or send
    less padding), the network (another encoding, a faster link), or the trainers (all is well)."""
    bound_by_shares: dict[str, float]
    queued_requests: Count
    max_queued_requests: Count
    tokens_in_flight: Count
    max_tokens_in_flight: Count
    bytes_in_flight: Count
    max_bytes_in_flight: Count
    tokens: dict[str, int]
    """Positions of the requests answered since the start, by kind: `sent` (padding included),
    `real`, `supervised`, `trained`. Two statuses give a rate: their difference by that of
    `uptime_s`."""
    body_bytes: dict[str, int]
    """`received` and `sent` since the start."""
    stages: dict[str, StageStatus]
    """By stage: `queue`, `compute`, `head`, `copy`, `send`; those that a request has passed."""
    draft_vocabs: tuple[DraftVocabInfo, ...]
    """Registered, the last used first."""
    padding_share: float | None
    """Share of the positions sent since the start that were padding; None before the first."""
    draft_vocab_coverage: float | None
    """Share of the supervised positions whose target argmax was in the draft vocab."""
    clients: tuple[ClientStatus, ...]
    errors: tuple[RecentError, ...]
