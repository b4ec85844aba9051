"""Run every benchmark, one after another in processes of their own, and join what they say.

Run as ``python benchmarks/run.py``, with nemo-automodel 0.7.0 installed (``make test-all`` does
that). It goes on past a benchmark that fails, and then exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import add_output_options, caption, markdown_table, provenance, write_json

HERE = Path(__file__).resolve().parent
NO_GPU = "not measurable without a GPU"


@dataclass(frozen=True)
class Script:
    """A benchmark of this folder: `NAME.py` that writes `NAME.json` and `NAME.md`."""

    name: str
    title: str
    quick: tuple[str, ...] = ("--quick",)


SCRIPTS = (
    Script("end_to_end", "1. End to end against the peer"),
    Script("overlap", "2. Overlap on a simulated GPU"),
    Script("transport", "3. Transport"),
    Script("codec", "4. Codec"),
    Script("head", "5. Rows-only head"),
    Script("links", "6. Links"),
    Script("load", "7. Eight trainers at once"),
    Script("hiding", "8. Prefetch that hides the target"),
    Script("fingerprint", "9. Fingerprint"),
    Script("packing", "10. Packed rows"),
    Script("sizing", "11. Sizes"),
    Script("gpu", "12. On a GPU"),
)


@dataclass(frozen=True)
class Goal:
    """A goal of ours and where its numbers come from."""

    what: str
    target: str
    script: str
    words: str
    """What the verdicts of that script that belong here have in their first column."""


GOALS = (
    Goal("served at prefetch 2 / bare, simulated 80 ms", "≥ 0.97", "overlap", "served at pre"),
    Goal("served at prefetch 2 / bare, real CPU model", "≥ 0.95", "end_to_end", "served at pre"),
    Goal("sum of 8 trainers / bare, simulated 80 ms", "≥ 0.95", "overlap", "sum of 8"),
    Goal("served / (backbone + one matmul of the rows)", "≤ 1.08", "head", "/ bare"),
    Goal("speed vs the peer's remote path, CPU models", "≥ 1.8, ≥ 2.05", "end_to_end", "speed aga"),
    Goal("speed vs the peer's remote path, simulated", "≥ 12", "overlap", "speed against the peer"),
    Goal("time vs the peer's co-located path, served", "≤ 0.65", "end_to_end", "peer's co-loc"),
    Goal("time vs the co-located path, head alone", "≤ 0.65", "head", "/ co-located"),
    Goal("peak memory above weights, H1024/V128k", "≤ 180 MiB", "head", "peak above weights"),
    Goal("bytes/token, `hidden`, 60 % supervised", "≤ 29,500; ≤ 4,200", "head", "bytes/token"),
    Goal("client receive / raw socket loop", "TCP ≥ 1.0, Unix ≥ 1.7", "transport", "receive"),
    Goal("262 MiB frame", "≤ 13 ms, ≤ 1 ms, ≥ 10 GB/s", "codec", "frame"),
    Goal("padded batch, 27 % real tokens", "≤ 0.33", "head", "trimmed / not"),
    Goal("`/healthz` during CPU forwards, p99", "≤ 50 ms", "load", "healthz"),
    Goal(
        "wait for the target at prefetch 2, the faster side", "≤ 0.05 of a step", "hiding", "wait"
    ),
    Goal("fingerprint of an 8B-shaped model", "≤ 5 s", "fingerprint", "fingerprint"),
    Goal("packed rows / the same tokens unpacked", "≤ 1.2", "packing", "packed"),
    Goal("trainers that one server feeds", "≥ 0.95 of alone", "sizing", "speed of each"),
    Goal("one H100/H200, 8B-shaped bf16 model", "≥ 27,000 tokens/s", "gpu", "tokens/s"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [script.name for script in SCRIPTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="the rest keeps its last results"
    )
    parser.add_argument("--timeout-s", type=float, default=3600, help="of each benchmark")
    add_output_options(parser)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    made = provenance("run.py", words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available()
    runs = {
        script.name: run(script, arguments)
        if script.name in arguments.only and (has_gpu or script.name != "gpu")
        else last_results(script, arguments)
        for script in SCRIPTS
    }
    rows = summary(runs)
    text = "\n\n".join(["# Benchmarks", caption(made), *summarised(rows, runs), *pages(runs)])
    (arguments.out / "report.md").write_text(text + "\n", encoding="utf-8")
    write_json(arguments.out / "report.json", report(made, rows, runs))
    print("\n\n".join(summarised(rows, runs)))
    return 0 if all(one["problem"] in (None, NO_GPU, "not run") for one in runs.values()) else 1


def run(script: Script, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one benchmark; return its results, its page, how long it took and what went wrong."""
    command = [sys.executable, str(HERE / f"{script.name}.py"), "--out", str(arguments.out)]
    command += script.quick if arguments.quick else ()
    results, page = (arguments.out / f"{script.name}{suffix}" for suffix in (".json", ".md"))
    for stale in (results, page):  # an old one must not pass for this run's
        stale.unlink(missing_ok=True)
    print(f"{script.name}.py …", file=sys.stderr, flush=True)
    # Settings of a server or client of the caller's would change what is measured.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EAGLE3_")}
    started, problem = time.monotonic(), None
    try:
        finished = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, timeout=arguments.timeout_s
        )
    except subprocess.TimeoutExpired:
        problem = f"it did not end in {arguments.timeout_s:g} s"
    else:
        if finished.returncode:
            problem = f"it ended with exit code {finished.returncode}"
        elif not (results.exists() and page.exists()):
            problem = f"it wrote no {results.name} or no {page.name}"
    if problem is not None:
        print(f"{script.name}.py: {problem}", file=sys.stderr, flush=True)
    return {
        "title": script.title,
        "seconds": time.monotonic() - started,
        "problem": problem,
        "results": json.loads(results.read_text()) if problem is None else None,
        "page": page.read_text(encoding="utf-8") if problem is None else None,
    }


