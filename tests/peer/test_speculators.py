"""speculators' own EAGLE-3 and P-EAGLE drafts train on our captures as on a local forward.

The reference is a forward of the target here, then speculators' own `shift_batch` and `CollateFn`.
Needs `pip install --group peer` and, without their stacks, speculators and hs-connectors 0.9.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from tests.peer.batches import DRAFT_VOCAB_SIZE, VOCAB_SIZE, Variant, make_batches
from tests.peer.local_target import (
    EPS,
    HIDDEN_SIZE,
    draft_vocab_ids,
    llama_config,
    local_states,
    make_target,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from eagle3_client import RemoteEagle3Backend, to_t2d_d2t
from eagle3_client.adapters import speculators_inputs, speculators_weights
from eagle3_schemas.capture import Capture

pytestmark = pytest.mark.slow  # its import alone takes 10 s

STEPS, TTT_STEPS, NUM_DEPTHS = 5, 3, 4
LAYER_INPUTS = [2, 4, 6]  # what speculators names
BATCHES = {
    "right_padded": Variant(),
    "left_padded": Variant(),
    "packed": Variant(is_packed=True),
    "bf16": Variant(target_dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def spec() -> SimpleNamespace:
    """What is used of speculators; without it nothing is compared, so its absence is a failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import speculators
            from speculators.losses import resolve_loss_config
            from speculators.models.eagle3.data import shift_batch
            from speculators.proposals.greedy import GreedyTokenProposalConfig
            from speculators.train.data import CollateFn
    except ImportError as exc:
        pytest.fail(
            f"speculators cannot be imported ({exc}); `make test-all` installs it, as do `pip "
            "install --group peer` and `pip install --no-deps speculators==0.9.0 "
            "hs-connectors==0.9.0`",
            pytrace=False,
        )
    return SimpleNamespace(
        package=speculators,
        shift_batch=shift_batch,
        CollateFn=CollateFn,
        GreedyTokenProposalConfig=GreedyTokenProposalConfig,
        # The default is a Triton kernel.
        loss_config=resolve_loss_config("kl_div", "eager"),
    )


@dataclass
class Run:
    losses: list[float]
    parameters: dict[str, Tensor]


def batches_of(name: str) -> list[dict[str, Tensor]]:
    batches = make_batches(BATCHES[name])[:STEPS]
    if name == "left_padded":
        for batch in batches:
            shifts = (1 - batch["attention_mask"]).sum(1).tolist()
            for key, rows in batch.items():
                batch[key] = torch.stack([r.roll(n) for r, n in zip(rows, shifts, strict=True)])
    return batches


