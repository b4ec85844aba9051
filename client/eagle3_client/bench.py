"""`Bench`: what encodings and prefetch depths carry from here, measured as a trainer sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import httpx
import torch

from eagle3_client.bench_plan import FEWEST_BATCHES, BenchPlan
from eagle3_client.bench_report import BenchReport, Cell
from eagle3_client.bench_shares import Sample, Visit
from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_client.daemons import start_daemon
from eagle3_client.dispatch import Dispatcher
from eagle3_client.preflight_compare import failed
from eagle3_client.preflight_measure import parse_timing
from eagle3_client.preflight_report import Check
from eagle3_client.results import RemoteBatchHandle
from eagle3_client.submission import Submission
from eagle3_schemas import Eagle3TargetBatch, ModelInfo
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest, RemoteEagle3Error, TransportError
from eagle3_schemas.exchange import Supervision
from eagle3_schemas.frame import Frame

_ROUNDS = 3
_WARM_UP_REQUESTS = 2  # of an encoding: the first brings its head, the second tells the pace
_KEPT_SHARE = 0.95  # of the time limit; the rest is for a batch that takes longer than others did
_PATIENCE_S = 2.0


@dataclass(frozen=True)
class _Followed(Submission):
    """A submission that notes where its request is."""

    sample: Sample
    clock: Callable[[], float]

    def ask(self, connection: Connection, heard: Callable[[httpx.Headers], None]) -> Frame:
        sample, clock = self.sample, self.clock

        def note(headers: httpx.Headers) -> None:
            sample.heard_at = clock()
            heard(headers)

        sample.attempts += 1
        sample.sent_bytes += self.frame.nbytes
        sample.url, sample.asked_at = connection.url, clock()
        answer = connection.supervise_timed(self.frame, self.request_id, note, clock)
        sample.received_at = sample.asked_at + answer.elapsed_s
        sample.received_bytes += answer.body_bytes
        sample.stages = parse_timing(answer.server_timing)
        return answer.frame

    def batch(self, supervision: Supervision) -> Eagle3TargetBatch:
        batch = super().batch(supervision)
        self.sample.done_at = self.clock()
        return batch


class Bench:
    """Measures one fleet; use once.

    Args:
        settings: of the trainer; its encoding is not used, and its rows should be `loss_mask`, so
            that what travels does not depend on what the target makes of random ids.
        plan: what to measure.
        transport: httpx transport to use instead of the network's.
        clock: seconds that only grow.
        sleep: waits for so many of them.
    """

    def __init__(
        self,
        settings: ClientSettings,
        plan: BenchPlan,
        transport: httpx.BaseTransport | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._plan = settings, plan
        self._clock, self._sleep = clock, sleep
        self._dispatcher = Dispatcher(settings, transport)
        self._started = clock()
        self._batch_s: dict[str, float] = {}
        self._samples: list[Sample] = []
        self._failure: BaseException | None = None
        self._is_over = False
        self._report = BenchReport(settings, plan)

    def run(self) -> BenchReport:
        """Measure until all is, or the time limit; an interrupt ends it with what there is.

        Raises:
            InvalidRequest: a value of the plan that does not fit the target.
            RemoteEagle3Error: no server can be asked at all.
        """
        thread = start_daemon(self._run, name="eagle3-bench")  # a name may take long to look up
        try:
            thread.join(self._plan.time_limit_s)
        except KeyboardInterrupt:
            self._report.is_interrupted = True
        self._is_over = True
        self._report.unanswered = self._unanswered()
        self._dispatcher.close()
        thread.join(_PATIENCE_S)
        if self._failure is not None:
            raise self._failure
        for cell in self._report.cells:
            if cell.trouble is None and not cell.visits:
                is_limit = not self._report.is_interrupted
                cell.trouble = (
                    _left_out("it was over") if is_limit else Check("unknown", "interrupted")
                )
        self._report.elapsed_s = self._clock() - self._started
        if self._report.info is None and not self._report.is_interrupted:
            raise TransportError(
                f"no answer within --time-limit (time_limit_s), {self._plan.time_limit_s:g} s; see "
                "whether the servers are busy, or raise it",
                url=", ".join(self._settings.urls),
            )
        return self._report

    def _run(self) -> None:
        try:
            self._measure()
        except BaseException as exc:  # of the caller's thread, unless it closed the dispatcher
            if not self._is_over:
                self._failure = exc

    def _unanswered(self) -> str | None:
        """Say who is waited for longest now, if anyone is."""
        waiting = [each for each in self._samples if each.asked_at and not each.received_at]
        if not waiting:
            return None
        one = min(waiting, key=lambda sample: sample.asked_at)
        return f"{self._clock() - one.asked_at:.3g} s without an answer from {one.url}"

    def _measure(self) -> None:
        info = self._dispatcher.model_info()
        self._batches, self._vocab = self._plan.batches(info), self._plan.draft_vocab(info)
        self._dispatcher.register(self._vocab, info.vocab_size)
        self._report.describe(info, self._vocab, *self._batches[0][1:])
        encodings = self._plan.encodings or tuple(e for e in ENCODINGS if e in info.encodings)
        cells = [Cell(each, depth) for depth in self._plan.depths for each in encodings]
        self._report.cells = cells
        for encoding in encodings:
            self._warm_up(encoding, info, [cell for cell in cells if cell.encoding == encoding])
        self._visit_all([cell for cell in cells if cell.trouble is None])

    def _warm_up(self, encoding: str, info: ModelInfo, cells: list[Cell]) -> None:
        """Have an encoding ready and its pace known, or its cells say why not."""
        if encoding not in info.encodings:
            words = f"not offered: this target has {', '.join(info.encodings)}"
            return _give_up(cells, Check("skipped", words))
        samples: list[Sample] = []
        try:
            submit = self._submit(encoding, samples)
        except InvalidRequest as exc:
            return _give_up(cells, Check("skipped", exc.detail))
        try:
            for batch in self._batches[:_WARM_UP_REQUESTS]:
                submit(*batch).result()
        except RemoteEagle3Error as exc:
            if self._is_over:
                raise
            self._samples = []
            return _give_up(cells, failed(exc))
        self._batch_s[encoding] = samples[-1].latency_s + self._plan.step_s

    def _submit(
        self, encoding: str, samples: list[Sample]
    ) -> Callable[..., RemoteBatchHandle[Eagle3TargetBatch]]:
        """Return what submits a batch in that encoding, and adds its sample."""
        self._samples = samples
        settings = replace(self._settings, encoding=encoding)
        info = self._dispatcher.model_info()

        def submit(*batch: torch.Tensor) -> RemoteBatchHandle[Eagle3TargetBatch]:
            sample = Sample(tokens=int(batch[1].sum()), submitted_at=self._clock())
            built = Submission.build(settings, info, self._vocab, *batch)
            followed = _Followed(**vars(built), sample=sample, clock=self._clock)
            sample.encoded_at = self._clock()
            samples.append(sample)
            return self._dispatcher.submit(followed)

        return submit

    def _left_s(self) -> float:
        return self._started + _KEPT_SHARE * self._plan.time_limit_s - self._clock()

    def _visit_all(self, cells: list[Cell]) -> None:
        """Visit every cell in each round, so that no cell has the quiet part of the time."""
        if not cells:
            return
        rounds, count = self._rounds(cells)
        for number in range(rounds):
            for cell in cells:
                if cell.trouble is not None:
                    continue
                needed_s = max(self._visit_s(cell, count), cell.slowest_s)
                if needed_s > self._left_s():
                    if number == 0:
                        _give_up([cell], _left_out(f"it takes about {needed_s:.3g} s"))
                    continue
                started = self._clock()
                try:
                    cell.visits.append(self._visit(cell, count))
                except RemoteEagle3Error as exc:
                    if self._is_over:
                        raise
                    self._samples = []
                    _give_up([cell], failed(exc))
                cell.slowest_s = max(cell.slowest_s, self._clock() - started)

    def _rounds(self, cells: list[Cell]) -> tuple[int, int]:
        """Return how many rounds there is time for, and batches to measure in each visit."""
        steps, left_s = self._plan.steps, self._left_s()
        for rounds in range(min(_ROUNDS, steps), 0, -1):
            wanted = steps // rounds
            for count in range(wanted, min(wanted, FEWEST_BATCHES) - 1, -1):
                if rounds * sum(self._visit_s(cell, count) for cell in cells) <= left_s:
                    return rounds, count
        return 1, FEWEST_BATCHES  # and some cells are left out

    def _visit_s(self, cell: Cell, count: int) -> float:
        """Return about how long a visit takes, if no two requests overlap."""
        batches = 2 * cell.prefetch - 1 + _measured(cell, count)
        return batches * self._batch_s[cell.encoding]

    def _visit(self, cell: Cell, count: int) -> Visit:
        """Train on batches; measure from the last one that warms up to some `count` later.

        So many follow that the depth stays full to the end; they are waited for, or they would
        still keep the target busy while the next cell is measured.
        """
        samples: list[Sample] = []
        depth, count, waited_s = cell.prefetch, _measured(cell, count), 0.0
        batches = [self._batches[i % len(self._batches)] for i in range(2 * depth - 1 + count)]
        submit = self._submit(cell.encoding, samples)
        with self._dispatcher.prefetch(submit, batches, depth) as prefetch:
            for _ in range(depth):
                next(prefetch)
            started = self._clock()
            for _ in range(count):
                if self._plan.step_s:
                    self._sleep(self._plan.step_s)
                asked = self._clock()
                next(prefetch)
                waited_s += self._clock() - asked
            ended = self._clock()
            for _ in prefetch:
                pass
        measured = samples[depth : depth + count]
        others = samples[:depth] + samples[depth + count :]
        return Visit(started, ended, waited_s, measured, others)


def _measured(cell: Cell, count: int) -> int:
    """Return `count` or a little more: answers may come in bursts of the depth, so whole ones."""
    return -(-count // cell.prefetch) * cell.prefetch


def _give_up(cells: list[Cell], check: Check) -> None:
    for cell in cells:
        cell.trouble = check


def _left_out(reason: str) -> Check:
    return Check(
        "unknown",
        f"left out, by --time-limit: {reason}",
        "raise --time-limit (time_limit_s), or ask for fewer cells or smaller batches",
    )
