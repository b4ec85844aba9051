"""NeMo AutoModel's own EAGLE-3 trainer and draft, unchanged, cannot tell our target from its own.

Needs `pip install --no-deps nemo-automodel==0.7.0` and what its EAGLE modules import (dependency
group `peer`). Its padded positions carry aux states and its unsupervised rows carry probabilities;
ours are zeros there, so equal losses and parameters also show that its trainer reads neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tests.peer.batches import (
    DRAFT_VOCAB_SIZE,
    NUM_LAYERS,
    STEPS,
    TTT_STEPS,
    UNSUPERVISED_STEP,
    VARIANTS,
    VOCAB_SIZE,
    Variant,
    make_batches,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eagle3_client import RemoteEagle3Backend
from eagle3_schemas import Eagle3TargetBatch
from eagle3_server import HFEagle3TargetModel

pytestmark = pytest.mark.slow  # the peer's import alone takes 10 s


@dataclass
class Run:
    """Everything one training run shows."""

    losses: list[float]
    metrics: list[tuple[Tensor, ...]]
    largest_gradients: dict[str, float]
    parameters: dict[str, Tensor]


def target_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=VOCAB_SIZE,
        initializer_range=0.1,  # the default gives nearly uniform distributions
    )


def make_target(variant: Variant) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(target_config()).to(variant.target_dtype).eval()


def make_draft_vocab(peer: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Return the peer's own mapping: the ids most often supervised, ordered by frequency."""
    ids, mask = peer.build_eagle3_token_mapping(
        make_batches(Variant()), target_vocab_size=VOCAB_SIZE, draft_vocab_size=DRAFT_VOCAB_SIZE
    )
    assert ids.numel() == DRAFT_VOCAB_SIZE
    assert not torch.equal(ids, ids.sort().values), "ordered by frequency, not ascending"
    return ids, mask


def train(
    peer: SimpleNamespace,
    backend: object,
    target_batches: Iterable[Eagle3TargetBatch],
    draft_vocab: tuple[Tensor, Tensor],
    variant: Variant,
) -> Run:
    """Train the peer's draft with the peer's trainer, as its recipe sets both up."""
    torch.manual_seed(2)
    config = LlamaConfig(
        **{
            **target_config().to_dict(),
            "draft_vocab_size": DRAFT_VOCAB_SIZE,
            "target_hidden_size": target_config().hidden_size,
            "attn_implementation": "eager",
        }
    )
    draft = peer.LlamaEagle3DraftModel(config).to(variant.draft_dtype)
    draft.copy_embeddings_from_target(backend.get_input_embeddings())
    draft.set_vocab_mapping(draft_vocab[0])
    draft.freeze_embeddings()
    trainer = peer.Eagle3TrainerModule(
        draft,
        selected_token_ids=draft_vocab[0],
        selected_token_mask=draft_vocab[1],
        ttt_steps=TTT_STEPS,
        lk_loss_type=variant.lk_loss_type,
    )
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    run = Run([], [], dict.fromkeys(trained, 0.0), {})
    for batch in target_batches:
        inputs = batch.to_trainer_inputs()
        if inputs["aux_hidden_states"].dtype != variant.draft_dtype:
            assert not isinstance(backend, RemoteEagle3Backend), "output_dtype was not applied"
            inputs["aux_hidden_states"] = inputs["aux_hidden_states"].to(variant.draft_dtype)
        step = trainer(**inputs)
        step.loss.backward()
        for name, parameter in trained.items():
            largest = float(parameter.grad.abs().max())
            run.largest_gradients[name] = max(run.largest_gradients[name], largest)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.losses.append(step.loss.item())
        run.metrics.append(
            (step.accuracy, step.valid_tokens, step.step_prefix_hits, step.step_valid)
        )
    run.parameters = draft.state_dict()
    return run


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def assert_same_run(run: Run, expected: Run) -> None:
    """Bit for bit: losses, the trainer's other metrics, and the trained draft."""
    assert run.losses == expected.losses
    assert len(run.metrics) == len(expected.metrics) == STEPS
    for got, wanted in zip(run.metrics, expected.metrics, strict=True):
        assert all(map(torch.equal, got, wanted))
    assert run.largest_gradients == expected.largest_gradients
    assert run.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        assert torch.equal(run.parameters[name], parameter), name


def client_options(variant: Variant) -> dict[str, object]:
    # Patience would only hide a server that keeps giving wrong answers.
    return {"exact": True, "output_dtype": variant.draft_dtype, "max_retries": 1}


