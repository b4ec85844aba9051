"""Server processes that another process starts: how they get settings, end with it, and report.

Ray actors are sent these functions by value, so that an actor needs no torch: they use the standard
library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eagle3_server.config import ServerSettings

READY_FD_VARIABLE = "EAGLE3READY_FD"
"""File descriptor that a server writes one line of JSON to once it is ready: `url`, as trainers use
it, and `fingerprint`."""

_PR_SET_PDEATHSIG = 1
_CODE = (
    "import sys; sys.path = [each for each in sys.path if each]; "
    "from eagle3_server.member import main; raise SystemExit(main())"
)


def settings_to_json(settings: ServerSettings) -> str:
    """Write settings down, tokens included: for a pipe, not for a log."""
    fields = settings.model_dump(mode="json", exclude_unset=False)
    if settings.token is not None:
        fields["token"] = settings.token.get_secret_value()
    return json.dumps(fields)


def start_server(
    settings: str,
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start `serve` in a process that is killed when the calling thread ends (Linux).

    Args:
        settings: of `settings_to_json`; they travel through the process's stdin.
        environment: all of its variables.
        pass_fds: descriptors it inherits.
        stderr: as `subprocess.Popen` has it; ours if None.
    """
    server = subprocess.Popen(
        # Not -m, which would look for modules in the current directory first.
        [sys.executable, "-c", _CODE],
        stdin=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        pass_fds=pass_fds,
        # A session of its own: an interrupt of the terminal comes to us, and we pass it on.
        start_new_session=True,
        preexec_fn=_dies_with_parent(),
    )
    assert server.stdin is not None
    with suppress(BrokenPipeError):  # it ended at once: who waits for it sees that
        server.stdin.write(settings.encode())
        server.stdin.close()
    return server


def tell_parent(url: str, fingerprint: str) -> None:
    """Say that this process serves, where a parent asked for it by `READY_FD_VARIABLE`."""
    if READY_FD_VARIABLE in os.environ:
        with suppress(OSError):  # it is gone, and so are we soon
            line = json.dumps({"url": url, "fingerprint": fingerprint}) + "\n"
            os.write(int(os.environ[READY_FD_VARIABLE]), line.encode())


def _dies_with_parent() -> Callable[[], None] | None:
    """Return what makes the kernel end a child whose parent was killed; Linux alone has it."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask
