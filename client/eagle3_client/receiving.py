"""A response's body, read straight into one buffer; a long download shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import torch

from eagle3_client.http1 import Pace
from eagle3_schemas.errors import TransportError
from eagle3_schemas.frame import Frame
from eagle3_schemas.host_zeros import host_zeros
from eagle3_schemas.tensors import byte_view

SHOWN_FROM_BYTES = 64 << 20
"""From this size a download, the embeddings or a draft head, takes long enough to be watched."""

_MAX_RESPONSE_BYTES = 1 << 38  # no response is that large; a length that lies must not allocate it
_SHOWN_PIECE_BYTES = 1 << 20

Take = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class TimedAnswer:
    """A supervision answer, and what it took."""

    frame: Frame
    body_bytes: int
    elapsed_s: float
    """From the first byte sent to the last one received; not the check of what came."""
    server_timing: str
    """The `server-timing` header; empty if there was none."""


def fresh(nbytes: int) -> torch.Tensor:
    """Take memory that nobody has, which a batch may keep."""
    return host_zeros((nbytes,), torch.uint8)


def receive(response: httpx.Response, take: Take, url: str) -> torch.Tensor:
    """Return a body as a 1-D uint8 tensor of its announced length, from `take`.

    Raises:
        TransportError: no usable length, or another than announced.
        httpx.TransportError: the connection failed.
    """
    length = response.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or int(length[:20]) > _MAX_RESPONSE_BYTES:
        raise TransportError(
            f"expected a content-length up to {_MAX_RESPONSE_BYTES}; got {length[:40]!r}", url=url
        )
    body = take(int(length))
    view = byte_view(body)
    received = 0
    with _shown(response, view.nbytes) as advance:
        if (readinto := response.extensions.get("readinto")) is not None:
            piece = view.nbytes if advance is _ignore else _SHOWN_PIECE_BYTES
            while received < view.nbytes and (count := readinto(view[received : received + piece])):
                received += count
                advance(count)
        else:
            pace = Pace(response.request, view.nbytes)
            for chunk in response.iter_raw():
                if received + len(chunk) > view.nbytes:
                    raise TransportError(f"the response is longer than its {length} bytes", url=url)
                view[received : received + len(chunk)] = chunk
                received += len(chunk)
                advance(len(chunk))
                try:
                    pace.check(received < view.nbytes)
                except TimeoutError as exc:
                    raise httpx.ReadTimeout(str(exc), request=response.request) from exc
    if received != view.nbytes:
        raise TransportError(
            f"expected {length} bytes; the response ended after {received}", url=url
        )
    return body


def _ignore(_nbytes: int) -> None:
    pass


@contextmanager
def _shown(response: httpx.Response, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for a large download, if somebody is there to watch it.

    What is posted, supervision, comes once a step: no bar.
    """
    is_download = response.request.method == "GET" and nbytes >= SHOWN_FROM_BYTES
    if not is_download or sys.stderr is None or not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(
        *columns,
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # both are the trainer's
        redirect_stderr=False,
    ) as progress:
        path = response.request.url.path.rpartition("/")[2]
        task = progress.add_task(path, total=nbytes)
        yield lambda count: progress.advance(task, count)
