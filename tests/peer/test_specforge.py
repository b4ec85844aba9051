"""SpecForge's own EAGLE-3 model and draft train on our captures as on its own offline features.

The reference is a forward of the target here, then SpecForge's own normaliser, collate, target head
and shift. Needs `pip install --group peer` and, without its stack, specforge 0.2.0.

Its loss is a Triton kernel, and the CPU has none: the model is given the reference implementation
beside it, `_compute_loss`, and an empty module stands for Triton while it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.peer.batches import DRAFT_VOCAB_SIZE, SEQUENCE_LENGTH, VOCAB_SIZE, Variant, make_batches
from tests.peer.local_target import draft_vocab_ids, llama_config, local_states, make_target
from torch import Tensor
from transformers import LlamaForCausalLM

from eagle3_client import RemoteEagle3Backend, to_t2d_d2t
from eagle3_client.adapters import specforge_inputs
from eagle3_schemas import shift_left_with_zero

pytestmark = pytest.mark.slow

STEPS, TTT_STEPS = 3, 3
AUX_LAYER_IDS = [1, 3, 5]  # layer outputs, as SpecForge names them
LEARNING_RATE = 3e-3


@contextmanager
def triton_stands_in() -> Iterator[None]:
    """Let `import triton` find an empty module, if there is none; torch must not see it."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.jit, triton.language, language.constexpr = (lambda function: function), language, int
    torch.compile(lambda x: x)  # loads all that looks for Triton
    stubs = {"triton": triton, "triton.language": language}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


@pytest.fixture(scope="module")
def forge() -> Iterator[SimpleNamespace]:
    """What is used of SpecForge; without it nothing is compared, so its absence is a failure."""
    names = {
        "loss": "core.loss",
        "model": "algorithms.eagle3.model",
        "data": "algorithms.eagle3.data",
        "draft": "modeling.draft.llama3_eagle",
        "target_head": "modeling.target.target_head",
        "strategies": "training.strategies.base",
    }
    try:
        with warnings.catch_warnings(), triton_stands_in():
            warnings.simplefilter("ignore")
            modules = {
                key: importlib.import_module(f"specforge.{name}") for key, name in names.items()
            }
    except ImportError as exc:
        pytest.fail(
            f"SpecForge cannot be imported ({exc}); `make test-all` installs it, as do `pip "
            "install --group peer` and `pip install --no-deps specforge==0.2.0`",
            pytrace=False,
        )
    package = SimpleNamespace(**modules)
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        reference = SimpleNamespace(apply=package.loss._compute_loss)
        patch.setattr(package.model, "LogSoftmaxLoss", reference)
        yield package


def batches() -> list[dict[str, Tensor]]:
    """Return batches of which each has a row without padding, as SpecForge pads to the longest."""
    found = [
        batch
        for batch in make_batches(Variant())
        if int(batch["attention_mask"].sum(1).max()) == SEQUENCE_LENGTH
    ]
    assert len(found) >= STEPS
    return found[:STEPS]


def its_head(forge: SimpleNamespace, target: LlamaForCausalLM, path: Path) -> torch.nn.Module:
    """Return SpecForge's target head, loaded from a checkpoint as it does; it runs in bf16."""
    target.save_pretrained(path, max_shard_size="100KB")  # it reads sharded ones only
    head = forge.target_head.TargetHead.from_pretrained(str(path))
    if target.dtype == torch.float32:
        head.float().load_weights(str(path))
    return head


