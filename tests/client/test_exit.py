"""What the client's threads do to a process that ends: nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, threading, time
from pathlib import Path
from eagle3_client.daemons import close_at_exit
from eagle3_client.workers import DaemonWorkers

class Slow:
    def __del__(self):
        time.sleep(0.5)
        Path(sys.argv[1]).write_text("freed")

workers = DaemonWorkers(2, "test")
close_at_exit(workers)
if sys.argv[2] == "frees":
    workers.submit(lambda slow=Slow(): None).result()
else:
    workers.submit(threading.Event().wait)
    workers.submit(lambda: None).result()
"""


@pytest.mark.parametrize("what", ["frees", "hangs"])
def test_a_process_that_ends_lets_its_threads_finish_but_not_for_long(
    tmp_path: Path, what: str
) -> None:
    """A thread cut off in a destructor of torch would end the process with code 134."""
    mark = tmp_path / "mark"
    started = time.monotonic()
    command = [sys.executable, "-c", SCRIPT, str(mark), what]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (finished.returncode, finished.stderr) == (0, "")
    if what == "frees":
        assert mark.read_text() == "freed"
    else:
        assert 2 <= time.monotonic() - started < 60
