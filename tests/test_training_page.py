"""docs/training.md does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import training_page as page

from eagle3_client import FingerprintMismatch


@pytest.fixture
def names(live_server: Any, build_model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader of the page has already, and in `steps` what was trained on."""
    monkeypatch.setenv("EAGLE3_URLS", live_server(build_model("llama")))
    steps: list[Any] = []
    return {
        "device": "cpu",
        "selected_token_ids": torch.arange(20),
        "selected_token_mask": torch.arange(131) < 20,
        "batches": page.batches(7),
        "step": steps.append,
        "steps": steps,
    }


def test_one_process(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    page.run("## One process", names)
    assert len(names["steps"]) == 7
    assert "bottleneck" in capsys.readouterr().out


def test_resume(
    names: dict[str, Any], live_server: Any, build_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, Any] = {"step": 4}
    names |= {"load_checkpoint": lambda: saved, "save_checkpoint": saved.update}
    page.run("## Resume", names)
    assert len(names["steps"]) == 3
    assert saved["step"] == 7
    assert len(saved["target"]) == 32
    saved["step"] = 0
    page.run("## Resume", names)  # the same target
    monkeypatch.setenv("EAGLE3_URLS", live_server(build_model("llama", seed=1)))
    with pytest.raises(FingerprintMismatch, match="run began with"):
        page.run("## Resume", names)


def test_a_fleet(live_server: Any, build_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    urls = [live_server(build_model("llama")) for _ in range(2)]
    names = page.run("## A fleet", {"urls": urls})
    assert capsys.readouterr().out.split()[1] == "4"
    names["target"].close()


def test_the_same_host(
    live_server: Any, build_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = live_server(build_model("llama"), unix=tmp_path / "eagle3.sock")
    code = page.code_of("## The same host")
    assert code.count("unix:///run/eagle3.sock") == 1
    names: dict[str, Any] = {}
    exec(code.replace("unix:///run/eagle3.sock", url), names)
    assert names["target"].model_info().model_id == "tiny"
    names["target"].close()
