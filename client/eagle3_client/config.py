"""`ClientSettings`: every client knob, its unit and its default, checked once."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any
from urllib.parse import urlsplit

import torch

from eagle3_client.draft_config import ExpectedDraft
from eagle3_schemas import ModelInfo
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.messages import AuxDtype, Rows

DEFAULT_RETRY_FOR_S = 900.0
"""A 70B target takes minutes to load again; a shorter wait would end runs that could go on."""

DEFAULT_TIMEOUT_S = 120.0

UNIX_SCHEME = "unix://"

_MAX_UNIX_PATH_BYTES = 107  # sun_path of Linux, without its final zero
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_TOKEN = re.compile(r"[!-~]*")


_KINDS: dict[str, tuple[type, ...]] = {
    "token": (str, NoneType),
    "timeout_s": (int, float),
    "retry_for_s": (int, float),
    "expect_fingerprint": (str, NoneType),
    "max_retries": (int, NoneType),
    "max_in_flight": (int, NoneType),
    "cache_dir": (str, os.PathLike, NoneType),
}


@dataclass(frozen=True)
class ClientSettings:
    """Settings of one `RemoteEagle3Backend`; its constructor documents the common ones.

    Raises:
        InvalidRequest: a value that cannot work, with what would.
    """

    urls: tuple[str, ...]
    """Servers of one and the same target: `http://host:port` or `unix:///path/of/socket` each."""
    device: torch.device
    """Where batches are delivered."""
    token: str | None = field(default=None, repr=False)
    """Bearer token. Who talks to a server that asks for one."""
    aux_layer_ids: tuple[int, ...] | None = None
    """Layers captured; None takes the server's. Who trains a draft on other layers."""
    encoding: str = "auto"
    """How supervision rows travel. Who compares encodings; `auto` is right otherwise."""
    aux_dtype: AuxDtype = "model"
    """How aux states travel; `float8_e4m3` is lossy. Who has a link too slow for bf16."""
    rows: Rows = "position_mask"
    """Rows of target_probs sent. Who trains P-EAGLE (`loss_mask`) or inspects (`all`)."""
    exact: bool = False
    """Bit-for-bit equality with a co-located target. Who proves a set-up, or debugs one."""
    output_dtype: torch.dtype | None = None
    """Cast of aux_hidden_states after transfer. Who has an fp32 draft on a bf16 target."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Seconds without a byte before an attempt is given up. Who has minutes-long forwards."""
    retry_for_s: float = DEFAULT_RETRY_FOR_S
    """Seconds a request is repeated before it raises. Who wants to fail sooner, or wait longer."""
    expect_fingerprint: str | None = None
    """The only target accepted. Who resumes a run, and wants the target it began with."""
    expect_draft_config: Mapping[str, Any] | None = field(default=None, hash=False)
    """`draft_config()` of the run's beginning; implies that and the layers. Who resumes."""
    max_retries: int | None = None
    """Also a limit on the number of repeats. Who comes from NeMo AutoModel's client."""
    max_in_flight: int | None = None
    """Requests sent at once; None is two a server. Who prefetches deeper."""
    cache_dir: str | os.PathLike[str] | None = None
    """Folder that keeps embeddings and draft heads. Who starts many ranks on a host, or often."""

    def __post_init__(self) -> None:
        """Check every value."""
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(self, name), kinds):
                raise InvalidRequest(
                    f"{name} must be {' or '.join(each.__name__ for each in kinds)}; got "
                    f"{type(getattr(self, name)).__name__}"
                )
        self._expect_draft()
        if not self.urls:
            raise InvalidRequest("urls must name at least one server, as http://host:port")
        for url in self.urls:
            _check_url(url)
        if len({_server_of(url) for url in self.urls}) != len(self.urls):
            raise InvalidRequest(f"each server may be named once; got {list(self.urls)}")
        if self.encoding != "auto" and self.encoding not in ENCODINGS:
            raise InvalidRequest(
                f"encoding must be 'auto' or one of {list(ENCODINGS)}; got {self.encoding!r}"
            )
        if self.aux_dtype not in ("model", "float8_e4m3"):
            raise InvalidRequest(
                f"aux_dtype must be 'model' or 'float8_e4m3'; got {self.aux_dtype!r}"
            )
        if self.exact and self.aux_dtype != "model":
            raise InvalidRequest(f"exact=True forbids the lossy aux_dtype {self.aux_dtype!r}")
        if self.exact and self.encoding == "hidden" and self.device.type != "cpu":
            raise InvalidRequest(
                f"exact=True forbids encoding 'hidden' on {self.device}: it is rebuilt with other "
                "rounding than on the target; use 'probs' or 'logits'"
            )
        if self.rows not in ("position_mask", "loss_mask", "all"):
            raise InvalidRequest(
                f"rows must be 'position_mask', 'loss_mask' or 'all'; got {self.rows!r}"
            )
        dtype = self.output_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InvalidRequest(
                f"output_dtype must be a float torch.dtype, as torch.float32; got {dtype!r}"
            )
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise InvalidRequest(
                "token must be printable ASCII without spaces; the one given is not (perhaps it "
                "ends with a line break: strip it)"
            )
        if self.token is not None and "," in self.token:
            raise InvalidRequest(
                "token must be one token; got several with commas between, which is how a server "
                "is given them. Pass one of these"
            )
        if not 0 < self.timeout_s < 1e7:
            raise InvalidRequest(f"timeout_s must be > 0 and finite, seconds; got {self.timeout_s}")
        if not 0 <= self.retry_for_s < 1e9:
            raise InvalidRequest(f"retry_for_s must be >= 0, seconds; got {self.retry_for_s}")
        if self.max_retries is not None and self.max_retries < 0:
            raise InvalidRequest(f"max_retries must be >= 0 or None; got {self.max_retries}")
        if self.expect_fingerprint is not None and not _FINGERPRINT.fullmatch(
            self.expect_fingerprint
        ):
            raise InvalidRequest(
                "expect_fingerprint must be 32 hex digits, as `backend.fingerprint` gives; got "
                f"{self.expect_fingerprint!r}"
            )
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise InvalidRequest(f"max_in_flight must be >= 1 or None; got {self.max_in_flight}")

    @property
    def expected_draft(self) -> ExpectedDraft | None:
        """What `expect_draft_config` says, read."""
        config = self.expect_draft_config
        return None if config is None else ExpectedDraft.of(config)

    def _expect_draft(self) -> None:
        """Take the fingerprint and the layers of `expect_draft_config`."""
        if (draft := self.expected_draft) is None:
            return
        object.__setattr__(self, "expect_draft_config", dict(self.expect_draft_config or {}))
        for name, said in (
            ("expect_fingerprint", draft.fingerprint),
            ("aux_layer_ids", draft.aux_layer_ids),
        ):
            if (given := getattr(self, name)) not in (None, said):
                raise InvalidRequest(
                    f"{name} is {_listed(given)}, and expect_draft_config was trained with "
                    f"{_listed(said)}; leave {name} out, or begin a new run"
                )
            object.__setattr__(self, name, said)


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _check_url(url: str) -> None:
    if url.startswith(UNIX_SCHEME):
        path = url.removeprefix(UNIX_SCHEME)
        length = len(os.fsencode(path))
        if not path.startswith("/") or "\0" in path or length > _MAX_UNIX_PATH_BYTES:
            raise InvalidRequest(
                "a Unix socket's URL must be unix:// and an absolute path of at most "
                f"{_MAX_UNIX_PATH_BYTES} bytes, as unix:///run/eagle3.sock; got {url!r}"
            )
        return
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_right = is_right and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:  # a port that is no number, or a host's brackets left open
        is_right = False
    if not is_right or parts.path.endswith("/v1"):
        raise InvalidRequest(
            "a URL must be http://host:port, https://host:port (without /v1) or "
            f"unix:///path/of/socket; got {url!r}"
        )
    if "@" in parts.netloc:
        raise InvalidRequest(
            "a URL must not hold a user or a password, which logs and errors would show; pass a "
            "token (EAGLE3_TOKEN) instead"
        )


