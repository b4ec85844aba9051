"""Protocol constants both sides share: version, media types, paths, header names, hard limits."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Version of the frame and of its messages. Sides with different versions refuse each other."""

FRAME_MEDIA_TYPE: Final = "application/vnd.eagle3-remote.frame"
PROBLEM_MEDIA_TYPE: Final = "application/problem+json"

HEALTH_PATH: Final = "/healthz"
READY_PATH: Final = "/readyz"
MODEL_PATH: Final = "/v1/model"
DRAFT_VOCAB_PATH: Final = "/v1/draft-vocabs/{digest}"
DRAFT_HEAD_PATH: Final = "/v1/draft-vocabs/{digest}/head"
EMBEDDINGS_PATH: Final = "/v1/input-embeddings"
SUPERVISION_PATH: Final = "/v1/supervision"

REQUEST_ID_HEADER: Final = "x-request-id"

MAX_REQUEST_ID_LENGTH: Final = 64
REQUEST_ID_PATTERN: Final = r"^[A-Za-z0-9._-]{1,64}$"
"""What a request id may look like: safe in a log line and in a header."""
