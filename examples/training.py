"""EAGLE-3 training: the loss, unrolled over the draft's own outputs, and the loop around it.

The unroll is the training-time test of arXiv 2503.01840, section 3.2; step weights, shifts and the
supervision rule follow the public trainers (SpecForge, NeMo AutoModel).

Letters: B batch, T sequence, H hidden size, V target vocab, D draft vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draft import DraftConfig, Eagle3Draft, StepCache
from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import Eagle3TargetBackend, Eagle3TargetBatch, shift_left_with_zero
from text import TokenBatch

STEP_WEIGHT = 0.8
"""Each test-time-training step counts this much of the step before, as in the public trainers."""


@dataclass(frozen=True)
class Metrics:
    """What one batch, or several added up, says about the draft; counts are [ttt_steps] int64.

    Attributes:
        loss: scalar; carries the gradient when it comes from a training step.
        supervised: tokens the loss mask supervises, per test-time-training step.
        covered: those of them whose target argmax is in the draft vocab (`position_mask`).
        correct: those of them the draft's top token gets right.
    """

    loss: Tensor
    supervised: Tensor
    covered: Tensor
    correct: Tensor

    @property
    def step_accuracies(self) -> list[float]:
        """Top-1 accuracy per step; a target token outside the draft vocab counts as a miss."""
        return (self.correct / self.supervised.clamp_min(1)).tolist()

    @property
    def accept_length(self) -> float:
        """Simulated tokens per verification: 1 + the sum over k of the product of k accuracies.

        The 1 is the token the target itself adds. Steps are taken as independent, so this is a
        proxy to watch during training, not the acceptance of a serving engine.
        """
        return 1.0 + torch.tensor(self.step_accuracies).cumprod(0).sum().item()

    @property
    def coverage(self) -> float:
        """Share of supervised tokens whose target argmax is in the draft vocab."""
        return (self.covered[0] / self.supervised[0].clamp_min(1)).item()


class Eagle3Trainer(nn.Module):
    """EAGLE-3's loss: the draft unrolled over its own outputs (test-time training).

    Args:
        draft: the model to train.
        selected_token_ids: [D] int64, the draft vocab in its own order.
        selected_token_mask: [V] bool, true for those ids.
        ttt_steps: tokens drafted in a row from every position, at least 1.
    """

    selected_token_ids: Tensor
    selected_token_mask: Tensor

    def __init__(
        self,
        draft: Eagle3Draft,
        selected_token_ids: Tensor,
        selected_token_mask: Tensor,
        ttt_steps: int = 3,
    ) -> None:
        super().__init__()
        if ttt_steps < 1:
            raise ValueError(f"ttt_steps must be at least 1; got {ttt_steps}")
        self.draft = draft
        self.ttt_steps = ttt_steps
        self.register_buffer("selected_token_ids", selected_token_ids)
        self.register_buffer("selected_token_mask", selected_token_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        aux_hidden_states: Tensor,
        target_logits: Tensor | None = None,
        target_probs: Tensor | None = None,
        position_mask: Tensor | None = None,
    ) -> Metrics:
        """Return loss and counts for ``batch.to_trainer_inputs()`` of any target backend.

        A co-located target brings `target_logits` [B, T, V]; a remote one has already projected
        them to `target_probs` [B, T, D] and `position_mask` [B, T, 1].
        """
        if target_logits is not None:
            target_probs, position_mask = self.project(target_logits, loss_mask)
        if target_probs is None or position_mask is None:
            raise ValueError("pass target_logits, or both target_probs and position_mask")

        hidden_states = self.draft.fuse(aux_hidden_states)
        cache = StepCache()
        loss = hidden_states.new_zeros(())
        supervised, covered, correct = [], [], []
        for step in range(self.ttt_steps):
            hidden_states = self.draft(input_ids, hidden_states, attention_mask, cache)
            # Only these rows carry supervision: a remote target sends no others.
            rows = position_mask.squeeze(-1)
            logits, probs = self.draft.logits(hidden_states[rows]), target_probs[rows]  # [N, D]
            loss = loss + STEP_WEIGHT**step * soft_cross_entropy(logits, probs)
            supervised.append(loss_mask.bool().sum())
            covered.append(rows.sum())
            correct.append((logits.argmax(-1) == probs.argmax(-1)).sum())
            # The next step drafts one token further from the same slot. The hidden states and the
            # attention mask stay: they belong to the slot, not to the token drafted.
            input_ids = shift_left_with_zero(input_ids)
            loss_mask = shift_left_with_zero(loss_mask)
            target_probs = shift_left_with_zero(target_probs)
            position_mask = shift_left_with_zero(position_mask)
        loss = loss / sum(STEP_WEIGHT**step for step in range(self.ttt_steps))
        return Metrics(loss, torch.stack(supervised), torch.stack(covered), torch.stack(correct))

    def project(self, target_logits: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Project shifted target logits [B, T, V] onto the draft vocab.

        Returns:
            target_probs [B, T, D] float32, renormalised over the draft vocab, and position_mask
            [B, T, 1] bool: supervised, and the target's argmax is in the draft vocab.
        """
        in_draft_vocab = self.selected_token_mask[target_logits.argmax(-1)]
        draft_logits = target_logits[..., self.selected_token_ids]
        position_mask = (in_draft_vocab & loss_mask.bool()).unsqueeze(-1)
        return draft_logits.float().softmax(-1), position_mask


