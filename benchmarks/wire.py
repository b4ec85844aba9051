"""What the wire benchmarks share: processes of their own, the peer, medians."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER = "nemo-automodel 0.7.0"
NO_PEER = f"{PEER} is not installed here (`make test-all` installs it): no row of it"


@contextmanager
def child(script: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Run a script of this folder until the block ends; yields the JSON line it says first.

    The script ends when its standard input does.
    """
    command = [sys.executable, str(HERE / script), *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"it did not start: {' '.join(command[1:])}")
        yield json.loads(line)


def has_peer() -> bool:
    """Whether the peer's package can be imported."""
    try:
        import nemo_automodel  # noqa: F401
    except ImportError:
        return False
    return True


def middle(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Return the median and, in brackets, the range."""
    shown = f"{statistics.median(values):,.{digits}f}{unit}"
    return f"{shown} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def of_rounds(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the ends, as `common.ratio` does."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def self_signed(folder: Path) -> tuple[Path, Path] | None:
    """Make a certificate for the loopback address and its key; None where openssl is missing."""
    if shutil.which("openssl") is None:
        return None
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
