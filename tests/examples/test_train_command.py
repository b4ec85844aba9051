"""The example trainer's command, on a tiny target."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.tiny_tokenizer import save_tokenizer, save_with_tokenizer

from eagle3_schemas import tokenizer_digest
from eagle3_server import TransformersTarget

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
sys.path.insert(0, EXAMPLES)
try:
    import train_eagle3
finally:
    sys.path.remove(EXAMPLES)


@pytest.fixture
def arguments(live_server: Any, tmp_path: Path) -> list[str]:
    """What trains two steps on a server of a target with a tokenizer, `tmp_path / "tiny"`."""
    path = save_with_tokenizer(tmp_path / "tiny")
    digest = tokenizer_digest(transformers.AutoTokenizer.from_pretrained(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    target = TransformersTarget(model, model_id="tiny", tokenizer_digest=digest)
    text = tmp_path / "text.txt"
    text.write_text("The server answers, and the trainer learns from what it says. " * 20)
    named = {
        "urls": live_server(target), "tokenizer": path, "text": text, "steps": 2, "batch-size": 1,
        "sequence-length": 32, "device": "cpu", "draft-vocab-size": 64,
        "output": tmp_path / "draft.pt",
    }  # fmt: skip
    return [str(part) for name, value in named.items() for part in (f"--{name}", value)]


def test_the_layers_named_are_trained_on_and_saved(arguments: list[str], tmp_path: Path) -> None:
    train_eagle3.main([*arguments, "--aux-layer-ids", "0,2,4"])
    saved = torch.load(tmp_path / "draft.pt")
    assert saved["config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]


def test_another_tokenizer_than_the_targets_ends_it_before_training(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(tmp_path / "other", ["answers"])
    with pytest.raises(SystemExit) as caught:
        train_eagle3.main([*arguments, "--tokenizer", str(tmp_path / "other")])
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert "FAILED   tokenizer" in printed
    assert "step 1/2" not in printed
    assert not (tmp_path / "draft.pt").exists()
