"""What the benchmarks share: a served target, interleaved timings, tables and where they ran."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import uvicorn
from torch import Tensor

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import Eagle3TargetBatch
from eagle3_server import ServerSettings, TransformersTarget, create_app

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
sys.path.insert(0, str(REPOSITORY / "examples"))  # text, draft vocab and trainer come from there

MIB = 1024 * 1024
Seconds = dict[str, list[float]]


@contextmanager
def served(target: TransformersTarget, timeout_s: float = 60) -> Iterator[str]:
    """Serve a loaded target over TCP on a thread of this process; yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(target, ServerSettings()), timeout_keep_alive=600, log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout_s)
        listener.close()


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> Seconds:
    """Time the cases in turns, so that what else the machine does falls on all of them.

    Each case runs once unmeasured before the first round.
    """
    for case in cases.values():
        case()
    seconds: Seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def in_flight(
    backend: Any, batches: Iterable[tuple[Tensor, ...]], depth: int
) -> Iterator[Eagle3TargetBatch | Any]:
    """Yield the supervision of batches in order, `depth` requests in flight; ours or the peer's."""
    if isinstance(backend, RemoteEagle3Backend):
        yield from (answer for _, answer in backend.prefetch(batches, depth))
        return
    handles: deque[Any] = deque()  # as the peer's recipe does it
    for batch in batches:
        handles.append(backend.generate_batch_async(*batch))
        if len(handles) == depth:
            yield handles.popleft().result()
    while handles:
        yield handles.popleft().result()


def ratio(seconds: Seconds, numerator: str, denominator: str) -> dict[str, float]:
    """Return the median of the rounds' ratios, and their range."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    ratios = [above / below for above, below in pairs]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def spread(values: dict[str, float], *, median: bool = True) -> str:
    """Show what `ratio` gave: median (range), or the range alone."""
    shown = f" ({values['min']:.2f}-{values['max']:.2f})"
    return f"{values['median']:.2f}{shown}" if median else shown


@dataclass(frozen=True)
class Target:
    """A goal of ours: a ceiling, or with `at_least` a floor."""

    what: str
    limit: float
    unit: str = ""
    at_least: bool = False

    def row(self, value: float, spread: str = "") -> list[str]:
        """Return a table row with the verdict."""
        is_met = value >= self.limit if self.at_least else value <= self.limit
        digits = ",.0f" if self.unit else ".2f"
        if not self.unit and abs(value - self.limit) < 0.005:
            digits = ".3f"  # the verdict must be seen to be right
        shown = f"{value:{digits}}{self.unit}{spread}"
        limit = f"{'≥' if self.at_least else '≤'} {self.limit:{digits}}{self.unit}"
        return [self.what, shown, limit, "met" if is_met else "**missed**"]


def hardware() -> str:
    """Name the CPU as the tables do, without the host's name."""
    names, flags = set(), ""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            names.add(value.strip())
        elif key.strip() == "flags":
            flags = value
    avx512 = " (AVX-512)" if "avx512f" in flags else ""
    return f"{os.cpu_count()} cores of {', '.join(names) or platform.processor()}{avx512}"


def provenance(script: str, argv: Sequence[str]) -> dict[str, str]:
    """Say when, where and how a result was made; paths in the command are reduced to names."""
    shown = [Path(word).name if os.sep in word else word for word in argv]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{script}", *shown]),
        "hardware": hardware(),
        "threads": str(torch.get_num_threads()),
        "load_average_at_start": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def caption(made: dict[str, str]) -> str:
    """Return the provenance as a sentence."""
    quick = "--quick" in made["command"]
    return (
        ("Quick: it shows that everything runs, its numbers say nothing. " if quick else "")
        + f"Measured {made['date']} with `{made['command']}` on {made['hardware']}, "
        f"{made['threads']} threads, torch {made['torch']}, transformers {made['transformers']}; "
        f"load average at the start {made['load_average_at_start']}."
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options every benchmark of `run.py` has."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs, no more")


def publish(out: Path, name: str, title: str, results: dict[str, Any], parts: list[str]) -> None:
    """Print the tables; write them to `NAME.md` and the results to `NAME.json`.

    Args:
        out: directory, made if missing.
        name: of the files.
        title: heading of the page.
        results: `provenance` and the raw numbers of every round.
        parts: paragraphs and tables in order.
    """
    text = "\n\n".join([caption(results["provenance"]), *parts])
    print(text)
    write_json(out / f"{name}.json", results)
    (out / f"{name}.md").write_text(f"# {title}\n\n{text}\n", encoding="utf-8")


def insert(page: Path, block: str, begin: str, end: str) -> None:
    """Replace what stands between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    _, marker, tail = rest.partition(end)
    if not marker:
        raise SystemExit(f"{page.name} lacks the markers {begin} and {end}")
    page.write_text(f"{head}{begin}\n\n{block}\n\n{end}{tail}", encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
