"""A small EAGLE-3 draft.

Written from the definition in Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large
Language Models via Training-Time Test" (arXiv 2503.01840), section 3.

One decoder layer. Its attention reads, side by side, the embedding of the next token and a hidden
state: in step 0 the target's three aux hidden states fused by ``fc``, later the draft's own output
of the step before, as when it drafts several tokens in a row.

Letters: B batch, T sequence, H hidden size, D draft vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DraftConfig:
    """Sizes of the draft; the hidden size must be the target's."""

    hidden_size: int
    draft_vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than num_attention_heads: grouped-query attention
    intermediate_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check what would otherwise fail inside a reshape."""
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 2 * num_attention_heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")

    @classmethod
    def for_hidden_size(cls, hidden_size: int, draft_vocab_size: int) -> DraftConfig:
        """Choose proportions usual for Llama: heads of 64, three queries a key, MLP of 8/3 H."""
        num_heads = next(
            n for n in range(max(1, hidden_size // 64), 0, -1) if hidden_size % (2 * n) == 0
        )
        return cls(
            hidden_size=hidden_size,
            draft_vocab_size=draft_vocab_size,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads // 3 if num_heads % 3 == 0 else num_heads,
            intermediate_size=8 * hidden_size // 3,
        )


@dataclass
class StepCache:
    """Keys and values of every test-time-training step so far, each [B, heads, T, head_dim]."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class DraftAttention(nn.Module):
    """Causal attention whose keys grow by one column per test-time-training step."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta
        query_size = self.num_heads * self.head_dim
        key_value_size = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor, attention_mask: Tensor, cache: StepCache) -> Tensor:
        """Attend as the draft will when it serves.

        In step i, slot t stands for token t + i of a chain that left the target's context at slot
        t. It sees what that chain would have in its key-value cache: the step-0 keys of slots 0..t,
        and of the later steps only its own slot.

        Args:
            states: [B, T, 2H], normed embeddings beside normed hidden states.
            attention_mask: [B, T], non-zero where the slot holds a real token.
            cache: the earlier steps of this batch; this step is appended.

        Returns:
            [B, T, H].
        """
        step, sequence_length = len(cache.keys), states.shape[1]
        query = self._split_heads(self.q_proj(states), self.num_heads)
        key = self._split_heads(self.k_proj(states), self.num_key_value_heads)
        value = self._split_heads(self.v_proj(states), self.num_key_value_heads)
        positions = torch.arange(step, step + sequence_length, device=states.device)
        query = rotate(query, positions, self.rope_theta)
        key = rotate(key, positions, self.rope_theta)
        queries_per_key = self.num_heads // self.num_key_value_heads
        cache.keys.append(key.repeat_interleave(queries_per_key, dim=1))
        cache.values.append(value.repeat_interleave(queries_per_key, dim=1))

        causal = torch.ones(
            sequence_length, sequence_length, dtype=torch.bool, device=states.device
        )
        visible = causal.tril() & attention_mask.bool()[:, None, None, :]  # [B, 1, T, T]
        context = query @ cache.keys[0].transpose(-1, -2)  # [B, heads, T, T]
        # A finite fill, because a padding slot on the left sees nothing at all in step 0.
        context = context.masked_fill(~visible, torch.finfo(context.dtype).min)
        own_slot = [(query * later).sum(-1, keepdim=True) for later in cache.keys[1:]]
        scores = torch.cat([context, *own_slot], dim=-1) * self.head_dim**-0.5
        weights = scores.float().softmax(-1).to(query.dtype)  # [B, heads, T, T + step]

        output = weights[..., :sequence_length] @ cache.values[0]
        for column, later in enumerate(cache.values[1:], start=sequence_length):
            output = output + weights[..., column, None] * later
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def _split_heads(self, states: Tensor, num_heads: int) -> Tensor:
        return states.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)


class DraftLayer(nn.Module):
    """Decoder layer: attention over embeddings and hidden states, then a SwiGLU MLP."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.embeds_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.hidden_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.attention = DraftAttention(config)
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate_proj = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden_size, bias=False)

    def forward(
        self, embeds: Tensor, hidden_states: Tensor, attention_mask: Tensor, cache: StepCache
    ) -> Tensor:
        """Return the next hidden states [B, T, H]; embeds and hidden_states are [B, T, H]."""
        states = torch.cat([self.embeds_norm(embeds), self.hidden_norm(hidden_states)], dim=-1)
        hidden_states = hidden_states + self.attention(states, attention_mask, cache)
        normed = self.mlp_norm(hidden_states)
        gated = functional.silu(self.gate_proj(normed)) * self.up_proj(normed)
        return hidden_states + self.down_proj(gated)


class Eagle3Draft(nn.Module):
    """EAGLE-3 draft over a target's frozen input embeddings.

    Args:
        config: the draft's sizes.
        embedding_weight: [V, H], the target's input embeddings; copied and never trained.
    """

    def __init__(self, config: DraftConfig, embedding_weight: Tensor) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        copied = embedding_weight.detach().to(torch.float32, copy=True)
        self.embed_tokens = nn.Embedding.from_pretrained(copied, freeze=True)
        self.fc = nn.Linear(3 * hidden_size, hidden_size, bias=False)
        self.layer = DraftLayer(config)
        self.norm = nn.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(hidden_size, config.draft_vocab_size, bias=False)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Turn the target's aux hidden states [B, T, 3H] into hidden states of step 0 [B, T, H]."""
        return self.fc(aux_hidden_states.to(self.fc.weight.dtype))

    def forward(
        self, input_ids: Tensor, hidden_states: Tensor, attention_mask: Tensor, cache: StepCache
    ) -> Tensor:
        """Run one test-time-training step.

        Args:
            input_ids: [B, T], the token that follows each hidden state.
            hidden_states: [B, T, H], from `fuse` in step 0, else the step before's output.
            attention_mask: [B, T], non-zero where the slot holds a real token.
            cache: an empty `StepCache` in step 0, then the same object again.

        Returns:
            Hidden states [B, T, H], the input of `logits` and of the next step.
        """
        return self.layer(self.embed_tokens(input_ids), hidden_states, attention_mask, cache)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return draft-vocab logits [..., D] for hidden states [..., H]."""
        return self.head(self.norm(hidden_states))


def rotate(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Apply rotary position embedding, halves layout (as Llama in transformers).

    Args:
        states: [B, heads, T, head_dim], head_dim even.
        positions: [T] integers.
        theta: base of the frequencies.
    """
    half = states.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float32, device=states.device) / half
    angles = positions.float()[:, None] * theta**-exponents  # [T, head_dim / 2]
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
