"""A real GGUF file is served as it is."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_server import ServerSettings
from eagle3_server.loading import load_target

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    from smollm2 import download_gguf
finally:
    sys.path.remove(str(EXAMPLES))

pytestmark = pytest.mark.slow


def test_a_gguf_file_is_served_bit_equal_to_its_own_hidden_states(
    tmp_path: Path, serve: Any, connect: Any, batch_of: Any, expect: Any, matches: Any
) -> None:
    from transformers import AutoModelForCausalLM

    file = download_gguf(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the GGUF reader hands torch read-only numpy arrays
        target = load_target(ServerSettings(model=str(file), dtype="float32"))
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    assert target.describe().model_id == file.name
    assert target.describe().aux_layer_ids == (1, 14, 26)
    draft_ids = torch.arange(100, 400).flip(0)
    inputs = batch_of(49152, (12, 9))
    bridge = serve(target, model=str(file))
    batch = connect(bridge, draft_ids, exact=True).generate_batch(*inputs)
    matches(batch, expect(model.eval(), inputs, draft_ids))
    text = "The capital of France is"
    answer = bridge.app_client.post("/v1/inspect", json={"text": text})
    tokens = answer.json()["tokens"]
    assert "".join(token["text"] for token in tokens) == text
    assert tokens[-1]["next_argmax"]["text"] == " Paris"
    assert tokens[-2]["next_argmax"]["text"] != " Paris"
