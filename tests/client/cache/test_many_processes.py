"""`cache_dir`: one download for many processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.client.cache import ranks
from tests.client.cache.conftest import Counted, files, refuse, same_frame
from tests.servers import PATIENCE_S

from eagle3_client import (
    RemoteEagle3Error,
)
from eagle3_client.disk_cache import FrameCache
from eagle3_schemas.frame import Frame

pytestmark = pytest.mark.slow

RANKS = 8


def run_ranks(url: str, folder: Path) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ranks.py"))],
        input=json.dumps({"url": url, "cache_dir": str(folder), "ranks": RANKS}),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_eight_ranks_fill_a_cold_cache_with_one_download_each(
    model: Any, live_server: Any, connect: Any, mapping: Any, tmp_path: Path
) -> None:
    target = Counted(model, seconds=0.5)
    url = live_server(target)
    weight = model.get_input_embeddings().weight.detach().contiguous()
    plain = connect(urls=url, encoding="hidden")
    plain.set_vocab_mapping(*mapping(ranks.DRAFT_IDS, 131))
    alone = {
        "embeddings": hashlib.sha256(weight.numpy().tobytes()).hexdigest(),
        "probs": ranks.digest(plain.generate_batch(*ranks.BATCH).target_probs),
    }
    target.embeddings = target.heads = 0
    shared = tmp_path / "shared"

    assert run_ranks(url, shared) == [alone] * RANKS
    assert (target.embeddings, target.heads) == (1, 1)
    left = files(shared)
    assert [name.partition("-")[0] for name in left] == ["draft_head", "input_embeddings"], left

    assert run_ranks(url, shared) == [alone] * RANKS
    assert (target.embeddings, target.heads) == (1, 1), "a warm cache asks nothing"

    for path in shared.iterdir():  # the last byte of the last tensor
        body = bytearray(path.read_bytes())
        body[-1] ^= 1
        path.write_bytes(body)
    assert run_ranks(url, shared) == [alone] * RANKS
    assert (target.embeddings, target.heads) == (2, 2), "one download mends it for all"
    assert files(shared) == left


HOLDER = """
import sys, time
from eagle3_client import disk_cache
from eagle3_client.disk_cache import FrameCache
def download():
    print("downloading", flush=True)
    time.sleep(600)
FrameCache(sys.argv[1], 60).get("thing", "name", download)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Any:
    """Another process that is downloading `thing name`, and will not end by itself."""
    holders = []

    def start() -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "downloading\n"
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_holder_that_is_killed_holds_nobody_up(
    cache: FrameCache, frame: Frame, tmp_path: Path, hold: Any
) -> None:
    holder = hold()
    (lock,) = files(tmp_path)
    path = (tmp_path / lock).with_suffix(".frame")
    leftover = tmp_path / f".{path.name}.abc.tmp"  # of one that was killed as it wrote
    leftover.write_bytes(b"half")
    got: list[Frame] = []
    waiter = threading.Thread(target=lambda: got.append(cache.get("thing", "name", lambda: frame)))
    waiter.start()
    waiter.join(0.3)
    assert not got, "it does not wait for its turn"
    holder.send_signal(signal.SIGKILL)
    waiter.join(PATIENCE_S)
    same_frame(got[0], frame)
    assert files(tmp_path) == [path.name]


def test_a_holder_that_hangs_is_waited_for_only_so_long(
    frame: Frame, tmp_path: Path, hold: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hold().send_signal(signal.SIGSTOP)
    started = time.monotonic()
    same_frame(FrameCache(tmp_path, wait_s=0.4).get("thing", "name", lambda: frame), frame)
    assert 0.4 <= time.monotonic() - started < 30
    assert "another process downloads it" in caplog.text
    same_frame(FrameCache(tmp_path, wait_s=0.4).get("thing", "name", refuse), frame)


def test_closing_ends_the_wait(cache: FrameCache, frame: Frame, hold: Any) -> None:
    hold()
    threading.Timer(0.2, cache.close).start()
    with pytest.raises(RemoteEagle3Error, match="closed while another process downloaded"):
        cache.get("thing", "name", lambda: frame)


def test_other_names_do_not_wait(cache: FrameCache, frame: Frame, hold: Any) -> None:
    hold()
    same_frame(cache.get("thing", "another", lambda: frame), frame)


def test_threads_share_one_download(tmp_path: Path, frame: Frame) -> None:
    count, got = [0], []

    def download() -> Frame:
        count[0] += 1
        time.sleep(0.2)
        return frame

    def ask() -> None:
        got.append(FrameCache(tmp_path, PATIENCE_S).get("thing", "name", download))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (count[0], len(got), len(files(tmp_path))) == (1, 16, 1)
    for each in got:
        same_frame(each, frame)
