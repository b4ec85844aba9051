"""What a server finds of its target when `verify` asks it to repeat its checks, or why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from eagle3_client.backend import RemoteEagle3Backend
from eagle3_client.preflight_compare import failed
from eagle3_client.preflight_report import Check, Status
from eagle3_schemas import ModelInfo
from eagle3_schemas.errors import (
    NotReady,
    ProtocolMismatch,
    RemoteEagle3Error,
    TargetFailed,
    Unauthorized,
)

_STATUS: Final[dict[str, Status]] = {"passed": "ok", "not_applicable": "skipped"}
_REMEDIES: Final = {
    "hooks": "aux states are of other layers than they are named: do not train on them, and report "
    "this with the versions of transformers and eagle3-remote",
    "head": "supervision is not of the target's logits: do not train on it; restart the server, "
    "and report this",
    "packing": "documents in packed rows see one another: send one document a row, restart the "
    "server, and report this",
    "bits_repeat": "do not rely on exact=True with it: restart the server, which finds this out "
    "when it loads the target, and refuses exact then",
}
MASK_REMEDY: Final = (
    "the loss would be of other tokens than the loss mask says: do not train on it, and report this"
)
_OTHERWISE: Final = "do not train on what it supervises: restart it, and report this"


def self_checks(backend: RemoteEagle3Backend) -> dict[str, Check]:
    """Have a server repeat its checks.

    An older server cannot: then, one line tells what it says it proved at load.

    Raises:
        RemoteEagle3Error: it cannot be asked.
    """
    found = backend.self_check()
    if found is None:
        return {"load_time": _load_time(backend.model_info())}
    return {
        each.name: Check(
            _STATUS.get(each.status, "failed"),
            each.words,
            _REMEDIES.get(each.name, _OTHERWISE) if each.status == "failed" else None,
            {"largest_difference": each.largest_difference},
        )
        for each in found
    }


def _load_time(info: ModelInfo) -> Check:
    """Tell what a server proved of its target when it loaded it."""
    found = [
        f"head: {info.head}" + (f" ({info.head_reason})" if info.head_reason else ""),
        f"packing: {info.packing or 'refused'}"
        + (f" ({info.packing_reason})" if info.packing_reason else ""),
        f"bits repeat: {info.deterministic}",
    ]
    words = "this server cannot repeat its checks; at load it proved: " + "; ".join(found)
    return Check("skipped", words, values={"head": info.head, "packing": info.packing})


def failure(step: str, error: RemoteEagle3Error) -> dict[str, Check]:
    """Return the check that an error ended, by the step's name or what `check` calls it."""
    if isinstance(error, (NotReady, Unauthorized)):
        step = "ready" if isinstance(error, NotReady) else "auth"
    check = failed(error)
    if isinstance(error, TargetFailed):
        check = replace(check, remedy="read the server's log under this request id")
    if isinstance(error, ProtocolMismatch) and step == "position_mask":
        check = replace(check, remedy=MASK_REMEDY)
    return {step: check}
