"""`run_preflight`: checks every server and the fleet before a run, within a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

import httpx
import torch

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.daemons import start_daemon
from eagle3_client.preflight_compare import Expectation, failed
from eagle3_client.preflight_report import FLEET_CHECKS, Check, PreflightReport
from eagle3_client.preflight_server import ServerCheck
from eagle3_client.resolve import addresses_of
from eagle3_client.sameness import ask_numbers, check_same, compare_numbers
from eagle3_schemas import ModelInfo
from eagle3_schemas.errors import FingerprintMismatch, InvalidRequest, RemoteEagle3Error
from eagle3_schemas.tokenizer import HasVocab

DEFAULT_TIME_LIMIT_S = 60.0
DEFAULT_SUPERVISED_SHARE = 0.6

_RESOLVE_SHARE = 0.2
_ASK_SHARE = 0.4
_MEASURE_SHARE = 0.75  # of the time left; the rest is for the fleet's numbers


class _Unclosed(httpx.BaseTransport):
    """A transport of the caller's, which outlives the connections that use it."""

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self._inner = inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._inner.handle_request(request)


def run_preflight(
    settings: ClientSettings,
    *,
    tokenizer: HasVocab | None = None,
    expect_aux_layer_ids: Sequence[int] | None = None,
    draft_vocab_size: int | None = None,
    supervised_share: float = DEFAULT_SUPERVISED_SHARE,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    transport: httpx.BaseTransport | None = None,
) -> PreflightReport:
    """Check servers; nothing is retried, and nothing outlives `time_limit_s`.

    Servers are asked side by side, and measured one after the other, which then work for a few
    seconds each. Needs no device but the CPU, whatever `settings.device` says.

    Args:
        settings: of the trainer that is to run.
        tokenizer: compared with the served checkpoint's, if given.
        expect_aux_layer_ids: layer outputs the draft was, or is to be, trained on.
        draft_vocab_size: D, for the bytes per token; None is 32000, or V if that is less.
        supervised_share: assumed share of the tokens that are supervised, in (0, 1].
        time_limit_s: seconds after which what has not answered has failed.
        transport: httpx transport to use instead of the network's.

    Raises:
        InvalidRequest: an argument that cannot work, with what would.
    """
    if not 0 < supervised_share <= 1:
        raise InvalidRequest(f"supervised_share must be in (0, 1]; got {supervised_share}")
    if not 0 < time_limit_s < 1e6:
        raise InvalidRequest(f"time_limit_s must be > 0 and finite, seconds; got {time_limit_s}")
    if draft_vocab_size is not None and draft_vocab_size < 1:
        raise InvalidRequest(f"draft_vocab_size must be >= 1; got {draft_vocab_size}")
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise InvalidRequest(
            f"tokenizer must have get_vocab(), as transformers' do; got {type(tokenizer).__name__}"
        )
    expectation = Expectation(
        settings,
        tokenizer,
        None if expect_aux_layer_ids is None else tuple(expect_aux_layer_ids),
        draft_vocab_size,
        supervised_share,
    )
    return _Preflight(settings, expectation, time_limit_s, transport).run()


