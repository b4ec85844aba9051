"""`GET /`: the page, one static file that holds no data, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

from starlette.responses import HTMLResponse

# A hash is taken of what the browser reads, in which line ends are `\n` whatever the file has.
_TEXT: Final = (Path(__file__).with_name("page.html")).read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    """Return the CSP source that admits the one inline element of this kind."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _TEXT, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


_HEADERS: Final = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script')}",
            f"style-src {_hash_of('style')}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # Text cannot become markup even by mistake, in browsers that know this.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # after an upgrade the old page would read the new status
}


def page_response() -> HTMLResponse:
    """Return the page."""
    return HTMLResponse(_TEXT, headers=_HEADERS)