def soft_cross_entropy(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Return -sum p log q, averaged over the rows of [N, D]; 0 when there are none."""
    log_probs = logits.float().log_softmax(-1)
    return -(target_probs * log_probs).sum() / max(1, len(logits))


def supervise(
    backend: Eagle3TargetBackend, batches: Iterable[TokenBatch], depth: int = 2
) -> Iterator[Eagle3TargetBatch]:
    """Yield the target's supervision for each batch, in order.

    A remote target works ahead: `depth` requests are under way while the caller trains.
    """
    if not isinstance(backend, RemoteEagle3Backend):
        for batch in batches:
            yield backend.generate_batch(*batch)
        return
    with backend.prefetch(batches, depth) as prefetch:
        for _, target_batch in prefetch:
            yield target_batch


def train(
    trainer: Eagle3Trainer,
    supervision: Iterable[Eagle3TargetBatch],
    *,
    steps: int,
    learning_rate: float,
    on_step: Callable[[int, Metrics], None] | None = None,
) -> list[float]:
    """Train for one step per batch and return the losses.

    AdamW, gradients clipped to norm 1, linear warm-up over a tenth of `steps`, then linear decay.

    Args:
        trainer: trained in place.
        supervision: from `supervise`.
        steps: length of the learning-rate schedule.
        learning_rate: at the end of the warm-up.
        on_step: called after each step with its number, from 1, and its metrics.
    """
    parameters = [p for p in trainer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: min((done + 1) / warm_up, (steps - done + 1) / (steps - warm_up + 1)),
    )
    trainer.train()
    losses = []
    for step, target_batch in enumerate(supervision, start=1):
        metrics = trainer(**target_batch.to_trainer_inputs())
        optimizer.zero_grad()
        metrics.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(metrics.loss.item())
        if on_step is not None:
            on_step(step, metrics)
    return losses


@torch.no_grad()
def evaluate(trainer: Eagle3Trainer, supervision: Sequence[Eagle3TargetBatch]) -> Metrics:
    """Return the mean loss and the summed counts over the batches."""
    trainer.eval()
    parts = [trainer(**target_batch.to_trainer_inputs()) for target_batch in supervision]
    return Metrics(
        loss=torch.stack([part.loss for part in parts]).mean(),
        supervised=torch.stack([part.supervised for part in parts]).sum(0),
        covered=torch.stack([part.covered for part in parts]).sum(0),
        correct=torch.stack([part.correct for part in parts]).sum(0),
    )


def make_trainer(
    embedding_weight: Tensor,
    selected_token_ids: Tensor,
    selected_token_mask: Tensor,
    *,
    ttt_steps: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> Eagle3Trainer:
    """Return a trainer around a new draft that depends on nothing but the arguments."""
    torch.manual_seed(seed)
    config = DraftConfig.for_hidden_size(embedding_weight.shape[1], len(selected_token_ids))
    draft = Eagle3Draft(config, embedding_weight.cpu())
    return Eagle3Trainer(draft, selected_token_ids, selected_token_mask, ttt_steps).to(device)
