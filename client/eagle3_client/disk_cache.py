"""`FrameCache`: downloads kept on disk, so that ranks and later runs need not repeat them."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from eagle3_schemas.errors import InvalidRequest, MalformedPayload, RemoteEagle3Error
from eagle3_schemas.frame import Frame, decode, encode
from eagle3_schemas.host_zeros import host_zeros
from eagle3_schemas.tensors import byte_view

logger = logging.getLogger("eagle3_client")

_POLL_S = 0.05

_Identity = tuple[int, int, int]
"""Of one version of a file: inode, size, time of change."""


class FrameCache:
    """Frames by what they are, one file each, which any number of processes may use. Thread-safe.

    One process downloads while the others wait for its file. A file is complete from the moment it
    has its name, and its checksums are verified whenever it is read; one that is damaged is
    downloaded again. Where nothing can be stored (a full disk), downloads are only not kept.

    Args:
        folder: made if it is not there. Files may be deleted at any time.
        wait_s: seconds to wait for another process's download before making one's own.

    Raises:
        InvalidRequest: `folder` cannot be made, or this process cannot write there.
    """

    def __init__(self, folder: str | os.PathLike[str], wait_s: float) -> None:
        self._folder = Path(folder).expanduser()
        self._wait_s = wait_s
        self._closed = threading.Event()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as exc:
            raise InvalidRequest(
                f"cache_dir must be a folder that this process can write; got {folder!s}: {exc}. "
                "Name another, or None for no cache"
            ) from exc

    def get(self, kind: str, name: str, download: Callable[[], Frame]) -> Frame:
        """Return a frame from its file, or else from `download`, which is then kept.

        Args:
            kind: what it is, a word for the file's name.
            name: which one: all that it depends on.
            download: called without retries, while no other process does; what it returns must
                have been checked. Its tensors are on the CPU.

        Raises:
            RemoteEagle3Error: as `download`, or `close` was called meanwhile.
        """
        key = f"{kind} {name}"
        # A hash, since a server chose part of the name, which must not lead to another folder.
        path = self._folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.frame"
        while True:
            seen = _identity(path)
            if seen is not None and (frame := _load(path, key)) is not None:
                return frame
            lock = self._lock(path, seen)
            try:
                if _identity(path) == seen:
                    if lock is not None:
                        self._remove_leftovers(path)
                    with suppress(OSError):  # another user's, or a folder: it is not replaced
                        path.unlink(missing_ok=True)  # it is damaged, if it is there
                    frame = download()
                    self._store(path, key, frame)
                    return frame
            finally:
                if lock is not None:
                    _unlock(path, lock)

    def close(self) -> None:
        """End every wait for another process."""
        self._closed.set()

    def _lock(self, path: Path, seen: _Identity | None) -> int | None:
        """Wait for the turn to download; return the lock's descriptor.

        None if the file changed meanwhile, or if waiting longer, or locking, makes no sense.
        """
        deadline = time.monotonic() + self._wait_s
        while _identity(path) == seen:
            try:
                if (lock := _try_lock(path)) is not None:
                    return lock
            except (OSError, ImportError) as exc:  # a file system, or a platform, without locks
                logger.warning("%s cannot be locked (%s); every process downloads it", path, exc)
                return None
            if time.monotonic() >= deadline:
                logger.warning(
                    "%s: another process downloads it for more than %.0f s; downloading it here",
                    path, self._wait_s,
                )  # fmt: skip
                return None
            if self._closed.wait(_POLL_S):
                raise RemoteEagle3Error("the backend was closed while another process downloaded")
        return None

    def _remove_leftovers(self, path: Path) -> None:
        """Remove what processes left that were killed while they wrote this file."""
        for leftover in self._folder.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)

    def _store(self, path: Path, key: str, frame: Frame) -> None:
        """Write the file under another name, then give it its own: it is never there in part."""
        encoded = encode({"key": key, "fields": frame.fields}, frame.tensors)
        temporary = None
        try:
            descriptor, temporary = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".tmp", dir=self._folder
            )
            with open(descriptor, "wb") as file:
                for part in encoded.parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            temporary = None
        except OSError as exc:
            logger.warning("%s could not be kept (%s); the next run downloads it again", path, exc)
        finally:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)


def _identity(path: Path) -> _Identity | None:
    """Tell versions of a file apart; None if it is not there."""
    try:
        status = path.stat()
    except OSError:  # or a link that leads nowhere
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _load(path: Path, key: str) -> Frame | None:
    """Read and verify a file; None if it is damaged, of another protocol, or gone."""
    try:
        # Not blocking: a FIFO in its place would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise MalformedPayload("it is no ordinary file")
            body = host_zeros((os.fstat(file.fileno()).st_size,), torch.uint8)
            count = file.readinto(byte_view(body)) if body.numel() else 0
        stored = decode(body[:count])
        match stored.fields:
            case {"key": str(stored_key), "fields": dict(fields)} if stored_key == key:
                return Frame(fields, stored.tensors)
        raise MalformedPayload(f"it does not hold {key}")
    except FileNotFoundError:
        return None
    except (InvalidRequest, OSError) as exc:
        logger.warning("%s is damaged, and is downloaded again: %s", path, exc)
        return None


def _try_lock(path: Path) -> int | None:
    """Lock a file's download; None if somebody else has it. Ends with the process, however it ends.

    Raises:
        OSError, ImportError: there are no such locks here.
    """
    import fcntl  # not on Windows

    lock = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder removes the file before it lets go: a lock on one that is gone locks nothing.
        if os.path.samestat(os.fstat(lock), os.stat(_lock_path(path))):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _unlock(path: Path, lock: int) -> None:
    import fcntl

    with suppress(OSError):
        os.unlink(_lock_path(path))
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child forked meanwhile has it too, and would keep it
    os.close(lock)


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")
