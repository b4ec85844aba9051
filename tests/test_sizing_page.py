"""docs/performance.md: its tables are generated, and its bytes are those of real answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.sizing_page import MODELS, PAGE, bytes_per_token, tables, with_tables

from eagle3_schemas import DraftVocab
from eagle3_server import TransformersTarget
from eagle3_server.engine import SupervisionJob


def test_the_tables_are_generated() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run `python -m tests.sizing_page`"
    for table in tables().values():
        assert table in page


@pytest.mark.parametrize("encoding", ["hidden", "logits", "probs"])
def test_an_answer_has_the_bytes_the_page_says(build_model: Any, encoding: str) -> None:
    """At 60 % supervised; what the page leaves out is a bit a token for `position_mask`."""
    target = TransformersTarget(build_model("llama"), model_id="tiny")
    described = target.describe()
    loss_mask = torch.zeros(4, 100, dtype=torch.bool)
    loss_mask[:, 1:61] = True
    job = SupervisionJob(
        input_ids=torch.randint(described.vocab_size, (4, 100)),
        attention_mask=torch.ones(4, 100, dtype=torch.bool),
        loss_mask=loss_mask,
        aux_layer_ids=(0, 2, 4),
        draft_vocab=DraftVocab.from_ids(torch.arange(53)),
        encoding=encoding,
        rows="loss_mask",
        aux_dtype="model",
        exact=False,
    )
    size = sum(t.numel() * t.element_size() for t in target.supervise(job).tensors.values())
    model = replace(MODELS[0], hidden=described.hidden_size, draft_vocab=53, itemsize=4)
    assert size / 400 == pytest.approx(bytes_per_token(model, encoding) + 1 / 8, abs=0.1)


def test_a_supervised_row_costs_what_the_page_says_of_work() -> None:
    """An 8B by hand: 6.97 G of weights in layers, 0.53 G in the head; its draft 0.37 G and 50 M."""
    llama = next(model for model in MODELS if model.name == "Llama-3.1-8B")
    assert llama.target_flops() / 1e9 == pytest.approx(2 * 6.97 + 0.6 * 2 * 0.525, rel=0.01)
    layer = 3 * 4096 * 4096 + 4 * 4096 * 1024 + 3 * 4096 * 14_336
    assert llama.draft_step_params == layer + 4096 * 32_000
    assert llama.draft_flops() / 1e9 == pytest.approx(6 * (0.0503 + 7 * 0.3745), rel=0.01)
