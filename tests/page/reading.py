"""What a test reads off the page."""

from __future__ import annotations

import re
from typing import Any

from tests.page.conftest import HOSTILE

UNAUTHORIZED = "error: Failed to load resource: the server responded with a status of 401"
TEXT = f"Tea for\ttwo\n{HOSTILE[0]} {HOSTILE[1]}"


def texts(page: Any, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def entries(page: Any, list_id: str) -> dict[str, str]:
    return dict(zip(texts(page, f"#{list_id} dt"), texts(page, f"#{list_id} dd"), strict=True))


def rows(page: Any, table_id: str) -> list[list[str]]:
    lines = page.locator(f"#{table_id} tbody tr").all()
    return [[" ".join(cell.split()) for cell in line.locator("td").all_inner_texts()]
            for line in lines]  # fmt: skip


def is_quiet(page: Any, *expected: str) -> None:
    """No script failed, nothing was blocked, and nobody else was asked."""
    heard = [line for line in page.heard if not line.startswith((UNAUTHORIZED, *expected))]
    assert heard == []
    assert page.evaluate("window.violations") == []
    assert page.evaluate("window.ran") is None
    origin = re.match(r"http://[^/]+/", page.url)
    assert origin is not None
    assert all(request.url.startswith(origin[0]) for request in page.asked)


def milliseconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"ms": 1, "s": 1000}[unit]
