"""The benchmarks that need the peer, at no size: they end, and their tables hold what they must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def read(out: Path, name: str) -> tuple[dict[str, Any], str]:
    """Return what a quick run wrote: its JSON and its page."""
    page = (out / f"{name}.md").read_text()
    return json.loads((out / f"{name}.json").read_text()), page


def test_end_to_end(quick_run: tuple[Path, str]) -> None:
    content, page = read(quick_run[0], "end_to_end")
    quick = content["targets"]["quick"]
    level = quick["levels"]["0.6"]
    assert set(level["equality"]) == {"aux_hidden_states", "position_mask", "target_probs"}
    assert not any(level["equality"].values()), "bit-equal to the peer"
    tokens, hidden_size, draft_vocab_size, dtype_bytes = 2 * 64, 64, 900, 4
    supervised = 2 * 38  # of 64 columns the last 38 carry a loss
    aux = 3 * hidden_size * tokens * dtype_bytes
    payload = {
        "peer": aux + tokens * (4 * draft_vocab_size + 1 + 8 + 8),
        "ours, auto": aux + supervised * 4 * draft_vocab_size + tokens // 8,
        "ours, hidden": aux + supervised * dtype_bytes * hidden_size + tokens // 8,
    }
    for path, expected in payload.items():
        for one in level["rounds"][path]:
            assert expected < one["received"] < expected + 4096, path  # heads of frame and HTTP
    for path, rounds in level["rounds"].items():
        assert len(rounds) == 2
        assert all(one["seconds"] > 0 for one in rounds), path
    assert all(peak > 100 * 2**20 for peak in level["peak"].values())  # torch alone is more
    assert len(level["peak"]) == len(level["rounds"]) + 2  # and two servers
    assert set(quick["overlap"]) == {"bare", "served"}
    assert "bit-equal" in page
    assert "served at prefetch 2 / bare" in page


def test_overlap(quick_run: tuple[Path, str]) -> None:
    content, page = read(quick_run[0], "overlap")
    cases = content["seconds"]["20"]
    assert len(cases) == 1 + 4 + 4 + 1
    for case, seconds in cases.items():
        assert len(seconds) in (1, 2), case
        assert all(one > 0 for one in seconds), case
    assert len(cases["ours, 1 client, prefetch 2"]) == 2
    for words in ("sum of 8 trainers / bare", "served at prefetch 2 / bare", "≥ 0.97"):
        assert words in page
