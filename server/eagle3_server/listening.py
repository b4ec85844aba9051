"""Where the server listens: sockets opened before loading, since a port in use must not cost it."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import logging
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eagle3_schemas.errors import InvalidRequest

_OTHER_FILES = 64  # libraries, the checkpoint, pipes, listeners

logger = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen_tcp(host: str, port: int) -> socket.socket:
    """Open a listening TCP socket; port 0 takes a free one.

    Raises:
        InvalidRequest: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        raise InvalidRequest(
            f"cannot listen on {host} port {port}: {exc.strerror}; choose another --port or --host"
        ) from exc


def listen_unix(path: Path) -> socket.socket:
    """Open a listening Unix socket that only this user can connect to (mode 0600).

    A socket file that a dead server left is replaced; `remove_unix` removes it when done. Servers
    that start at the same time on one path take turns: one listens, the others are refused.

    Raises:
        InvalidRequest: the path is taken, too long, or cannot be written.
    """
    with _alone_in(path.parent):
        _remove_if_dead(path)
        listener = socket.socket(socket.AF_UNIX)
        # Between bind and chmod others could connect, so the file never has a wider mode.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as exc:
            listener.close()
            raise InvalidRequest(
                f"cannot listen on the Unix socket {path}: {exc.strerror or exc}; choose another "
                "--unix-socket"
            ) from exc
        finally:
            os.umask(before)
        listener.listen(socket.SOMAXCONN)  # from here on a probe finds it alive
    return listener


def hold_unix(path: Path) -> int:
    """Return a descriptor of a socket file, for `remove_unix` to know it by.

    While it is open no other file can have the inode, as one created after a removal soon has.
    """
    return os.open(path, os.O_PATH)


def remove_unix(path: Path, held: int) -> None:
    """Remove a socket file, if it is still the one that is held, and close the descriptor.

    A server that was started while this one drained has put its own there.
    """
    with _alone_in(path.parent), suppress(OSError):
        if os.path.samestat(path.stat(), os.fstat(held)):
            path.unlink()
    os.close(held)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other servers from probing, binding or removing in a folder meanwhile."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # `bind` says what is wrong with it
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_if_dead(path: Path) -> None:
    """Remove a socket that nobody listens on; anything else is left for `bind` to refuse."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            path.unlink(missing_ok=True)


def allow_open_files(connections: int) -> None:
    """Let the process open as many files as so many connections need, or say what to do.

    The kernel resets what comes over its limit, before any word of ours.
    """
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            logger.warning(
                "this process may open %d files, too few for max_connections=%d: some may be "
                "reset without a word. Raise the limit (ulimit -n, LimitNOFILE=) to %d, or lower "
                "EAGLE3_MAX_CONNECTIONS",
                soft, connections, needed,
            )  # fmt: skip
