"""`hidden` is offered only where the head is what its weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.quantised.checkpoints import V, save_compressed, save_plain, save_quantised
from torch import nn

from eagle3_server import ServerSettings, TransformersTarget
from eagle3_server.loading import load_target


def of(path: Path, **settings: Any) -> TransformersTarget:
    return load_target(ServerSettings(model=str(path), device="cpu", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["bnb-nf4", "bnb-int8", "torchao-int8"])
def test_a_tied_head_stays_plain(quantization: str, tmp_path: Path) -> None:
    target = of(save_plain(tmp_path / "tied", tied=True), quantization=quantization)
    assert target.describe().encodings == ("probs", "logits", "hidden")
    model: Any = target._model
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    vocab = torch.tensor([7, 2, 99])
    assert torch.equal(target._head.draft_rows(vocab)[0], weight[vocab])  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bnb-nf4", "torchao-int8", "compressed"])
def test_a_quantised_head_is_served_without_hidden(
    kind: str, tmp_path: Path, serve: Any, connect: Any, batch_of: Any, expect: Any, matches: Any,
    frequency_ordered: Any,
) -> None:  # fmt: skip
    plain, path = save_plain(tmp_path / "plain"), tmp_path / "quantised"
    if kind == "compressed":
        save_compressed(plain, path, "token", with_head=True)
    elif kind == "bnb-nf4":
        config: Any = transformers.BitsAndBytesConfig
        config = config(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["x"])
        save_quantised(plain, path, config)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(
            Int8WeightOnlyConfig(version=2), include_input_output_embeddings=True
        )
        save_quantised(plain, path, config)
    target = of(path)
    described = target.describe()
    assert described.encodings == ("probs", "logits")
    # The oracle's own copy.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.eval().requires_grad_(False)
    inputs, ids = batch_of(V, (24, 17, 9)), frequency_ordered(V, 53)
    batch = connect(serve(target), ids, exact=True).generate_batch(*inputs)
    matches(batch, expect(model, inputs, ids))


def test_a_head_with_a_replaced_forward_is_not_plain(build_model: Any) -> None:
    """As compressed-tensors leaves it: an nn.Linear whose activations are quantised."""
    model = build_model("llama")
    head = model.lm_head
    own = head.forward

    def quantised(states: torch.Tensor) -> torch.Tensor:
        scale = states.abs().amax(-1, keepdim=True) / 127
        return own((states / scale).round() * scale)  # type: ignore[no-any-return]

    head.forward = quantised
    target = TransformersTarget(model, model_id="tiny")
    assert type(head) is nn.Linear
    assert target.describe().encodings == ("probs", "logits")
    assert target.describe().head == "rows"
