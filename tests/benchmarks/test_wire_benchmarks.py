"""The wire benchmarks and the one command, in small: they end, and the report says what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
MIB = 1 << 20

pytestmark = pytest.mark.slow


def run_all(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--out", str(out)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=900)


def load(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.timeout(1200)
def test_the_report_has_every_row_of_design_section_9(quick_run: tuple[Path, str]) -> None:
    out, output = quick_run
    report = load(out, "report")
    verdicts = {row[0]: row[3] for row in report["summary"]}
    unmeasured = {what for what, verdict in verdicts.items() if verdict.startswith("not measured")}
    # Their small settings have no batch of 80 ms, and none of the models that have a floor.
    assert unmeasured <= {
        "speed vs the peer's remote path, simulated",
        "speed vs the peer's remote path, CPU models",
        "time vs the peer's co-located path, served",
    }
    for words in (
        *("served at prefetch 2 / bare, simulated", "served at prefetch 2 / bare, `auto`"),
        *("sum of 8 trainers", "served, `hidden` / bare", "served, `hidden` / co-located"),
        *("peak above weights", "bytes/token", "TCP", "Unix"),
        *("encode, ms", "decode, ms", "checksum", "27 % real tokens", "H100"),
    ):
        assert any(words in what for what in verdicts), words
    page = (out / "report.md").read_text()
    assert page.index("| what | measured | target | verdict |") < page.index("## 1. ")
    positions = [page.index(f"## {number}. ") for number in range(1, 8)]
    assert positions == sorted(positions)
    assert "| verdict |" in output
    for one in report["benchmarks"].values():
        assert one["problem"] in (None, "not measurable without a GPU")
        if one["problem"] is None:
            assert one["results"]["provenance"]["command"]


@pytest.mark.timeout(1200)
def test_transport_times_every_path(quick_run: tuple[Path, str]) -> None:
    rounds = load(quick_run[0], "transport")["rounds"]
    assert set(rounds) == {"1", "4"}
    for measured in rounds.values():
        names = set(measured)
        for transport in ("TCP", "Unix socket", "TLS"):
            assert {f"ours, {transport}", f"ours, {transport} + checksum"} <= names
        assert {"raw TCP", "raw Unix socket", "httpx `.content`", "peer: `requests`"} <= names
        for values in measured.values():
            assert len(values["seconds"]) == len(values["cpu_seconds"]) == 2
            assert all(seconds > 0 for seconds in values["seconds"])


@pytest.mark.timeout(1200)
def test_links_are_not_exceeded_and_bytes_are_those_of_the_design(
    quick_run: tuple[Path, str],
) -> None:
    links = load(quick_run[0], "links")["links"]
    assert set(links) == {"1", "2.5", "10"}
    for link in links.values():
        cases = link["cases"]
        assert len(cases) == 6
        for name, case in cases.items():
            # What the relay lets through before it paces, and the sockets' own buffers.
            free = link["gigabits"] * 1e9 / 8 * 0.005 + 8 * MIB
            for seconds in case["seconds"]:
                assert case["bytes"] - free <= link["gigabits"] * 1e9 / 8 * seconds, name
        sizes = {name: case["bytes"] / max(case["tokens"], 1) for name, case in cases.items()}
        # The sizes of the parts; a header of a kilobyte is much of so small a batch.
        assert sizes["nemo-automodel 0.7.0"] == pytest.approx(152_593, rel=0.01)
        assert sizes["ours, `hidden`"] == pytest.approx(29_493, rel=0.05)
        assert sizes["ours, `logits`"] == pytest.approx(62_978, rel=0.05)
        assert sizes["ours, `probs`"] == pytest.approx(101_378, rel=0.05)
        assert sizes["ours, `hidden`, aux fp8"] < 0.65 * sizes["ours, `hidden`"]


@pytest.mark.timeout(120)
def test_the_relay_keeps_to_its_rate(tmp_path: Path) -> None:
    """Eight MiB at 0.2 Gb/s cannot take less than a third of a second, whatever the machine."""
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from wire import child\nfrom wire_raw import RawClient\n"
        "with child('wire_servers.py', 'raw', '--mib', '8') as raw:\n"
        "    port = str(raw['port'])\n"
        "    with child('relay.py', '--gigabits', '0.2', '--ports', port) as relay:\n"
        "        with RawClient(relay['ports'][port], 8) as client:\n"
        "            started = time.perf_counter()\n"
        "            got = client.receive(8)\n"
        "            print(time.perf_counter() - started, int(got.count_nonzero()))\n"
    )
    command = [sys.executable, "-c", program, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    seconds, filled = done.stdout.split()
    assert float(seconds) > 8 * MIB * 8 / 0.2e9 - 0.02  # less its burst of 5 ms
    assert int(filled) > 7 * MIB  # random bytes, few of them zero


@pytest.mark.timeout(300)
def test_a_benchmark_that_fails_is_reported_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "links.json").write_text("{}")  # of an earlier run, which must not be taken for it
    process = run_all(tmp_path, "--only", "links", "codec", "--timeout-s", "0.01")
    assert process.returncode == 1
    report = load(tmp_path, "report")
    for name in ("links", "codec"):
        assert report["benchmarks"][name]["problem"] == "it did not end in 0.01 s"
    assert not (tmp_path / "links.json").exists()
    assert "not measured: codec.py: it did not end" in (tmp_path / "report.md").read_text()
    assert "not measured: head.py: not run" in (tmp_path / "report.md").read_text()
