"""The example trainer is an independent consumer of the contract; these tests pin what it reads."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eagle3_schemas import Eagle3TargetBatch, shift_left_with_zero

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
sys.path.insert(0, EXAMPLES)
try:
    import draft
    import training
finally:
    sys.path.remove(EXAMPLES)

# All different, so that a transposed axis fails.
BATCH_SIZE, SEQUENCE_LENGTH, HIDDEN_SIZE, VOCAB_SIZE, DRAFT_VOCAB_SIZE = 2, 7, 24, 31, 11
SELECTED_TOKEN_IDS = torch.tensor([5, 2, 30, 0, 17, 9, 21, 1, 12, 28, 3])


def make_trainer(ttt_steps: int = 3) -> training.Eagle3Trainer:
    torch.manual_seed(0)
    config = draft.DraftConfig(
        hidden_size=HIDDEN_SIZE,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=40,
    )
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[SELECTED_TOKEN_IDS] = True
    model = draft.Eagle3Draft(config, torch.randn(VOCAB_SIZE, HIDDEN_SIZE))
    return training.Eagle3Trainer(model, SELECTED_TOKEN_IDS, mask, ttt_steps)


def make_target_batch(lengths: tuple[int, ...] = (7, 5)) -> Eagle3TargetBatch:
    """Return a co-located batch of random supervision, rows padded on the right."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), SEQUENCE_LENGTH)
    columns = torch.arange(SEQUENCE_LENGTH)
    attention_mask = (columns < torch.tensor(lengths)[:, None]).long()
    # Few distinct values, so that some rows have a tie at the top.
    logits = torch.randint(0, 6, (*shape, VOCAB_SIZE), generator=generator).float()
    return Eagle3TargetBatch(
        aux_hidden_states=torch.randn(*shape, 3 * HIDDEN_SIZE, generator=generator),
        input_ids=shift_left_with_zero(torch.randint(0, VOCAB_SIZE, shape, generator=generator)),
        attention_mask=attention_mask,
        loss_mask=shift_left_with_zero(attention_mask * (columns > 0)),
        logits=shift_left_with_zero(logits),
    )


def as_remote(batch: Eagle3TargetBatch) -> Eagle3TargetBatch:
    """Project a co-located batch by a loop over the definition; unsupervised rows stay zero."""
    assert batch.logits is not None
    shape = batch.input_ids.shape
    target_probs = torch.zeros(*shape, DRAFT_VOCAB_SIZE)
    position_mask = torch.zeros(*shape, 1, dtype=torch.bool)
    for row in range(shape[0]):
        for column in range(shape[1]):
            logits = batch.logits[row, column].tolist()
            top_id = logits.index(max(logits))  # the first, so ties go to the lowest id
            if batch.loss_mask[row, column] and top_id in SELECTED_TOKEN_IDS.tolist():
                picked = torch.tensor([logits[token_id] for token_id in SELECTED_TOKEN_IDS])
                target_probs[row, column] = picked.softmax(0)
                position_mask[row, column] = True
    return Eagle3TargetBatch(
        aux_hidden_states=batch.aux_hidden_states,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        loss_mask=batch.loss_mask,
        target_probs=target_probs,
        position_mask=position_mask,
    )


def loss_and_gradients(
    trainer: training.Eagle3Trainer, batch: Eagle3TargetBatch
) -> tuple[training.Metrics, list[Tensor]]:
    trainer.zero_grad()
    metrics = trainer(**batch.to_trainer_inputs())
    metrics.loss.backward()
    gradients = [p.grad.clone() for p in trainer.parameters() if p.grad is not None]
    assert len(gradients) == sum(p.requires_grad for p in trainer.parameters())
    return metrics, gradients


def slow_rotate(vector: list[float], position: int, theta: float) -> Tensor:
    """Turn each pair (i, i + half) by its own angle: rotary embedding as complex numbers."""
    half = len(vector) // 2
    rotated = [0.0] * len(vector)
    for index in range(half):
        angle = position * theta ** (-index / half)
        turned = complex(vector[index], vector[index + half]) * complex(
            math.cos(angle), math.sin(angle)
        )
        rotated[index], rotated[index + half] = turned.real, turned.imag
    return torch.tensor(rotated)


