"""Each benchmark, run with tiny settings: it ends, and its tables hold what they must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EAGLE3_")}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_fidelity_table(tmp_path: Path) -> None:
    """On the real target, whose weights the demo's tests download too."""
    page, results = tmp_path / "page.md", tmp_path / "fidelity.json"
    markers = ("<!-- fidelity: begin, generated -->", "<!-- fidelity: end -->")
    page.write_text(f"before\n\n{markers[0]}\nold\n{markers[1]}\n\nafter\n")
    arguments = ["--batches", "1", "--batch-size", "2", "--sequence-length", "64"]
    arguments += ["--draft-vocab-size", "512", "--draft-steps", "1"]
    if checkpoint := os.environ.get("SMOLLM2_CHECKPOINT"):
        arguments += ["--checkpoint", checkpoint]
    run("fidelity.py", *arguments, "--docs", str(page), "--results", str(results))

    text = page.read_text()
    assert text.startswith(f"before\n\n{markers[0]}\n\nMeasured ")
    assert text.endswith(f"{markers[1]}\n\nafter\n")
    assert "old" not in text
    targets = json.loads(results.read_text())["targets"]
    assert set(targets) == {"float32", "bfloat16"}
    for name, target in targets.items():
        rows = {(row["encoding"], row["aux_dtype"]): row for row in target["rows"]}
        assert len(rows) == 6
        for (encoding, aux_dtype), row in rows.items():
            assert row["rows"] > 20  # something was compared
            # On one machine and in one shape, every encoding rebuilds the same bits.
            assert row["probs_max_error"] == 0, encoding
            assert row["top1_kept"] == 1
            lossy = aux_dtype != "model"
            assert (0.005 if lossy else 0) <= row["aux_median_relative_error"] <= 0.03 * lossy
            assert row["gradient_cosine"] == 1 if not lossy else 0.99 < row["gradient_cosine"] < 1
        size = {key: row["bytes_per_token"] for key, row in rows.items()}
        assert size["hidden", "model"] > size["hidden", "float8_e4m3"]
        assert rows["hidden", "model"]["bytes_per_row"] == 576 * (4 if name == "float32" else 2)
        assert rows["probs", "model"]["bytes_per_row"] == 4 * 512
        default = target["default_against_exact"]
        assert default["rows"] > 10
        assert default["aux_median_relative_error"] < (1e-4 if name == "float32" else 0.1)


def test_head_tables(quick_run: tuple[Path, str]) -> None:
    results = quick_run[0] / "head.json"
    output = results.with_suffix(".md").read_text()
    content = json.loads(results.read_text())
    peaks = {
        (row["path"], row["encoding"], row["T"], row["dtype"]): row["peak_mib"]
        for row in content["peak_mib"]
        if row["malloc"] == "default"
    }
    full = [peaks["colocated", "hidden", length, "float32"] for length in (64, 128)]
    rows = [peaks["head", "hidden", length, "float32"] for length in (64, 128)]
    assert full[1] > 2 * 128 * 20011 * 4 / 2**20  # B x T x V floats at least
    assert full[1] > 1.5 * full[0]
    assert rows[1] < full[1] / 2
    assert set(content["ratios"]) == {
        "served, `hidden` / bare",
        "served, `hidden` / co-located",
        "trimmed / not, SmolLM2's shape",
        "trimmed / not, the shape above",
    }
    assert all(0 < spread["min"] <= spread["max"] for spread in content["ratios"].values())
    for words in ("bytes/token, `hidden`, 8B", "peak above weights", "Measured "):
        assert words in output
    assert results.with_suffix(".md").read_text().startswith("# Rows-only head\n")


def test_gpu_command_in_small_on_the_cpu(tmp_path: Path) -> None:
    """No GPU is needed to see that it runs: the same code on another device."""
    out = run("gpu.py", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert "| served, prefetch 2 |" in out
    equality = json.loads((tmp_path / "gpu.json").read_text())["equality"]
    assert set(equality) == {
        "probs, exact=True", "logits, exact=True", "logits, exact=False", "hidden, exact=False",
    }  # fmt: skip
    for found in equality.values():
        assert found["aux_bit_equal"]
        assert found["masks_that_differ"] == 0
        assert found["probs_bit_equal"]


def test_hiding_table(quick_run: tuple[Path, str]) -> None:
    text = (quick_run[0] / "hiding.md").read_text()
    assert "wait at prefetch 2 / step of 60 ms, target of 20 ms" in text
    shares = json.loads((quick_run[0] / "hiding.json").read_text())["shares"]
    assert sorted(shares) == ["(0.06, 1)", "(0.06, 2)", "(0.06, 4)"]
    assert all(0 <= share < 1 for values in shares.values() for share in values)


def test_fingerprint_table(quick_run: tuple[Path, str]) -> None:
    text = (quick_run[0] / "fingerprint.md").read_text()
    assert "21 tensors of 3.0 GB on the CPU" in text
    seconds = json.loads((quick_run[0] / "fingerprint.json").read_text())["seconds"]
    assert len(seconds) == 5
    assert min(seconds) > 0


def test_packing_table(quick_run: tuple[Path, str]) -> None:
    text = (quick_run[0] / "packing.md").read_text()
    assert "packed, 8 documents a row / unpacked" in text
    seconds = json.loads((quick_run[0] / "packing.json").read_text())["seconds"]
    assert set(seconds) == {
        "unpacked", "1 documents", "1 masked", "8 documents", "8 masked"
    }  # fmt: skip