def documents_of(batch: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Give each document's row and the columns of its tokens."""
    for row, attended in enumerate(batch["attention_mask"].bool()):
        if "seq_lens" not in batch:
            yield row, attended.nonzero()[:, 0]
            continue
        for columns in torch.arange(len(attended)).split(batch["seq_lens"][row].tolist()):
            yield row, columns[attended[columns]]


def local_inputs(
    spec: SimpleNamespace, target: LlamaForCausalLM, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what speculators' own data path makes of a local forward, without padding."""
    states = local_states(target, batch)
    aux = torch.cat([states.layer_inputs[i] for i in LAYER_INPUTS], dim=-1)
    samples = [
        {
            "hidden_states": aux[row, columns],
            "verifier_last_hidden_states": states.prenorm[row, columns],
            "input_ids": batch["input_ids"][row, columns],
            "loss_mask": batch["loss_mask"][row, columns],
            "lengths": torch.tensor([len(columns)]),
            "position_ids": torch.arange(len(columns)),
        }
        for row, columns in documents_of(batch)
    ]
    length = sum(len(sample["input_ids"]) - 1 for sample in samples)
    collate = spec.CollateFn(length, HIDDEN_SIZE, 3, aux.dtype, spec.shift_batch)
    inputs = collate(samples)
    assert inputs.pop("error_records") == 0
    return inputs


def local_weights(target: LlamaForCausalLM, t2d: Tensor) -> dict[str, Tensor]:
    head = target.lm_head.weight[t2d]
    return {
        "embed_tokens.weight": target.model.embed_tokens.weight,
        "lm_head.weight": head,
        "verifier_lm_head.weight": head,
        "verifier_norm.weight": target.model.norm.weight,
    }


def captures(
    backend: RemoteEagle3Backend, batches: list[dict[str, Tensor]], *outputs: str
) -> Iterator[Capture]:
    layer_outputs = [i - 1 for i in LAYER_INPUTS]
    for batch in batches:
        yield backend.capture(
            **batch,
            outputs=("aux", "last_hidden_prenorm", *outputs),
            aux_layer_ids=layer_outputs,
        )


def train(
    spec: SimpleNamespace,
    inputs: list[dict[str, Tensor]],
    weights: dict[str, Tensor],
    algorithm: str = "eagle3",
) -> Run:
    """Train a draft of speculators' on the batches, as its trainer calls it."""
    layer = llama_config(1)
    layer._attn_implementation = "eager"
    package = spec.package
    common = {
        "transformer_layer_config": layer,
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "eagle_aux_hidden_state_layer_ids": LAYER_INPUTS,
        "speculators_config": package.SpeculatorsConfig(
            algorithm=algorithm,
            proposal_methods=[spec.GreedyTokenProposalConfig(speculative_tokens=TTT_STEPS)],
            default_proposal_method="greedy",
            verifier=package.VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    }
    torch.manual_seed(2)  # of the parameters, and of what P-EAGLE samples
    if algorithm == "eagle3":
        draft = package.Eagle3DraftModel(package.Eagle3SpeculatorConfig(**common))
        arguments = {"ttt_steps": TTT_STEPS, "ttt_step_loss_decay": 1.0}
    else:
        draft = package.PEagleDraftModel(package.PEagleSpeculatorConfig(**common, mask_token_id=0))
        arguments = {"num_depths": NUM_DEPTHS}
    mapping = to_t2d_d2t(draft_vocab_ids(), VOCAB_SIZE)
    draft.load_vocab_mappings(mapping.t2d, mapping.d2t)
    assert not draft.load_state_dict(weights, strict=False).unexpected_keys
    draft.train()
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    run = Run([], {})
    for batch in inputs:
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=batch["hidden_states"].dtype == torch.bfloat16
        ):
            _, loss, _ = draft(**batch, **arguments, loss_config=spec.loss_config)
        optimizer.zero_grad()
        loss.backward()
        assert any(bool(p.grad.any()) for p in trained if p.grad is not None)
        optimizer.step()
        run.losses.append(loss.item())
    run.parameters = draft.state_dict()
    return run


def assert_same_run(run: Run, expected: Run) -> None:
    """Bit for bit: losses, and the trained draft."""
    assert run.losses == expected.losses
    assert len(set(run.losses)) == STEPS, "equal for a reason: it learns, and nothing is NaN"
    assert all(loss > 0 for loss in run.losses)
    assert run.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        assert torch.equal(run.parameters[name], parameter), name


@pytest.mark.parametrize(
    ("name", "algorithm"), [*((name, "eagle3") for name in BATCHES), ("packed", "peagle")]
)
def test_its_drafts_train_to_the_same_bits(spec, live_server, name, algorithm):
    target, batches = make_target(BATCHES[name].target_dtype), batches_of(name)
    t2d = to_t2d_d2t(draft_vocab_ids(), VOCAB_SIZE).t2d
    expected_inputs = [local_inputs(spec, target, batch) for batch in batches]
    expected = train(spec, expected_inputs, local_weights(target, t2d), algorithm)

    with RemoteEagle3Backend(live_server(target), exact=True) as backend:
        embeddings = backend.get_input_embeddings().weight
        head = backend.get_target_head()
        weights = speculators_weights(embeddings, head, t2d, rms_norm_eps=EPS)
        inputs = [speculators_inputs(capture) for capture in captures(backend, batches)]
    for got, wanted in zip(inputs, expected_inputs, strict=True):
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert got[key].dtype == tensor.dtype, key
            assert torch.equal(got[key], tensor), key
    run = train(spec, inputs, weights, algorithm)
    print(f"local: {expected.losses}\nserved: {run.losses}")
    assert_same_run(run, expected)


@pytest.mark.parametrize("error", ["post_norm", "layers_reversed", "ids_unshifted"])
def test_a_planted_error_changes_the_losses(spec, live_server, error):
    target, batches = make_target(torch.float32), batches_of("right_padded")
    weights = local_weights(target, to_t2d_d2t(draft_vocab_ids(), VOCAB_SIZE).t2d)
    expected = train(spec, [local_inputs(spec, target, batch) for batch in batches], weights)
    wrong = []
    with RemoteEagle3Backend(live_server(target), exact=True) as backend:
        for batch, capture in zip(batches, captures(backend, batches, "last_hidden"), strict=True):
            outputs = dict(capture.outputs)
            if error == "post_norm":
                outputs["last_hidden_prenorm"] = outputs["last_hidden"]
            elif error == "layers_reversed":
                layers = reversed(capture.aux_layer_ids)
                outputs["aux"] = torch.cat([capture.aux_of(i) for i in layers], dim=-1)
            ids = batch["input_ids"] if error == "ids_unshifted" else capture.input_ids
            wrong.append(speculators_inputs(replace(capture, outputs=outputs, input_ids=ids)))
    run = train(spec, wrong, weights)
    print(f"right: {expected.losses}\n{error}: {run.losses}")
    assert all(got != wanted for got, wanted in zip(run.losses, expected.losses, strict=True))
    with pytest.raises(AssertionError):
        assert_same_run(run, expected)


def test_the_pages_code_trains_its_draft(spec, live_server, documented):
    """docs/integrations.md's block as printed, to the same losses as above."""
    (code,) = documented
    target, batches = make_target(torch.float32), batches_of("right_padded")
    weights = local_weights(target, to_t2d_d2t(draft_vocab_ids(), VOCAB_SIZE).t2d)
    expected = train(spec, [local_inputs(spec, target, batch) for batch in batches], weights)
    losses: list[float] = []
    optimizers: list[torch.optim.Optimizer] = []

    def optimizer_step(draft):
        if not optimizers:
            trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
            optimizers.append(torch.optim.AdamW(trained, lr=3e-3))
        losses.append(names["loss"].item())
        optimizers[0].step()
        optimizers[0].zero_grad()

    layer = llama_config(1)
    layer._attn_implementation = "eager"
    with RemoteEagle3Backend(live_server(target), exact=True) as backend:
        names = {
            "target": backend,
            "selected_token_ids": draft_vocab_ids().flip(0),
            "layer_config": layer,
            "layer_inputs": LAYER_INPUTS,
            "batches": batches,
            "optimizer_step": optimizer_step,
        }
        torch.manual_seed(2)
        exec(code, names)
    assert losses == expected.losses
