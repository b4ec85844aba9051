"""Names that stand for several servers, such as a headless Kubernetes service."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from eagle3_client.config import UNIX_SCHEME


def is_name(url: str) -> bool:
    """Whether a URL's host may have other addresses tomorrow: neither an address nor this host."""
    if url.startswith(UNIX_SCHEME):
        return False
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def addresses_of(url: str) -> tuple[str | None, ...]:
    """Return the addresses that are servers of their own, or (None,) if the name is one server.

    Several of one family are several servers; one of each family is one server twice.

    Raises:
        OSError: the name cannot be resolved now.
    """
    if not is_name(url):
        return (None,)
    parts = urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    for family in (socket.AF_INET, socket.AF_INET6):
        addresses = sorted({str(entry[4][0]) for entry in found if entry[0] == family})
        if len(addresses) > 1:
            return tuple(addresses)
        if addresses:
            break
    return (None,)
