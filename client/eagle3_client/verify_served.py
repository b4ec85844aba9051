"""What `verify` asks a server for: supervision of a text, in a draft vocab in no order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3_client.backend import RemoteEagle3Backend
from eagle3_schemas import ModelInfo

_DRAFT_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Served:
    """What a server sent of the text. B rows of T tokens, D draft-vocab ids in no order."""

    info: ModelInfo
    input_ids: Tensor  # [B, T]
    selected_token_ids: Tensor  # [D]
    aux_layer_ids: tuple[int, ...]
    aux_hidden_states: Tensor  # [B, T, 3H]
    target_probs: Tensor  # [B, T, D], every supervised row
    position_mask: Tensor  # [B, T] bool
    argmax: Tensor  # [B, T], over the whole vocab


def ask(
    backend: RemoteEagle3Backend, info: ModelInfo, input_ids: Tensor, layers: tuple[int, ...]
) -> Served:
    """Have a server supervise the text; sets the backend's draft vocab.

    Raises:
        RemoteEagle3Error: it cannot be asked, or the client refuses what it answers.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(info.vocab_size, dtype=torch.bool)
    mask[input_ids.flatten()] = True
    others = (~mask).nonzero()[:, 0]
    others = others[torch.randperm(len(others), generator=generator)]
    mask[others[: max(_DRAFT_VOCAB_SIZE - int(mask.sum()), 0)]] = True
    ids = mask.nonzero()[:, 0]
    ids = ids[torch.randperm(len(ids), generator=generator)]  # an order that a sort would change
    backend.set_vocab_mapping(ids, mask)
    every = torch.ones_like(input_ids)
    batch = backend.generate_batch(input_ids, every, every)
    captured = backend.capture(input_ids, every, every, outputs=("argmax",))
    assert batch.target_probs is not None
    assert batch.position_mask is not None
    return Served(
        info,
        input_ids,
        ids,
        layers,
        batch.aux_hidden_states.cpu(),
        batch.target_probs.cpu(),
        batch.position_mask[..., 0].cpu(),
        captured.argmax.cpu(),
    )


def ask_position_mask(backend: RemoteEagle3Backend, served: Served, loss_mask: Tensor) -> Tensor:
    """Return the position_mask [B, T] of the same text under another loss mask [B, T].

    Raises:
        RemoteEagle3Error: as `ask`.
    """
    every = torch.ones_like(served.input_ids)
    batch = backend.generate_batch(served.input_ids, every, loss_mask)
    assert batch.position_mask is not None
    return batch.position_mask[..., 0].cpu()


def places(served: Served) -> Tensor:
    """Return each token id's column [V]; -1 outside the draft vocab."""
    place = torch.full((served.info.vocab_size,), -1)
    place[served.selected_token_ids] = torch.arange(len(served.selected_token_ids))
    return place


def kl(expected: Tensor, got: Tensor) -> float:
    """Return the mean KL divergence of rows of probabilities, nats."""
    expected, got = expected.double().clamp_min(1e-12), got.double().clamp_min(1e-12)
    return float((expected * (expected.log() - got.log())).sum(-1).mean())
