"""The README's trainer code, its two hosts, and the test commands it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.shells import run, serving

from eagle3_client import RemoteEagle3Backend, Unauthorized


def test_the_trainer_code_runs_as_printed(
    live_server: Any, model: Any, documented: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = documented
    assert code.count("http://target-host:8001") == 1
    assert len([line for line in code.splitlines() if line.strip()]) <= 9
    vocab_size = model.config.vocab_size
    selected_token_ids = torch.randperm(vocab_size)[:50]
    selected_token_mask = torch.zeros(vocab_size, dtype=torch.bool)
    selected_token_mask[selected_token_ids] = True
    seen: list[dict[str, torch.Tensor]] = []

    class Trainer:
        loss = torch.zeros(())

        def __call__(self, **inputs: torch.Tensor) -> Trainer:
            seen.append(inputs)
            return self

    input_ids = torch.randint(vocab_size, (2, 11))
    ones = torch.ones_like(input_ids)
    scope: dict[str, Any] = {
        "device": "cpu",
        "selected_token_ids": selected_token_ids,
        "selected_token_mask": selected_token_mask,
        "batches": [(input_ids, ones, ones)] * 2,
        "trainer": Trainer(),
    }
    exec(code.replace("http://target-host:8001", live_server(model)), scope)
    scope["target"].close()
    assert len(seen) == 2
    assert "first batch after" in capsys.readouterr().out
    assert seen[0]["target_probs"].shape == (2, 11, 50)
    assert bool(seen[0]["position_mask"].any())


def test_two_hosts(checkpoint: Path, tmp_path: Path, documented: list[str]) -> None:
    """On one: a port of its own, and no other host may come. The token is as printed."""
    script, metrics = documented
    assert script.count("0.0.0.0 --port 8001") == 1
    script = script.replace("$ ", "").replace("0.0.0.0 --port 8001", "127.0.0.1 --port 0")
    script = script.replace("\neagle3", '\necho "$EAGLE3_TOKEN" > token\neagle3')
    with serving(script, tmp_path, MODEL=str(checkpoint)) as served:
        token = (tmp_path / "token").read_text().strip()
        assert len(token) == 32
        with (
            RemoteEagle3Backend(served.urls) as stranger,
            pytest.raises(Unauthorized, match="EAGLE3_TOKEN"),
        ):
            stranger.model_info()
        with RemoteEagle3Backend(served.urls, token=token) as target:
            assert target.model_info().model_id == "tiny-llama"
        assert metrics.count("http://127.0.0.1:8001") == 1
        command = metrics.removeprefix("$ ").replace("http://127.0.0.1:8001", served.urls)
        assert "eagle3_ready 1.0" in run(command, tmp_path, EAGLE3_TOKEN=token).stdout