def test_attention_of_every_step_matches_a_loop_over_the_definition() -> None:
    """Slot t of step i sees step-0 keys of real slots 0..t, and its own slot of steps 1..i."""
    attention = make_trainer().draft.layer.attention
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]])
    cache = draft.StepCache()
    generator = torch.Generator().manual_seed(2)
    shape = (BATCH_SIZE, SEQUENCE_LENGTH, 2 * HIDDEN_SIZE)
    all_states = [torch.randn(shape, generator=generator) for _ in range(3)]
    heads, head_dim, theta = attention.num_heads, attention.head_dim, attention.rope_theta
    queries_per_key = heads // attention.num_key_value_heads

    def project(linear: torch.nn.Linear, step: int, row: int, slot: int, head: int) -> list[float]:
        return linear(all_states[step][row, slot]).view(-1, head_dim)[head].tolist()

    for step, states in enumerate(all_states):
        actual = attention(states, attention_mask, cache)
        for row, slot in torch.nonzero(attention_mask).tolist():
            seen = [(0, other) for other in range(slot + 1) if attention_mask[row, other]]
            seen += [(earlier, slot) for earlier in range(1, step + 1)]
            outputs = []
            for head in range(heads):
                query = project(attention.q_proj, step, row, slot, head)
                query = slow_rotate(query, slot + step, theta)
                shared = head // queries_per_key
                keys = torch.stack(
                    [
                        slow_rotate(project(attention.k_proj, s, row, t, shared), s + t, theta)
                        for s, t in seen
                    ]
                )
                values = torch.tensor(
                    [project(attention.v_proj, s, row, t, shared) for s, t in seen]
                )
                weights = (keys @ query / math.sqrt(head_dim)).softmax(0)
                outputs.append(weights @ values)
            expected = attention.o_proj(torch.cat(outputs))
            # float32 sums in another order, and angles from Python floats
            torch.testing.assert_close(actual[row, slot], expected, rtol=1e-4, atol=1e-5)


def test_logits_and_projected_supervision_give_equal_bits() -> None:
    batch = make_target_batch()
    trainer = make_trainer()
    colocated, colocated_gradients = loss_and_gradients(trainer, batch)
    remote, remote_gradients = loss_and_gradients(trainer, as_remote(batch))
    assert colocated.covered[0] > 0
    assert colocated.covered[0] < colocated.supervised[0]
    assert remote.loss.item() == colocated.loss.item()
    for name in ("supervised", "covered", "correct"):
        assert torch.equal(getattr(remote, name), getattr(colocated, name))
    assert all(map(torch.equal, remote_gradients, colocated_gradients))


def test_rows_outside_position_mask_are_never_read() -> None:
    trainer, batch = make_trainer(), as_remote(make_target_batch())
    expected, expected_gradients = loss_and_gradients(trainer, batch)
    assert batch.target_probs is not None
    assert batch.position_mask is not None
    batch.target_probs = batch.target_probs.masked_fill(~batch.position_mask, math.nan)
    actual, gradients = loss_and_gradients(trainer, batch)
    assert actual.loss.item() == expected.loss.item()
    assert all(map(torch.equal, gradients, expected_gradients))


def test_zero_rows_of_target_probs_give_no_gradient() -> None:
    """So a trainer that does read them by mistake is not trained on noise."""
    logits = torch.randn(5, DRAFT_VOCAB_SIZE, requires_grad=True)
    probs = torch.rand(5, DRAFT_VOCAB_SIZE).softmax(-1)
    probs[[1, 4]] = 0
    training.soft_cross_entropy(logits, probs).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1).gt(0).tolist() == [True, False, True, True, False]


def test_batch_without_supervision_has_zero_loss_and_gradient() -> None:
    batch = make_target_batch()
    batch.loss_mask = torch.zeros_like(batch.loss_mask)
    metrics, gradients = loss_and_gradients(make_trainer(), batch)
    assert metrics.loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients)
    assert metrics.step_accuracies == [0, 0, 0]
    assert metrics.coverage == 0


