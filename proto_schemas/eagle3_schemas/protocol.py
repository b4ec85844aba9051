"""Protocol constants both sides share: version, media types, paths, header names, hard limits."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Version of the frame and of its messages. Sides with different versions refuse each other."""

FRAME_MEDIA_TYPE: Final = "application/vnd.eagle3-remote.frame"
PROBLEM_MEDIA_TYPE: Final = "application/problem+json"
JSON_MEDIA_TYPE: Final = "application/json"

HEALTH_PATH: Final = "/healthz"
READY_PATH: Final = "/readyz"
PROBE_PATHS: Final = (HEALTH_PATH, READY_PATH)
"""Asked for every few seconds, without a token."""
PAGE_PATH: Final = "/"
OPEN_PATHS: Final = (*PROBE_PATHS, PAGE_PATH)
"""What answers without a token; none of it tells of the target."""
MODEL_PATH: Final = "/v1/model"
DRAFT_VOCAB_PATH: Final = "/v1/draft-vocabs/{digest}"
DRAFT_HEAD_PATH: Final = "/v1/draft-vocabs/{digest}/head"
EMBEDDINGS_PATH: Final = "/v1/input-embeddings"
TARGET_HEAD_PATH: Final = "/v1/head"
SUPERVISION_PATH: Final = "/v1/supervision"
CAPTURE_PATH: Final = "/v1/capture"
BATCH_PATHS: Final = (SUPERVISION_PATH, CAPTURE_PATH)
"""Where batches are computed."""
INSPECT_PATH: Final = "/v1/inspect"
SELF_CHECK_PATH: Final = "/v1/self-check"

STATUS_PATH: Final = "/v1/status"
METRICS_PATH: Final = "/metrics"

REQUEST_ID_HEADER: Final = "x-request-id"
CLIENT_ID_HEADER: Final = "x-eagle3-client"
"""Names the trainer process, so that clients can take turns; same pattern as a request id."""
DEADLINE_HEADER: Final = "x-eagle3-deadline-ms"
"""Milliseconds, from the server's reading of the header, after which nobody wants the answer."""

INSTANCE_HEADER: Final = "x-eagle3-instance"
"""Names the server process in each of its answers, so that a client can tell that it restarted."""

SERVER_TIMING_HEADER: Final = "server-timing"
"""Milliseconds the server spent on a supervision request before its answer began, by stage and in
`total` since the request's head came; in the form of W3C Server Timing."""

REQUEST_ID_PATTERN: Final = r"^[A-Za-z0-9._-]{1,64}$"
"""What a request id may look like: safe in a log line and in a header."""