def _server_of(url: str) -> tuple[str, str | None, int | None, str]:
    """Return what a URL names, however it is spelt."""
    if url.startswith(UNIX_SCHEME):
        return UNIX_SCHEME, None, None, url
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname, port, parts.path


def choose_encoding(settings: ClientSettings, info: ModelInfo) -> str:
    """Return the encoding of a request; docs/decisions.md has the reasons.

    `auto` is `hidden` for a trainer on a GPU, where rebuilding costs less than any link, and else
    what needs no matmul there: `logits` where they are narrower than probs. Under `exact` never
    `hidden`, which another kind of device rebuilds with other rounding.
    """
    if settings.encoding != "auto":
        return settings.encoding
    if settings.device.type != "cpu" and "hidden" in info.encodings and not settings.exact:
        return "hidden"
    return "probs" if info.dtype == "float32" else "logits"


def check_device(device: torch.device) -> None:
    """Raise InvalidRequest if no tensor can be put there: now rather than with the first batch."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise InvalidRequest(
            f"device {str(device)!r} cannot be used here: {exc}. Name one that this process has"
        ) from exc


def split_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """Return one URL, a comma-separated list, or a sequence as a tuple without trailing slashes."""
    parts = urls.split(",") if isinstance(urls, str) else urls
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise InvalidRequest(
            f"urls must be a URL, or a list of them, as http://host:port; got {urls!r:.200}"
        )
    return tuple(part.strip().rstrip("/") for part in parts if part.strip())


def client_id() -> str:
    """Return a name of this trainer process, for the server's queue, log and status."""
    name = f"{socket.gethostname()[:40]}-{os.environ.get('RANK', '0')[:6]}-{os.getpid()}"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)
