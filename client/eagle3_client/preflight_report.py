"""`PreflightReport`: what a preflight found, for a reader, for a program, and as an exit code."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Status = Literal["ok", "failed", "unknown", "skipped"]
"""`unknown`: it could not be measured or compared, which is no failure. `skipped`: not asked for,
or impossible after an earlier failure."""

SERVER_CHECKS: Final[dict[str, tuple[str, ...]]] = {
    "reachable": (),
    "ready": (),
    "round_trip": ("median_ms", "requests"),
    "auth": ("token_sent",),
    "versions": ("server_version", "protocol_version", "torch_version"),
    "fingerprint": ("fingerprint", "expected", "model_id", "revision", "dtype", "device_name"),
    "tokenizer": ("digest", "expected"),
    "aux_layer_ids": ("aux_layer_ids", "expected"),
    "supervision": (
        "batch_size", "sequence_length", "elapsed_ms", "queue_ms", "compute_ms", "head_ms",
        "copy_ms", "server_ms", "answer_bytes",
    ),
    "bandwidth": ("bytes_per_s", "is_lower_bound", "answer_bytes", "transfer_ms"),
    "encoding": (
        "encoding", "aux_bytes_per_token", "row_bytes", "supervised_share", "draft_vocab_size",
        "bytes_per_token",
    ),
    "throughput": ("link_tokens_per_s", "compute_tokens_per_s", "tokens_per_s", "bound_by"),
}  # fmt: skip
"""Names of the checks of a server, in the order of the report, and the keys of their values."""

FLEET_CHECKS: Final[dict[str, tuple[str, ...]]] = {
    "same_target": ("servers", "compared"),
    "same_numbers": ("compared",),
}

_MARKS: Final[dict[Status, str]] = {
    "ok": "ok", "failed": "FAILED", "unknown": "unknown", "skipped": "-",
}  # fmt: skip
_INDENT = 26


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    status: Status
    detail: str
    """What was found; for a failure, in the server's words."""
    remedy: str | None = None
    """What to do about it; every failure has one."""
    values: dict[str, Any] = field(default_factory=dict)
    """Numbers and names, by the keys that `SERVER_CHECKS` and `FLEET_CHECKS` list."""


@dataclass(frozen=True)
class ServerReport:
    """What was found of one server."""

    url: str
    checks: dict[str, Check]


@dataclass(frozen=True)
class PreflightReport:
    """What was found of all servers; `str` of it is for a reader."""

    servers: tuple[ServerReport, ...]
    """Of each URL, in their order."""
    fleet: dict[str, Check]
    """Of all together, by name; empty for one server."""
    client: dict[str, str]
    """This side: `version` and `torch_version`."""
    elapsed_s: float
    """Seconds it all took."""

    @property
    def has_passed(self) -> bool:
        """Whether nothing failed; what was skipped or unknown did not."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self._all if check.status == "failed"]

    @property
    def _all(self) -> list[Check]:
        groups = [*(server.checks for server in self.servers), self.fleet]
        return [check for group in groups for check in group.values()]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; the keys are the same whatever was found, None where unknown.

        `format` changes when keys do.
        """
        return {
            "format": 1,
            "passed": self.has_passed,
            "elapsed_s": round(self.elapsed_s, 3),
            "client": self.client,
            "servers": [
                {"url": server.url, "checks": _as_json(server.checks, SERVER_CHECKS)}
                for server in self.servers
            ],
            "fleet": _as_json(self.fleet, FLEET_CHECKS),
        }

    def to_text(self, width: int = 80) -> str:
        """Return it as plain lines of at most `width` columns, but for words that are longer."""
        lines: list[str] = []
        for server in self.servers:
            lines += [server.url, *as_lines(server.checks, width), ""]
        if len(self.servers) > 1:
            lines += [f"{len(self.servers)} servers", *as_lines(self.fleet, width), ""]
        seconds = f"in {self.elapsed_s:.1f} s"
        count = len(self.failed)
        lines.append(
            f"all passed, {seconds}"
            if not count
            else f"{count} {'check' if count == 1 else 'checks'} failed, {seconds}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


def _as_json(checks: dict[str, Check], keys: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    return {
        name: {
            "status": checks[name].status,
            "detail": checks[name].detail,
            "remedy": checks[name].remedy,
            "values": {key: checks[name].values.get(key) for key in keys[name]},
        }
        for name in keys
    }


def as_lines(checks: dict[str, Check], width: int) -> list[str]:
    """Return checks as lines of at most `width` columns."""
    lines = []
    for name, check in checks.items():
        head = f"  {_MARKS[check.status]:<8} {name.replace('_', ' '):<14} "
        lines += wrapped(check.detail, head, width)
        if check.remedy is not None:
            lines += wrapped(check.remedy, " " * (_INDENT - 3) + "-> ", width)
    return lines


def wrapped(text: str, head: str, width: int, indent: int = _INDENT) -> list[str]:
    """Return a text as lines of at most `width` columns, indented behind `head`."""
    printable = "".join(c if c.isprintable() else " " for c in text)  # a server's words may be any
    return textwrap.wrap(
        " ".join(printable.split()),
        width,
        initial_indent=head.ljust(indent),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
