"""A server process that `start_server` started, or a rank of one: settings come through stdin."""

from __future__ import annotations

import json
import sys

from eagle3_schemas.errors import RemoteEagle3Error
from eagle3_server.config import ServerSettings
from eagle3_server.serve import serve


def main() -> int:
    """Serve, or follow, as RANK says."""
    settings = ServerSettings(**json.loads(sys.stdin.read()))
    try:
        return serve(settings)
    except RemoteEagle3Error as exc:
        print(exc, file=sys.stderr)
        return 2
