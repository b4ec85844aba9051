"""A target that runs on a group of processes: rank 0 leads, the others follow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, Final

from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import RemoteEagle3Error
from eagle3_schemas.self_check import SelfCheck
from eagle3_server.device_errors import free_memory, is_out_of_memory
from eagle3_server.engine import (
    CaptureJob,
    DeviceTensors,
    SupervisionJob,
    Target,
    TargetDescription,
)
from eagle3_server.group import Group, GroupBroken

_STOP: Final = "stop"
_NOTHING: Final = "nothing"

logger = logging.getLogger(__name__)


class LeadingTarget:
    """Rank 0's target: each computation runs on all ranks. Not thread-safe: one thread owns it.

    Args:
        inner: this rank's own target, of a sharded model.
        group: of which this process leads.
    """

    def __init__(self, inner: Target, group: Group) -> None:
        self._inner, self._group = inner, group

    def describe(self) -> TargetDescription:
        """Return what is served."""
        inner = self._inner.describe()
        return replace(inner, device_name=f"{self._group.size} x {inner.device_name}")

    @property
    def keep_alive_s(self) -> float:
        """Seconds after which an idle leader has to say something: see `keep_alive`."""
        return self._group.timeout_s / 4

    def keep_alive(self) -> None:
        """Say that there is nothing to do: whoever hears nothing takes the leader for dead."""
        self._group.tell({"method": _NOTHING})

    def close(self) -> None:
        """Send the others home."""
        self._group.tell({"method": _STOP})

    def supervise(self, job: SupervisionJob) -> DeviceTensors:
        """See `Target`."""
        return self._everywhere("supervise", job)

    def capture(self, job: CaptureJob) -> DeviceTensors:
        """See `Target`."""
        return self._everywhere("capture", job)

    def input_embeddings(self) -> DeviceTensors:
        """See `Target`."""
        return self._everywhere("input_embeddings")

    def draft_head(self, draft_vocab: DraftVocab) -> DeviceTensors:
        """See `Target`."""
        return self._everywhere("draft_head", draft_vocab)

    def target_head(self) -> DeviceTensors:
        """See `Target`."""
        return self._everywhere("target_head")

    def self_check(self, name: str) -> SelfCheck:
        """See `Target`: what this rank found; every rank runs the same forwards."""
        found: SelfCheck = self._run_everywhere("self_check", name)
        return found

    def _everywhere(self, method: str, *arguments: Any) -> DeviceTensors:
        result: DeviceTensors = self._run_everywhere(method, *arguments)
        return result

    def _run_everywhere(self, method: str, *arguments: Any) -> Any:
        """Run a method of the target on every rank; the result of this one is returned.

        Raises:
            GroupBroken: a rank is gone, or ended in another way.
        """
        self._group.tell({"method": method, "arguments": [_plain(each) for each in arguments]})
        return _run(self._inner, self._group, method, arguments)


class Keeper:
    """Keeps a leader's group alive while it idles, and ends it. `end` is safe to repeat.

    Args:
        target: whose group it is.
        submit: runs a callable on the thread that owns the target, soon.
    """

    def __init__(self, target: LeadingTarget, submit: Callable[[Callable[[], None]], None]) -> None:
        self._target, self._submit = target, submit
        self._ended = threading.Event()
        threading.Thread(target=self._keep, name="keep-alive", daemon=True).start()

    def _keep(self) -> None:
        while not self._ended.wait(self._target.keep_alive_s):
            self._submit(self._target.keep_alive)

    def end(self) -> None:
        """Send the others home; when no thread uses the target any more."""
        if not self._ended.is_set():
            self._ended.set()
            with suppress(GroupBroken):  # they have gone already
                self._target.close()


def follow(target: Target, group: Group) -> None:
    """Run what the leader runs, until it says stop.

    Raises:
        GroupBroken: the leader is gone, or this rank ended a computation in another way.
    """
    while True:
        command = group.hear()
        method = command["method"]
        if method == _STOP:
            return
        if method == _NOTHING:
            continue
        arguments = tuple(_built(each) for each in command["arguments"])
        lacks_memory = False
        try:
            _run(target, group, method, arguments)
        except RemoteEagle3Error:
            pass  # the leader has the same, and answers with it
        except GroupBroken:
            raise
        except Exception as exc:
            # All ranks ended with it, or `agree` would have raised something else.
            lacks_memory = is_out_of_memory(exc)
            logger.log(
                logging.WARNING if lacks_memory else logging.ERROR,
                "%s failed on every rank: %s", method, f"{exc!s:.500}",
            )  # fmt: skip
        if lacks_memory:  # not inside `except`, whose traceback keeps the forward's tensors alive
            free_memory(target.describe().device)


def _run(target: Target, group: Group, method: str, arguments: tuple[Any, ...]) -> Any:
    try:
        result = getattr(target, method)(*arguments)
    except Exception as exc:
        group.agree(exc)
        if not isinstance(exc, RemoteEagle3Error) and not is_out_of_memory(exc):
            # A collective that timed out fails like a forward, and so does every one after it.
            group.prove()
        raise
    group.agree(None)
    return result


_JOBS: Final = {"SupervisionJob": SupervisionJob, "CaptureJob": CaptureJob}


def _plain(argument: Any) -> dict[str, Any]:
    """Take an argument apart into tensors and plain values."""
    if isinstance(argument, str):
        return {"kind": "str", "value": argument}
    if isinstance(argument, DraftVocab):
        return {"kind": "DraftVocab", "ids": argument.selected_token_ids}
    values = {field.name: getattr(argument, field.name) for field in fields(argument)}
    if values["draft_vocab"] is not None:
        values["draft_vocab"] = values["draft_vocab"].selected_token_ids
    return {"kind": type(argument).__name__, **values}


def _built(plain: dict[str, Any]) -> Any:
    """Undo `_plain`."""
    kind, values = plain["kind"], {k: v for k, v in plain.items() if k != "kind"}
    if kind == "str":
        return values["value"]
    if kind == "DraftVocab":
        return DraftVocab.from_ids(values["ids"])
    if values["draft_vocab"] is not None:
        values["draft_vocab"] = DraftVocab.from_ids(values["draft_vocab"])
    return _JOBS[kind](**values)