def local_inputs(
    forge: SimpleNamespace,
    target: LlamaForCausalLM,
    head: torch.nn.Module,
    batch: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return what SpecForge's offline path makes of a local forward."""
    states = local_states(target, batch)
    aux = torch.cat([states.layer_inputs[i + 1] for i in AUX_LAYER_IDS], dim=-1)
    samples = []
    for row, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        raw = {
            "aux_hidden_state": aux[row : row + 1, :n],
            "hidden_state": states.layer_inputs[-1][row : row + 1, :n],
            "input_ids": batch["input_ids"][row, :n],
            "loss_mask": batch["loss_mask"][row, :n],
        }
        samples.append(forge.data.normalize_offline_sample(raw, max_len=SEQUENCE_LENGTH))
    tensors = forge.data.build_offline_collator()(samples)
    with torch.no_grad():
        input_ids, target_logits, loss_mask = forge.strategies._prepare_eagle_target(
            target_head=head,
            target_repr="hidden_state",
            input_ids=tensors["input_ids"],
            target=tensors["target"],
            loss_mask=tensors["loss_mask"],
            device=torch.device("cpu"),
        )
    return {
        "hidden_states": tensors["hidden_state"],
        "input_ids": input_ids,
        "target": target_logits,
        "loss_mask": loss_mask,
        "attention_mask": tensors["attention_mask"],
    }


def train(
    forge: SimpleNamespace, target: LlamaForCausalLM, inputs: list[dict[str, Tensor]]
) -> tuple[list[float], dict[str, Tensor]]:
    """Train its draft by its test-time-training loop; its losses and parameters."""
    torch.manual_seed(2)
    config = llama_config(1, draft_vocab_size=DRAFT_VOCAB_SIZE, pad_token_id=0)
    draft = forge.draft.LlamaForCausalLMEagle3(config).to(target.dtype)
    draft.embed_tokens.weight.data.copy_(target.model.embed_tokens.weight)
    draft.freeze_embedding()
    mapping = to_t2d_d2t(draft_vocab_ids(), VOCAB_SIZE)
    draft.t2d.copy_(mapping.t2d)
    draft.d2t.copy_(mapping.d2t)
    model = forge.model.OnlineEagle3Model(draft, TTT_STEPS, attention_backend="sdpa").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    losses = []
    for batch in inputs:
        step_losses, *_ = model(**batch)
        loss = sum(0.8**i * step_loss for i, step_loss in enumerate(step_losses))
        optimizer.zero_grad()
        loss.backward()
        assert any(bool(p.grad.any()) for p in trained if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    return losses, draft.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_its_draft_trains_to_the_same_bits(forge, live_server, tmp_path, dtype):
    target = make_target(dtype)
    head = its_head(forge, target, tmp_path)
    expected_inputs = [local_inputs(forge, target, head, batch) for batch in batches()]
    expected, expected_parameters = train(forge, target, expected_inputs)

    with RemoteEagle3Backend(live_server(target), exact=True) as backend:
        whole_head = backend.get_target_head()
        inputs = [
            specforge_inputs(
                backend.capture(
                    **batch, outputs=("aux", "last_hidden"), aux_layer_ids=AUX_LAYER_IDS
                ),
                whole_head,
                batch["loss_mask"],
            )
            for batch in batches()
        ]
    for got, wanted in zip(inputs, expected_inputs, strict=True):
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert got[key].dtype == tensor.dtype, key
            assert torch.equal(got[key], tensor), key
    losses, parameters = train(forge, target, inputs)
    print(f"local: {expected}\nserved: {losses}")
    assert losses == expected
    assert len(set(losses)) == STEPS, "equal for a reason: it learns, and nothing is NaN"
    assert all(loss > 0 for loss in losses)
    assert parameters.keys() == expected_parameters.keys()
    for name, parameter in expected_parameters.items():
        assert torch.equal(parameters[name], parameter), name


@pytest.mark.parametrize("error", ["layers_reversed", "ids_unshifted", "pre_norm", "mask_shifted"])
def test_a_planted_error_changes_the_losses(forge, tmp_path, error):
    """So the losses above depend on each tensor compared."""
    target = make_target(torch.float32)
    head = its_head(forge, target, tmp_path)
    right = [local_inputs(forge, target, head, batch) for batch in batches()]
    wrong = []
    for batch, inputs in zip(batches(), right, strict=True):
        change = {
            "layers_reversed": {
                "hidden_states": torch.cat(inputs["hidden_states"].chunk(3, dim=-1)[::-1], dim=-1)
            },
            "ids_unshifted": {"input_ids": batch["input_ids"]},
            "pre_norm": {
                "target": head(shift_left_with_zero(local_states(target, batch).prenorm)).detach()
            },
            "mask_shifted": {"loss_mask": shift_left_with_zero(inputs["loss_mask"])},
        }[error]
        wrong.append(inputs | change)
    (expected, _), (losses, _) = train(forge, target, right), train(forge, target, wrong)
    print(f"right: {expected}\n{error}: {losses}")
    assert all(got != wanted for got, wanted in zip(losses, expected, strict=True))


def test_the_pages_code_trains_its_draft(forge, live_server, tmp_path, documented):
    """docs/integrations.md's block as printed, to the losses of its own offline features."""
    (code,) = documented
    target = make_target(torch.float32)
    head = its_head(forge, target, tmp_path)
    local = [local_inputs(forge, target, head, batch) for batch in batches()]
    expected, _ = train(forge, target, local)
    losses: list[float] = []
    optimizers: list[torch.optim.Optimizer] = []

    def optimizer_step(draft):
        if not optimizers:
            trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
            optimizers.append(torch.optim.AdamW(trained, lr=LEARNING_RATE))
        losses.append(names["loss"].item())
        optimizers[0].step()
        optimizers[0].zero_grad()

    url = live_server(target)
    with RemoteEagle3Backend(url, exact=True, aux_layer_ids=AUX_LAYER_IDS) as backend:
        names = {
            "target": backend,
            "selected_token_ids": draft_vocab_ids(),
            "draft_config": llama_config(1, draft_vocab_size=DRAFT_VOCAB_SIZE, pad_token_id=0),
            "batches": batches(),
            "optimizer_step": optimizer_step,
        }
        torch.manual_seed(2)
        exec(code, names)
    assert losses == expected
