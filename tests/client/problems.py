"""An error document, as a server answers with."""

from __future__ import annotations


def problem(code: str) -> dict[str, object]:
    return {"code": code, "detail": "the server's words", "request_id": "id-9", "status": 1}