def generate(backend: object, variant: Variant) -> Iterator[Eagle3TargetBatch]:
    return (backend.generate_batch(**batch) for batch in make_batches(variant))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_its_trainer_gives_the_same_bits_on_all_four_targets(peer, targets, variant):
    model, draft_vocab = make_target(variant), make_draft_vocab(peer)
    runs = {}
    # The peer's remote client takes no packed rows.
    names = [n for n in targets.names if not (variant.is_packed and n == "peer_remote")]
    for name in names:
        options = client_options(variant) if name == "our_remote" else {}
        with targets.connect(name, model, **options) as backend:
            backend.set_vocab_mapping(*draft_vocab)
            runs[name] = train(peer, backend, generate(backend, variant), draft_vocab, variant)
        print(f"{name}: {runs[name].losses}")

    expected = runs["peer_colocated"]
    for name in names[1:]:
        assert_same_run(runs[name], expected)
    # Equal for a reason: every parameter had a gradient, and the draft learned.
    assert all(gradient > 0 for gradient in expected.largest_gradients.values())
    losses = [loss for loss in expected.losses if loss != 0]
    assert (expected.losses[UNSUPERVISED_STEP] == 0) is variant.is_sparse
    assert len(set(losses)) == len(losses) > STEPS // 2
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("name", ["fp32", "sparse", "bf16"])
def test_batches_equal_its_own_supervision(peer, targets, name):
    variant = VARIANTS[name]
    model, draft_vocab = make_target(variant), make_draft_vocab(peer)
    theirs, ours = peer.HFEagle3TargetModel(model), HFEagle3TargetModel(model)
    assert tuple(theirs.aux_layer_ids) == ours.aux_layer_ids
    supervised = outside_draft_vocab = 0
    with targets.connect("our_remote", model, exact=True, max_retries=1) as backend:
        backend.set_vocab_mapping(*draft_vocab)
        embeddings = backend.get_input_embeddings().weight
        assert torch.equal(embeddings, theirs.get_input_embeddings().weight)
        for batch in make_batches(variant):
            expected = peer.server.compute_supervision(theirs, *draft_vocab, **batch)
            remote = backend.generate_batch(**batch)
            for field in ("input_ids", "loss_mask", "position_mask"):
                assert_same(getattr(remote, field), expected[field])
            assert_same(remote.attention_mask, batch["attention_mask"])
            attended = batch["attention_mask"].bool()
            rows = expected["position_mask"].squeeze(-1)
            for field, sent in (("aux_hidden_states", attended), ("target_probs", rows)):
                assert_same(getattr(remote, field)[sent], expected[field][sent])
                assert not getattr(remote, field)[~sent].any(), "zeros where nothing was sent"
            supervised += int(rows.sum())
            outside_draft_vocab += int(expected["loss_mask"].sum() - rows.sum())

            local = ours.generate_batch(**batch).to_trainer_inputs()
            reference = theirs.generate_batch(**batch).to_trainer_inputs()
            assert local.keys() == reference.keys()
            for field, tensor in reference.items():
                assert_same(local[field], tensor)
    assert supervised > 0
    assert outside_draft_vocab > 0


@pytest.mark.parametrize("error", ["aux_layers_off_by_one", "two_draft_ids_swapped"])
def test_a_planted_error_changes_the_losses(peer, targets, error):
    variant = VARIANTS["fp32"]
    model, (ids, mask) = make_target(variant), make_draft_vocab(peer)
    served_ids, options = ids, client_options(variant)
    if error == "aux_layers_off_by_one":  # ours read as vLLM's, or the reverse
        options["aux_layer_ids"] = [i + 1 for i in HFEagle3TargetModel(model).aux_layer_ids]
    else:
        served_ids = ids[[1, 0, *range(2, len(ids))]]
    right = peer.HFEagle3TargetModel(model)
    with targets.connect("our_remote", model, **options) as wrong:
        wrong.set_vocab_mapping(served_ids, mask)
        expected, run = (
            train(peer, backend, generate(backend, variant), (ids, mask), variant)
            for backend in (right, wrong)
        )
    print(f"right: {expected.losses}\n{error}: {run.losses}")
    assert all(got != wanted for got, wanted in zip(run.losses, expected.losses, strict=True))
    with pytest.raises(AssertionError):
        assert_same_run(run, expected)


def test_its_recipe_prefetches_from_our_client(peer, targets, recipe):
    variant = VARIANTS["fp32"]
    model, draft_vocab = make_target(variant), make_draft_vocab(peer)
    colocated = peer.HFEagle3TargetModel(model)
    expected = train(peer, colocated, generate(colocated, variant), draft_vocab, variant)

    with targets.our_url(model) as url:
        settings = {"remote_urls": [url], "target_prefetch_depth": 8}
        trainer = recipe()
        trainer._setup_remote_target(settings)
        with trainer.target_wrapper as backend:
            backend.set_vocab_mapping(*draft_vocab)
            trainer.target_prefetch_depth = trainer._resolve_prefetch_depth(settings)
            assert trainer.target_prefetch_depth == backend.num_remote_servers > 1
            pairs = trainer._prefetched_batches(make_batches(variant))
            target_batches = (target_batch for _, target_batch in pairs)
            run = train(peer, backend, target_batches, draft_vocab, variant)
            assert_same_run(run, expected)

            # An epoch that breaks off waits for what is in flight; the client then serves on.
            broken_off = trainer._prefetched_batches(make_batches(variant))
            batch, first = next(broken_off)
            broken_off.close()
            assert_same(backend.generate_batch(**batch).target_probs, first.target_probs)
