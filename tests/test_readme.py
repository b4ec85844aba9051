"""The README's trainer code runs as printed, with only the URL replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def code_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_trainer_code_runs_as_printed(
    live_server: Any, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, capture = code_blocks("python")
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
    # Of the layers it names this small target has the first; the ids come from its other code.
    scope |= {"input_ids": input_ids, "attention_mask": ones, "loss_mask": ones}
    assert capture.count("(1, 9, 17, 25)") == 1
    exec(capture.replace("(1, 9, 17, 25)", "(1, 0, 5, 3)"), scope)
    assert scope["captured"].aux.shape == (2, 11, 4 * model.config.hidden_size)
    scope["target"].close()
    assert len(seen) == 2
    assert "first batch after" in capsys.readouterr().out
    assert seen[0]["target_probs"].shape == (2, 11, 50)
    assert bool(seen[0]["position_mask"].any())


def test_every_command_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in code_blocks("console"):
        for target in re.findall(r"^\$ make (\S+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_of_the_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / link).exists(), link