def last_results(script: Script, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the benchmark wrote into this folder before, or on a machine with a GPU."""
    results, page = (arguments.out / f"{script.name}{suffix}" for suffix in (".json", ".md"))
    found = results.exists() and page.exists()
    if found:  # quick numbers must not stand among real ones, nor the other way round
        command = json.loads(results.read_text())["provenance"]["command"]
        found = ("--quick" in command) == arguments.quick
    missing = NO_GPU if script.name == "gpu" else "not run"
    return {
        "title": script.title,
        "seconds": 0.0,
        "problem": None if found else missing,
        "results": json.loads(results.read_text()) if found else None,
        "page": page.read_text(encoding="utf-8") if found else None,
    }


def summary(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return each goal with each number measured for it."""
    rows = []
    for goal in GOALS:
        one = runs.get(goal.script, {"problem": "not run"})
        if one["problem"] is not None:
            rows.append([goal.what, "-", goal.target, unmeasured(goal.script, one)])
            continue
        found = [row for row in one["results"].get("verdicts", []) if goal.words in row[0]]
        if not found:
            rows.append([goal.what, "-", goal.target, f"not measured by {goal.script}.py"])
        rows += found
    return rows


def unmeasured(name: str, one: dict[str, Any]) -> str:
    return NO_GPU if one["problem"] == NO_GPU else f"not measured: {name}.py: {one['problem']}"


def summarised(rows: list[list[str]], runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the summary's paragraphs."""
    count = sum(row[3] == "met" for row in rows)
    missed = sum("missed" in row[3] for row in rows)
    ran = {name: one["seconds"] for name, one in runs.items() if one["seconds"]}
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in ran.items())
    return [
        f"Our goals: {count} met, {missed} missed, "
        f"{len(rows) - count - missed} not measured. Ratios are medians of interleaved rounds with "
        f"their range. {f'Took: {took}. ' if took else ''}Each part says when it was measured.",
        markdown_table(["what", "measured", "target", "verdict"], rows),
    ]


def pages(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return each benchmark's page under its number."""
    found = []
    for name, one in runs.items():
        body = f"{unmeasured(name, one)}."
        if one["problem"] is None:
            body = one["page"].partition("\n\n")[2]  # without its heading
        found.append(f"## {one['title']}\n\n{body.strip()}")
    return found


def report(
    made: dict[str, str], rows: list[list[str]], runs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return what `report.json` holds: the summary, and each benchmark's raw numbers."""
    kept = ("seconds", "problem", "results")
    benchmarks = {name: {key: one[key] for key in kept} for name, one in runs.items()}
    return {"provenance": made, "summary": rows, "benchmarks": benchmarks}


if __name__ == "__main__":
    sys.exit(main())
