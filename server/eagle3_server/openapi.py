"""What FastAPI cannot know of our routes: frames as bodies, errors as problems, and the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fastapi import Security
from fastapi.params import Depends
from fastapi.security import HTTPBearer

from eagle3_schemas.inspection import InspectRequest
from eagle3_schemas.messages import Problem
from eagle3_schemas.protocol import FRAME_MEDIA_TYPE, JSON_MEDIA_TYPE, PROBLEM_MEDIA_TYPE

_FRAME: Final[dict[str, Any]] = {
    FRAME_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}
}

TAKES_FRAME: Final[dict[str, Any]] = {"requestBody": {"required": True, "content": _FRAME}}
"""`openapi_extra` of a route that reads a frame."""

TAKES_TEXT: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {JSON_MEDIA_TYPE: {"schema": InspectRequest.model_json_schema()}},
    }
}
"""Likewise of the one that reads JSON, which it parses itself, within a limit."""

GIVES_FRAME: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "A frame", "content": _FRAME}
}
"""`responses` of a route that answers with one."""

PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "An error, with its code and remedy",
        "content": {PROBLEM_MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
    }
}
"""`responses` of every route."""


def needs_token(tokens: Sequence[str]) -> list[Depends]:
    """Return the `dependencies` of a route that asks for a bearer token, if any are set.

    They describe only; `TokenGuard` refuses, before anything of a request is read.
    """
    scheme = HTTPBearer(
        scheme_name="bearer", description="One of the server's tokens.", auto_error=False
    )
    return [Security(scheme)] if tokens else []