def test_loss_weighs_the_mean_cross_entropy_of_each_step() -> None:
    """Step i drafts, from slot t, what column t + i of ids and supervision holds."""
    trainer, batch = make_trainer(ttt_steps=3), as_remote(make_target_batch())
    assert batch.target_probs is not None
    assert batch.position_mask is not None
    supervised = batch.position_mask.squeeze(-1).nonzero().tolist()
    model, cache = trainer.draft, draft.StepCache()
    hidden_states, expected = model.fuse(batch.aux_hidden_states), 0.0
    for step in range(3):
        input_ids = torch.zeros_like(batch.input_ids)
        for slot in range(SEQUENCE_LENGTH - step):
            input_ids[:, slot] = batch.input_ids[:, slot + step]
        hidden_states = model(input_ids, hidden_states, batch.attention_mask, cache)
        terms = []
        for row, column in supervised:
            if column >= step:
                probs = batch.target_probs[row, column].tolist()
                logits = model.logits(hidden_states[row, column - step])
                pairs = zip(probs, logits.log_softmax(-1).tolist(), strict=True)
                terms.append(-sum(p * log_q for p, log_q in pairs))
        expected += 0.8**step * sum(terms) / len(terms) / (1 + 0.8 + 0.8**2)
    actual = trainer(**batch.to_trainer_inputs()).loss.item()
    assert actual == pytest.approx(expected, rel=1e-5)  # float32 rounding


def test_later_steps_are_supervised_one_token_further() -> None:
    """Row 0 supervises 6 shifted tokens and row 1 has 4; each step loses one of each."""
    metrics = make_trainer()(**make_target_batch((7, 5)).to_trainer_inputs())
    assert metrics.supervised.tolist() == [6 + 4, 5 + 3, 4 + 2]


def test_padding_does_not_change_the_loss() -> None:
    trainer, padded = make_trainer(), make_target_batch((5,))
    inputs = padded.to_trainer_inputs()
    unpadded = {name: tensor[:, :5] for name, tensor in inputs.items() if tensor is not None}
    expected = trainer(**unpadded)
    actual = trainer(**inputs)
    # float32 sums in another order
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=0)
    assert torch.equal(actual.correct, expected.correct)

    assert inputs["input_ids"] is not None
    assert inputs["aux_hidden_states"] is not None
    inputs["input_ids"][:, 5:] = 3
    inputs["aux_hidden_states"][:, 5:] = 1e4
    assert trainer(**inputs).loss.item() == actual.loss.item()


def test_training_reduces_the_loss_and_leaves_the_embeddings() -> None:
    trainer, batch = make_trainer(), make_target_batch()
    embeddings = trainer.draft.embed_tokens.weight.clone()
    losses = training.train(trainer, [batch] * 30, steps=30, learning_rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(trainer.draft.embed_tokens.weight, embeddings)


def test_accept_length_adds_up_products_of_step_accuracies() -> None:
    counts = [torch.tensor(values) for values in ([8, 8, 8], [8, 8, 8], [4, 4, 2])]
    metrics = training.Metrics(torch.tensor(0.0), *counts)
    assert metrics.accept_length == 1 + 0.5 + 0.5 * 0.5 + 0.5 * 0.5 * 0.25


def test_coverage_counts_supervised_tokens_whose_argmax_is_in_the_draft_vocab() -> None:
    batch = make_target_batch((5,))
    batch.logits = torch.zeros(1, SEQUENCE_LENGTH, VOCAB_SIZE)
    # The first four slots are supervised: ids 5 and 30 are in the draft vocab, 4 and 6 are not.
    for column, token_id in enumerate([5, 4, 30, 6, 5, 5, 5]):
        batch.logits[0, column, token_id] = 1
    metrics = training.evaluate(make_trainer(), [batch, batch])
    assert metrics.supervised[0] == 2 * 4
    assert metrics.covered[0] == 2 * 2
    assert metrics.coverage == 0.5
