"""The event loop, with bounds to what uvicorn leaves to its defaults: TLS handshakes and ends."""

from __future__ import annotations

from typing import Any

import uvloop

HANDSHAKE_S = 10.0
_SHUTDOWN_S = 2.0


class Loop(uvloop.Loop):
    """uvloop's; a TLS connection that does not come about, or does not close, is given up."""

    async def create_server(self, *args: Any, **kwargs: Any) -> Any:
        """Listen, as asyncio does."""
        if kwargs.get("ssl") is not None:
            kwargs |= {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": _SHUTDOWN_S}
        return await super().create_server(*args, **kwargs)
