"""A small target, and what its own forward gives on this machine: no code of this project's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.peer.batches import DRAFT_VOCAB_SIZE, NUM_LAYERS, VOCAB_SIZE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN_SIZE, EPS = 48, 1e-5


def llama_config(num_layers: int = NUM_LAYERS, **changes: object) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=80,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB_SIZE,
        rms_norm_eps=EPS,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.15,  # the default gives nearly uniform distributions
        **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **changes},
    )


def make_target(dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a random target whose norms have gains, so that what is normed shows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def draft_vocab_ids() -> Tensor:
    """Return [D] ids, ascending as both trainers number them."""
    generator = torch.Generator().manual_seed(4)
    return torch.randperm(VOCAB_SIZE, generator=generator)[:DRAFT_VOCAB_SIZE].sort().values


@dataclass(frozen=True)
class States:
    """Of one forward, unshifted: [B, T, H] each."""

    layer_inputs: tuple[Tensor, ...]  # and, last, the output of the final norm
    prenorm: Tensor


def local_states(target: LlamaForCausalLM, batch: dict[str, Tensor]) -> States:
    """Run the target on a batch, packed rows under a block-causal mask."""
    prenorm: list[Tensor] = []
    mask, arguments = batch["attention_mask"], {}
    if "seq_lens" in batch:
        document = (batch["position_ids"] == 0).cumsum(1)
        same = document[:, :, None] == document[:, None, :]
        mask = same.tril()[:, None]
        arguments = {"position_ids": batch["position_ids"]}
    hook = target.model.norm.register_forward_pre_hook(lambda _, args: prenorm.append(args[0]))
    try:
        with torch.no_grad():
            states = target(
                input_ids=batch["input_ids"],
                attention_mask=mask,
                output_hidden_states=True,
                use_cache=False,
                **arguments,
            ).hidden_states
    finally:
        hook.remove()
    return States(states, prenorm[0])