class _Preflight:
    """One run."""

    def __init__(
        self,
        settings: ClientSettings,
        expectation: Expectation,
        time_limit_s: float,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self._settings, self._expectation = settings, expectation
        self._time_limit_s, self._transport = time_limit_s, transport
        self._started = time.monotonic()
        self._fleet: dict[str, Check] = {}

    def run(self) -> PreflightReport:
        servers = [
            ServerCheck(self._connect(url, address), self._expectation)
            for url, address in self._resolved()
        ]
        try:
            asked = _together([server.ask for server in servers], _ASK_SHARE * self._left_s())
            self._give_up(server for server, done in zip(servers, asked, strict=True) if not done)
            for place, server in enumerate(servers):
                share = 1 if len(servers) == 1 else _MEASURE_SHARE / (len(servers) - place)
                (is_done,) = _together([server.measure], share * self._left_s())
                self._give_up(() if is_done else (server,))  # or it would disturb the next
            _together([lambda: self._compare(servers)], self._left_s())
            self._give_up(servers)
            return PreflightReport(
                tuple(server.report() for server in servers),
                self._fleet_checks(len(servers)),
                {"version": version("eagle3-remote"), "torch_version": torch.__version__},
                time.monotonic() - self._started,
            )
        finally:
            for server in servers:
                server.connection.close()

    def _left_s(self) -> float:
        return max(self._started + self._time_limit_s - time.monotonic(), 0.0)

    def _connect(self, url: str, address: str | None) -> Connection:
        transport = self._transport
        return Connection(
            url,
            address=address,
            token=self._settings.token,
            timeout_s=min(self._settings.timeout_s, self._time_limit_s),
            transport=None if transport is None else _Unclosed(transport),
        )

    def _resolved(self) -> list[tuple[str, str | None]]:
        """Name every server: a name of several addresses stands for as many."""
        urls = self._settings.urls
        found: dict[str, tuple[str | None, ...]] = {}

        def look_up(url: str) -> None:
            try:
                found[url] = addresses_of(url)
            except OSError:
                found[url] = (None,)  # its connection says so

        if self._transport is None:
            jobs = [lambda url=url: look_up(url) for url in urls]
            _together(jobs, _RESOLVE_SHARE * self._time_limit_s)
        return [(url, address) for url in urls for address in found.get(url, (None,))]

    def _give_up(self, servers: Iterable[ServerCheck]) -> None:
        for server in servers:
            server.give_up(self._time_limit_s)

    def _fleet_checks(self, count: int) -> dict[str, Check]:
        late = Check(
            "failed",
            f"no answer within the check's time limit of {self._time_limit_s:g} s",
            "raise --time-limit (time_limit_s)",
        )
        single = Check("skipped", "one server has none to differ from")
        return {name: self._fleet.get(name, late if count > 1 else single) for name in FLEET_CHECKS}

    def _compare(self, servers: list[ServerCheck]) -> None:
        """Compare the servers that say what they serve: in words, then in numbers."""
        if len(servers) == 1:
            return
        known = [(each.connection, each.info) for each in servers if each.info is not None]
        values = {"servers": len(servers), "compared": len(known)}
        if len(known) < 2:
            words = f"{len(known)} of {len(servers)} servers said what it serves"
            for name in FLEET_CHECKS:
                self._fleet[name] = Check("skipped", words, None, values)
            return
        (first, info), *others = known
        differing = []
        for connection, other in others:
            try:
                check_same(info, first.url, other, connection.url, self._settings)
            except FingerprintMismatch as exc:
                differing.append(failed(exc))
        if differing:
            words = "; ".join(check.detail for check in differing)
            self._fleet["same_target"] = Check("failed", words, differing[0].remedy, values)
            words = "not compared: they do not serve the same"
            self._fleet["same_numbers"] = Check("skipped", words, None, {"compared": 0})
            return
        words = f"{len(known)} of {len(servers)} servers serve {info.fingerprint}"
        self._fleet["same_target"] = Check("ok", words, None, values)
        well = [
            (each.connection, each.info)
            for each in servers
            if each.info is not None and not each.is_over
        ]
        self._fleet["same_numbers"] = self._compare_numbers(well)

    def _compare_numbers(self, known: list[tuple[Connection, ModelInfo]]) -> Check:
        """Have them compute one batch, as a backend does when it meets its servers."""
        values = {"compared": len(known)}
        if len(known) < 2:
            return Check("skipped", "fewer than two servers answered in time", None, values)
        first, info = known[0]
        try:
            expected = ask_numbers(first, info, self._settings)
            if expected is None:
                words = f"could not be compared: {first.url} fails on random ids; its log says why"
                return Check("unknown", words, None, values)
            for connection, _ in known[1:]:
                compare_numbers(expected, connection, info, self._settings)
        except RemoteEagle3Error as exc:
            return failed(exc, **values)
        return Check("ok", f"{len(known)} servers compute the same, within rounding", None, values)


def _together(jobs: Sequence[Callable[[], None]], timeout_s: float) -> list[bool]:
    """Run jobs side by side; return which ended in time. The others are left behind.

    Not in a pool, which would wait at exit: a name may take minutes not to resolve.
    """
    deadline = time.monotonic() + timeout_s
    failures: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as exc:
            failures.append(exc)

    threads = [start_daemon(run, job, name="eagle3-preflight") for job in jobs]
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    if failures:
        raise failures[0]
    return [not thread.is_alive() for thread in threads]
