"""What `gpu.py` measures: an 8B-shaped Llama with random weights, its batch and its draft vocab."""

from __future__ import annotations

from typing import Any

import torch
from gpu_report import Shape
from head_model import Vocab
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3_schemas import DraftVocab
from eagle3_server import TransformersTarget
from eagle3_server.engine import SupervisionJob
from text import TokenBatch

QUICK = Shape(64, 128, 8, 4, 2, 1000, 300, 2, 64, 3)
SMALL = Shape(1024, 2816, 8, 8, 4, 32000, 8000, 2, 512, 1)  # beside the large one


def make_model(shape: Shape, device: torch.device) -> LlamaForCausalLM:
    """Return a random Llama, made on the device: 16 GB are not sent there."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    with device:
        return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def small_vocab() -> Vocab:
    """Return a draft vocab of the small shape."""
    ids = torch.arange(SMALL.draft_vocab_size)
    mask = torch.zeros(SMALL.vocab_size, dtype=torch.bool)
    mask[ids] = True
    return ids, mask


def make_batch(shape: Shape) -> TokenBatch:
    """Return random ids without padding, 60 % supervised."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, shape.length)
    ids = torch.randint(shape.vocab_size, size, generator=generator)
    loss_mask = (torch.arange(shape.length) >= round(0.4 * shape.length)).long().expand(size)
    return TokenBatch(ids, torch.ones(size, dtype=torch.long), loss_mask)


def job_of(batch: TokenBatch, vocab: Vocab, target: TransformersTarget, **how: Any) -> Any:
    aux_layer_ids = target.describe().aux_layer_ids
    assert aux_layer_ids is not None
    defaults: dict[str, Any] = {"encoding": "hidden", "rows": "position_mask", "exact": False}
    return SupervisionJob(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.bool(),
        loss_mask=batch.loss_mask.bool(),
        aux_layer_ids=aux_layer_ids,
        draft_vocab=DraftVocab.from_ids(*vocab),
        aux_dtype="model",
        **(defaults | how),
    )
