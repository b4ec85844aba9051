"""NeMo AutoModel's P-EAGLE trainer and draft on captured outputs, and the rows it reads.

P-EAGLE is trained at every supervised position, whether or not the target's argmax is in the draft
vocab. Its trainer takes logits, of which it reads the draft vocab's columns alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tests.peer.batches import DRAFT_VOCAB_SIZE, VOCAB_SIZE, Variant, make_batches
from tests.peer.test_nemo_automodel import make_draft_vocab, make_target, target_config
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import shift_left_with_zero
from eagle3_server import HFEagle3TargetModel

pytestmark = pytest.mark.slow

STEPS, DEPTHS, MASK_TOKEN_ID = 12, 3, 0


@pytest.fixture(scope="module")
def peagle() -> SimpleNamespace:
    from nemo_automodel.components.speculative.eagle import peagle_draft, peagle_trainer

    return SimpleNamespace(draft=peagle_draft, trainer=peagle_trainer)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, block_mask: object, scale: float) -> Tensor:
    """Its FlexAttention, which has no backward on the CPU, as attention under the same mask."""
    size = q.shape[-2]
    index = torch.arange(size)
    allowed = block_mask.mask_mod(0, 0, index[:, None], index[None, :])  # type: ignore[attr-defined]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def train(
    peer: SimpleNamespace,
    peagle: SimpleNamespace,
    inputs: Iterator[dict[str, Tensor]],
    embeddings: object,
    draft_vocab: tuple[Tensor, Tensor],
) -> tuple[list[float], dict[str, Tensor]]:
    """Train the peer's P-EAGLE draft with the peer's trainer; losses and parameters."""
    torch.manual_seed(2)
    config = LlamaConfig(
        **{
            **target_config().to_dict(),
            "draft_vocab_size": DRAFT_VOCAB_SIZE,
            "target_hidden_size": target_config().hidden_size,
            "attn_implementation": "eager",
            "parallel_drafting": True,
        }
    )
    draft = peer.LlamaEagle3DraftModel(config).to(torch.float32)
    draft.copy_embeddings_from_target(embeddings)
    draft.set_vocab_mapping(draft_vocab[0])
    draft.freeze_embeddings()
    trainer = peagle.trainer.PEagleTrainerModule(
        draft,
        selected_token_ids=draft_vocab[0],
        selected_token_mask=draft_vocab[1],
        num_depths=DEPTHS,
        mask_token_id=MASK_TOKEN_ID,
    )
    trained = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for each in inputs:
        step = trainer(**each)
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step.loss.item())
    return losses, draft.state_dict()


def local_inputs(model: LlamaForCausalLM) -> Iterator[dict[str, Tensor]]:
    """What the peer's recipe gives its trainer: the target in its process, logits whole."""
    target = HFEagle3TargetModel(model)
    for each in make_batches(Variant())[:STEPS]:
        got = target.generate_batch(**each)
        yield {
            "input_ids": got.input_ids,
            "attention_mask": got.attention_mask,
            "loss_mask": got.loss_mask,
            "aux_hidden_states": got.aux_hidden_states,
            "target_logits": got.logits,
        }


def served_inputs(backend: RemoteEagle3Backend, ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """The same from a server: columns that are never read are NaN, should they be read."""
    batches = make_batches(Variant())[:STEPS]
    with backend.prefetch_capture(batches, outputs=("aux", "loss_mask_logits")) as prefetch:
        for _, got in prefetch:
            logits = torch.full((*got.input_ids.shape, VOCAB_SIZE), float("nan"))
            logits[..., ids] = got.loss_mask_logits
            yield {
                "input_ids": got.input_ids,
                "attention_mask": got.attention_mask,
                "loss_mask": got.loss_mask,
                "aux_hidden_states": got.aux,
                "target_logits": logits,
            }


def test_its_trainer_cannot_tell_a_served_target_from_its_own(
    peer: SimpleNamespace, peagle: SimpleNamespace, targets: object
) -> None:
    """Losses and the trained draft, bit for bit."""
    model = make_target(Variant())
    draft_vocab = make_draft_vocab(peer)
    with mock.patch.object(peagle.draft, "_peagle_flex_attention", dense_attention):
        expected = train(
            peer, peagle, local_inputs(model), model.get_input_embeddings(), draft_vocab
        )
        with targets.connect("our_remote", model, exact=True) as backend:  # type: ignore[attr-defined]
            backend.set_vocab_mapping(*draft_vocab)
            inputs = served_inputs(backend, draft_vocab[0])
            got = train(peer, peagle, inputs, backend.get_input_embeddings(), draft_vocab)
    assert got[0] == expected[0]
    assert len(got[0]) == STEPS
    assert expected[0][-1] < expected[0][0], "it learnt nothing"
    for name, parameter in expected[1].items():
        assert torch.equal(got[1][name], parameter), name


@pytest.mark.parametrize("rows", ["position_mask", "loss_mask"])
def test_probabilities_at_every_supervised_row(
    peer: SimpleNamespace, targets: object, rows: str
) -> None:
    """Against a loop from the definition; `rows` of the backend alone leaves some of them out."""
    model = make_target(Variant())
    ids, mask = make_draft_vocab(peer)
    outside = 0
    with targets.connect("our_remote", model, exact=True, rows=rows) as backend:  # type: ignore[attr-defined]
        backend.set_vocab_mapping(ids, mask)
        for each in make_batches(Variant())[:3]:
            with torch.no_grad():
                own = model(each["input_ids"], attention_mask=each["attention_mask"])
            logits = shift_left_with_zero(own.logits)
            captured = backend.capture(**each, outputs=["loss_mask_probs"]).loss_mask_probs
            batch = backend.generate_batch(**each)
            batch_size, length = each["input_ids"].shape
            for b in range(batch_size):
                for t in range(length):
                    is_supervised = t + 1 < length and bool(each["loss_mask"][b, t + 1])
                    expected = torch.softmax(logits[b, t, ids], -1) * is_supervised
                    assert torch.equal(captured[b, t], expected)
                    is_trained = is_supervised and bool(mask[logits[b, t].argmax()])
                    outside += is_supervised and not is_trained
                    if rows == "loss_mask" or is_trained:
                        assert torch.equal(batch.target_probs[b, t], expected)
                    else:
                        assert not batch.target_probs[b, t].any()
    assert outside > 10, "every argmax was in the draft vocab"
