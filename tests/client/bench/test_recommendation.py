"""What a bench recommends of the cells it has measured, and what it says against it."""

from __future__ import annotations

from tests.client.bench.simulation import PLAN, pipeline, settings_of

from eagle3_client.bench_report import BenchReport, Cell


def report_of(*cells: tuple[str, int, float, int], rounds: int = 2) -> BenchReport:
    """Cells as encoding, depth, seconds a batch, received bytes a token."""
    report = BenchReport(settings_of(), PLAN)
    for encoding, depth, seconds, nbytes in cells:
        visit = pipeline(depth, compute=seconds, head=0, copy=0, link=0, host=0, count=10)
        for sample in visit.delivered:
            sample.received_bytes = 10 * nbytes
        report.cells.append(Cell(encoding, depth, None, [visit] * rounds))
    return report


def test_the_least_prefetch_within_3_percent_is_recommended() -> None:
    report = report_of(
        ("probs", 1, 0.1, 90), ("hidden", 1, 0.095, 30), ("probs", 2, 0.0915, 90),
        ("hidden", 2, 0.0925, 30), ("hidden", 4, 0.09, 30),
    )  # fmt: skip
    chosen = report.recommended
    assert chosen is not None
    assert (chosen[0].encoding, chosen[0].prefetch) == ("hidden", 2)
    assert "encoding hidden, prefetch 2: 108 tokens/s" in report.recommendation()
    assert "the target's forward (100% of the time)" in report.recommendation()
    assert "; more prefetch gains nothing" in report.recommendation()
    report.cells.pop()
    assert "(100% of the time), so more prefetch gains nothing" in report.recommendation()


def test_of_a_pipeline_that_is_not_full_a_deeper_prefetch_is_recommended() -> None:
    report = BenchReport(settings_of(), PLAN)
    report.cells.append(Cell("probs", 1, None, [pipeline(1, compute=0.06, link=0.05)]))
    assert "nothing is full, so try --prefetch 2" in report.recommendation()
    report.cells[0].visits[:] = [pipeline(1, compute=0.001, link=0.5)]
    assert "the link (9" in report.recommendation()
    assert "requests may overlap there, so try --prefetch 2" in report.recommendation()
    report.cells[0].visits[:] = [pipeline(1, compute=0.06, link=0.05)]
    report.cells[0].visits.append(pipeline(1, compute=0.01, link=0.05))
    assert "but rounds differ by up to 4" in report.recommendation()


def test_what_was_measured_once_is_recommended_only_for_want_of_another_and_says_so() -> None:
    once = "; measured in one round only: repeat with a longer --time-limit, or fewer --encodings"
    report = report_of(("probs", 1, 0.1, 90), ("hidden", 2, 0.098, 30), ("hidden", 4, 0.05, 30))
    for cell in report.cells[::2]:
        cell.visits.pop()
    assert "encoding hidden, prefetch 4" in report.recommendation()
    assert once in report.recommendation()
    report.cells.pop()
    assert "encoding hidden, prefetch 2" in report.recommendation()
    assert once not in report.recommendation()


def test_a_cell_whose_rounds_differ_casts_doubt_on_all() -> None:
    report = report_of(("probs", 1, 0.1, 90), ("hidden", 1, 0.2, 30))
    assert "rounds differ" not in report.recommendation()
    report.cells[1].visits.append(pipeline(1, compute=0.1, count=10))
    assert "encoding probs" in report.recommendation()
    assert "; but rounds differ by up to" in report.recommendation()
