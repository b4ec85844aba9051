"""The full path of a job: the model's own forward, and what follows spelt out by definition.

It runs on a copy of the model (same seed, other memory), on which no code under test ever ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.families.configs import SEED, Family, L, V
from torch import nn

from eagle3_schemas import DraftVocab
from eagle3_server.engine import SupervisionJob

B, T, D = 3, 77, 127
LENGTHS = (35, 58, 13)  # attended; the longest row is not the first
USED = 60  # a loss position beyond them all; the columns after it are padding in every row
LAYER_SETS = ((1, 2, 4), (L - 1, 0, 3))  # every layer, the last one too, and not in order


def draft_vocab() -> DraftVocab:
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(SEED))[:D]
    return DraftVocab.from_ids(ids)


def make_job(
    *, left_padded: bool = False, encoding: str = "probs", **fields: Any
) -> SupervisionJob:
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(3, 200, (B, T), generator=generator)
    attention_mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    loss_mask = (torch.rand(B, T, generator=generator) < 0.8) & attention_mask
    loss_mask[2, [LENGTHS[2] + 2, USED - 1]] = True  # supervised but not attended
    if left_padded:
        attention_mask, loss_mask = attention_mask.flip(1), loss_mask.flip(1)
    loss_mask[:, 0] = True  # never supervised: no position precedes it
    input_ids[~attention_mask] = 2
    job = SupervisionJob(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        aux_layer_ids=LAYER_SETS[0],
        draft_vocab=draft_vocab(),
        encoding=encoding,  # type: ignore[arg-type]
        rows="position_mask",
        aux_dtype="model",
        exact=True,
    )
    return replace(job, **fields)


@dataclass(frozen=True)
class Expected:
    """The full path's answer to a job."""

    logits: torch.Tensor  # [B, T, V], unshifted
    hidden_states: tuple[torch.Tensor, ...]  # of the model's own output
    layer_outputs: list[torch.Tensor]  # [B, T, H], as the module after each layer receives them
    normed: torch.Tensor  # [B, T, H], what the final norm gives

    def target(self, job: SupervisionJob) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return probs [B, T, D], position_mask [B, T] and shifted loss mask, per position."""
        ids = job.draft_vocab.selected_token_ids
        selected = set(ids.tolist())
        probs = torch.zeros(B, T, D)
        position_mask = torch.zeros(B, T, dtype=torch.bool)
        shifted = torch.zeros(B, T, dtype=torch.bool)
        for b in range(B):
            for t in range(T - 1):  # the last column's loss mask is 0
                shifted[b, t] = job.loss_mask[b, t + 1]
                row = self.logits[b, t + 1]
                values = row.tolist()
                argmax = values.index(max(values))  # ties: the lowest id
                position_mask[b, t] = argmax in selected and bool(shifted[b, t])
                probs[b, t] = torch.softmax(row[ids].float(), dim=-1)
        return probs, position_mask, shifted

    def aux(self, layer_ids: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([self.layer_outputs[i] for i in layer_ids], dim=-1)


def run_full_path(model: nn.Module, family: Family, job: SupervisionJob) -> Expected:
    """Run the model's own forward, recording what the module after each decoder layer receives."""
    layers = list(model.get_submodule(family.layers).children())
    followers = [*layers[1:], model.get_submodule(family.norm)]
    received: dict[int, torch.Tensor] = {}
    handles = []
    for index, follower in enumerate(followers):

        def keep(_module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            received[index] = args[0] if args else kwargs["hidden_states"]

        handles.append(follower.register_forward_pre_hook(keep, with_kwargs=True))
    normed: list[torch.Tensor] = []
    handles.append(followers[-1].register_forward_hook(lambda _, __, out: normed.append(out)))
    with torch.no_grad():
        output = model(
            input_ids=job.input_ids,
            attention_mask=job.attention_mask.long(),
            output_hidden_states=True,
            use_cache=False,
        )
    for handle in handles:
        handle.remove()
    assert sorted(received) == list(range(L))
    outputs = [received[i] for i in range(L)]
    return Expected(output.logits, output.hidden_states, outputs, normed[-1])
