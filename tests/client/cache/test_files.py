"""`cache_dir`: files that are whole, and never a byte that is not the server's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.cache.conftest import files, refuse, same_frame

from eagle3_client import (
    InvalidRequest,
    TransportError,
    disk_cache,
)
from eagle3_client.disk_cache import FrameCache
from eagle3_schemas.frame import Frame, decode, encode


def test_a_file_has_its_name_only_when_it_is_whole(
    cache: FrameCache, frame: Frame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], int]] = []
    synced, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        seen.append((files(tmp_path), os.fstat(descriptor).st_size))
        synced(descriptor)

    def replacing(source: str, destination: Any) -> None:
        seen.append((files(tmp_path), Path(source).stat().st_size))
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    cache.get("thing", "name", lambda: frame)
    (name,) = files(tmp_path)
    size = (tmp_path / name).stat().st_size
    assert len(seen) == 2, "synced, then named"
    for names, written in seen:
        assert name not in names
        assert written == size


def test_what_is_read_back_is_the_frame(cache: FrameCache, frame: Frame) -> None:
    same_frame(cache.get("thing", "name", lambda: frame), frame)
    same_frame(cache.get("thing", "name", refuse), frame)


def flip(place: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        body = bytearray(path.read_bytes())
        body[place] ^= 0x10
        path.write_bytes(body)

    return change


def resize(change: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, max(0, path.stat().st_size + change))


def another_version(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[4] += 1
    path.write_bytes(body)


def another_name(path: Path) -> None:
    stored = decode(path.read_bytes())
    path.write_bytes(encode(stored.fields | {"key": "other"}, stored.tensors).to_bytes())


def no_fields(path: Path) -> None:
    path.write_bytes(encode({}, {}).to_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        *map(flip, (0, 4, 8, 30, -1, -64, -200)),
        *map(resize, (-1, -300, 1, -(1 << 30))),
        another_version,
        another_name,
        no_fields,
    ],
)
def test_a_damaged_file_is_downloaded_again(
    cache: FrameCache, frame: Frame, tmp_path: Path, damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cache.get("thing", "name", lambda: frame)
    (name,) = files(tmp_path)
    damage(tmp_path / name)
    count = []

    def download() -> Frame:
        count.append(1)
        assert files(tmp_path) == [name.replace(".frame", ".lock")], "the damaged one is gone"
        return frame

    same_frame(cache.get("thing", "name", download), frame)
    assert len(count) == 1
    assert "is damaged, and is downloaded again" in caplog.text
    same_frame(cache.get("thing", "name", refuse), frame)


def test_a_download_that_fails_leaves_nothing(
    cache: FrameCache, frame: Frame, tmp_path: Path
) -> None:
    def fail() -> Frame:
        raise TransportError("no")

    with pytest.raises(TransportError):
        cache.get("thing", "name", fail)
    assert files(tmp_path) == []
    same_frame(cache.get("thing", "name", lambda: frame), frame)


def test_a_disk_that_is_full_does_not_end_the_run(
    cache: FrameCache, frame: Frame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    same_frame(cache.get("thing", "name", lambda: frame), frame)
    assert files(tmp_path) == []
    assert "could not be kept" in caplog.text


def test_a_file_system_without_locks_keeps_files_all_the_same(
    cache: FrameCache, frame: Frame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import fcntl

    def without(*_arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    same_frame(cache.get("thing", "name", lambda: frame), frame)
    same_frame(cache.get("thing", "name", refuse), frame)
    assert "cannot be locked" in caplog.text


def test_a_name_of_a_servers_choice_stays_in_the_folder(frame: Frame, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    FrameCache(folder, 1).get("thing", "../../../x\0/etc", lambda: frame)
    assert [path.parent for path in tmp_path.rglob("*") if path.is_file()] == [folder]


def test_a_folder_that_cannot_be_one_is_refused_at_once(connect: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/no"):
        with pytest.raises(InvalidRequest, match=r"cache_dir must be a folder.*None for no cache"):
            connect(urls="http://a", cache_dir=folder)


def test_a_lock_that_its_holder_removed_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two would hold it: one the old file, one the new, after a download that failed."""
    import fcntl

    path, flock = tmp_path / "thing.frame", fcntl.flock
    held = disk_cache._try_lock(path)
    assert held is not None
    assert disk_cache._try_lock(path) is None

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        disk_cache._unlock(path, held)  # the other has opened the file, and not yet locked it
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert disk_cache._try_lock(path) is None
    again = disk_cache._try_lock(path)
    assert again is not None
    disk_cache._unlock(path, again)
    assert files(tmp_path) == []


@pytest.mark.parametrize("what", ["folder", "fifo", "loop"])
def test_what_is_no_file_is_not_read_and_does_not_end_the_run(
    cache: FrameCache, frame: Frame, tmp_path: Path, what: str
) -> None:
    cache.get("thing", "name", lambda: frame)
    (name,) = [each for each in files(tmp_path) if each.endswith(".frame")]
    path = tmp_path / name
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    same_frame(cache.get("thing", "name", lambda: frame), frame)
