"""`ServerCheck`: one server's part of a preflight, step by step, each with its words and remedy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

import torch

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.preflight_compare import (
    Expectation,
    aux_check,
    failed,
    fingerprint_check,
    tokenizer_check,
)
from eagle3_client.preflight_measure import (
    ROUND_TRIPS,
    SURE_BYTES,
    Cost,
    Exchange,
    Probe,
    round_trip_s,
    say_bytes,
    say_exchange,
    values_of,
)
from eagle3_client.preflight_report import SERVER_CHECKS, Check, ServerReport, Status
from eagle3_schemas import ModelInfo
from eagle3_schemas.errors import (
    LimitExceeded,
    NotReady,
    ProtocolMismatch,
    QueueFull,
    RemoteEagle3Error,
    Unauthorized,
)
from eagle3_schemas.tensors import DTYPES

ASK_TIMEOUT_S = 5.0
"""Seconds without a byte after which a server counts as not answering a small question."""


class ServerCheck:
    """Checks one server; `ask` and `measure` run on threads of their own, and may be given up.

    Args:
        connection: to it, used by nobody else.
        expectation: of the trainer.
    """

    def __init__(self, connection: Connection, expectation: Expectation) -> None:
        self.connection = connection
        self.info: ModelInfo | None = None
        self._expect = expectation
        self._lock = threading.Lock()
        self._checks: dict[str, Check] = {}
        self.is_over = False
        """Whether it was given up."""
        self._round_trip_s: float | None = None

    def ask(self) -> None:
        """Ask everything that needs no work of the target."""
        with self._step("reachable") as found:
            self.connection.check_alive(ASK_TIMEOUT_S)
            found("ok", "its process answers")
        if self._checks["reachable"].status != "ok":
            self._skip_rest("not reachable")
            return
        with self._step("ready") as found:
            self.connection.check_ready(ASK_TIMEOUT_S)
            found("ok", "its target is loaded")
        with self._step("round_trip") as found:
            self._round_trip_s = round_trip_s(self.connection, ASK_TIMEOUT_S)
            milliseconds = 1000 * self._round_trip_s
            found(
                "ok", f"{milliseconds:.2f} ms, median of {ROUND_TRIPS - 1} small requests",
                median_ms=round(milliseconds, 3), requests=ROUND_TRIPS - 1,
            )  # fmt: skip
        self._ask_model()
        if (info := self.info) is not None:
            self._compare(info)

    def measure(self) -> None:
        """Have the target work, and time it; nothing if `ask` found that it cannot."""
        if (info := self.info) is None or self.is_over:
            return
        expect = self._expect
        share = 1.0 if expect.settings.rows == "all" else expect.supervised_share
        size = min(expect.draft_vocab_size or 32_000, info.vocab_size)
        cost = Cost.of(expect.settings, info, size, share)
        probe = Probe(self.connection, expect.settings, info, cost)
        first: Exchange | None = None
        with self._step("supervision") as found:
            first = probe.first()
            found("ok", say_exchange(first), **values_of(first))
        best = first
        if first is not None:
            cost = Cost.of(expect.settings, info, size, share, first.row_bytes)
            best = self._measure_link(probe, first)
        else:
            self._note("bandwidth", Check("skipped", "needs a supervision request that succeeds"))
        asked = expect.draft_vocab_size
        if asked is not None and asked > info.vocab_size:
            words = f"a draft vocab of {asked} is larger than the target's vocab of {size}"
            self._note("encoding", Check("failed", words, "choose distinct ids of the target"))
        self._note("encoding", _encoding_check(cost, expect.settings))
        self._note("throughput", self._throughput(best, cost))

    def give_up(self, time_limit_s: float) -> None:
        """End it: what has no answer yet fails, or was not reached. Safe to repeat."""
        with self._lock:
            self.is_over = True
            missing = [name for name in SERVER_CHECKS if name not in self._checks]
            for name in missing[:1]:
                self._checks[name] = Check(
                    "failed",
                    f"no answer within its share of the check's time limit, {time_limit_s:g} s",
                    "see whether the server is busy or the link is slow, or raise --time-limit "
                    "(time_limit_s)",
                )
            for name in missing[1:]:
                self._checks[name] = Check("skipped", "the time limit was over")
        self.connection.close()

    def report(self) -> ServerReport:
        """Return what was found; after `give_up`, or when the threads have ended."""
        with self._lock:
            checks = {name: self._checks[name] for name in SERVER_CHECKS}
        return ServerReport(self.connection.url, checks)

    def _ask_model(self) -> None:
        has_token = self._expect.settings.token is not None
        accepted = "the token is accepted" if has_token else "no token is asked for, none is sent"
        failure: RemoteEagle3Error | None = None
        with self._step("auth", token_sent=has_token) as found:
            try:
                self.info = self.connection.model_info()
            except Unauthorized:
                raise
            except RemoteEagle3Error as exc:
                failure = exc  # said elsewhere
            else:
                found("ok", accepted, token_sent=has_token)
        if isinstance(failure, NotReady):
            self._note("auth", Check("ok", accepted, None, {"token_sent": has_token}))
            self._skip_rest("needs a server that is ready")
        elif failure is not None:
            self._note("auth", Check("unknown", "no usable answer; see versions"))
            self._note("versions", failed(failure))
            self._skip_rest("the server does not say what it serves")
        elif self.info is None:
            self._skip_rest("needs a token that the server accepts")

    def _compare(self, info: ModelInfo) -> None:
        """Compare what the server says of its target with what the trainer expects."""
        if info.dtype not in DTYPES:
            self.info = None
            words = f"the target's dtype {info.dtype!r} is none that this side knows"
            self._note("versions", failed(ProtocolMismatch(words)))
            self._skip_rest("the two sides do not understand each other")
            return
        self._note(
            "versions",
            Check(
                "ok",
                f"server {info.server_version}, torch {info.torch_version}; here "
                f"{version('eagle3-remote')}, torch {torch.__version__}; protocol "
                f"{info.protocol_version} on both sides",
                values={
                    "server_version": info.server_version,
                    "protocol_version": info.protocol_version,
                    "torch_version": info.torch_version,
                },
            ),
        )
        self._note("fingerprint", fingerprint_check(info, self._expect.settings))
        self._note("tokenizer", tokenizer_check(info, self._expect.tokenizer))
        self._note("aux_layer_ids", aux_check(info, self._expect))

    def _measure_link(self, probe: Probe, first: Exchange) -> Exchange:
        """Return the exchange that says most: the larger one, if it came about."""
        best = first
        with self._step("bandwidth") as found:
            trip = self._round_trip_s
            if trip is None or "total" not in first.stages:
                what = "round trip" if trip is None else "server's own time (server-timing)"
                found("unknown", f"could not be measured: the {what} is not known")
                return best
            with suppress(LimitExceeded):  # of a larger one than the server has memory for
                best = probe.larger(first, trip)
            travelled = best.transfer_s(trip)
            size = best.answer_bytes
            if travelled is None:
                found(
                    "unknown",
                    f"could not be measured: {say_bytes(size)} came too fast to be told from noise",
                    answer_bytes=size,
                )
            else:
                is_bound = size < SURE_BYTES  # what is not accounted for counts as travel
                found(
                    "ok",
                    f"{'at least ' if is_bound else ''}{say_bytes(size / travelled)}/s: "
                    f"{say_bytes(size)} in {1000 * travelled:.1f} ms, server time and round trip "
                    "taken off",
                    bytes_per_s=round(size / travelled),
                    answer_bytes=size,
                    is_lower_bound=is_bound,
                    transfer_ms=round(1000 * travelled, 3),
                )
        return best

    def _throughput(self, best: Exchange | None, cost: Cost) -> Check:
        if best is None:
            return Check("skipped", "needs a supervision request that succeeds")
        speed = self._checks["bandwidth"].values.get("bytes_per_s")
        link = speed / cost.bytes_per_token if speed else None
        compute_s = best.compute_s
        compute = best.tokens / compute_s if compute_s else None
        bounds = {"link": link, "compute": compute}
        known = {name: bound for name, bound in bounds.items() if bound is not None}
        if not known:
            return Check("unknown", "could not be measured: neither link nor compute is known")
        bound_by = min(known, key=lambda name: known[name])
        words = ", ".join(
            f"{name} not measured" if bound is None else f"{name} {bound:,.0f}"
            for name, bound in bounds.items()
        )
        return Check(
            "ok",
            f"{known[bound_by]:,.0f} tokens/s from this server: min({words}), with batches of "
            f"{best.batch_size} x {best.sequence_length} random ids; padding counts as tokens",
            values={
                "link_tokens_per_s": link and round(link, 1),
                "compute_tokens_per_s": compute and round(compute, 1),
                "tokens_per_s": round(known[bound_by], 1),
                "bound_by": bound_by,
            },
        )

    @contextmanager
    def _step(self, name: str, **values: Any) -> Iterator[Callable[..., None]]:
        """Run a check: it is given what was found, or an error is."""

        def found(status: Status, detail: str, **values: Any) -> None:
            self._note(name, Check(status, detail, None, values))

        try:
            yield found
        except QueueFull as exc:
            self._note(name, Check("unknown", exc.detail, "check again when it is less busy"))
        except RemoteEagle3Error as exc:
            self._note(name, failed(exc, **values))

    def _note(self, name: str, check: Check) -> None:
        with self._lock:
            if not self.is_over:
                self._checks.setdefault(name, check)

    def _skip_rest(self, reason: str) -> None:
        for name in SERVER_CHECKS:
            if name not in self._checks:
                self._note(name, Check("skipped", reason))


def _encoding_check(cost: Cost, settings: ClientSettings) -> Check:
    chosen = "auto chooses it" if settings.encoding == "auto" else "as set"
    return Check(
        "ok",
        f"{cost.encoding} ({chosen} for a trainer on {settings.device.type}): "
        f"{cost.bytes_per_token:,.0f} bytes/token = aux {cost.aux_bytes:,.0f} + "
        f"{cost.row_bytes:,.0f} a supervised row x an assumed share of {cost.supervised_share:g}; "
        f"draft vocab of {cost.draft_vocab_size:,}",
        values={
            "encoding": cost.encoding,
            "aux_bytes_per_token": cost.aux_bytes,
            "row_bytes": cost.row_bytes,
            "supervised_share": cost.supervised_share,
            "draft_vocab_size": cost.draft_vocab_size,
            "bytes_per_token": round(cost.bytes_per_token, 1),
        },
    )
