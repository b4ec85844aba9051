"""A quantised target gives what its own model gives: hooks, head, encodings, served and beside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tests.quantised.checkpoints import L, V
from tests.quantised.conftest import FORMS
from tests.server.self_check.planting import join
from torch import Tensor

from eagle3_schemas.self_check import SELF_CHECKS
from eagle3_server import HFEagle3TargetModel
from eagle3_server.quantization import why_not_to_trim

pytestmark = pytest.mark.slow
LAYERS = (L - 1, 0, 3)


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def target(form: str, load: Any) -> Any:
    return load(form)


@pytest.fixture
def model(form: str, checkpoint_of: Any) -> Iterator[Any]:
    """A second copy, loaded by transformers alone, on which no code under test ever ran."""
    from eagle3_server.quantization import quantization_config

    path, quantization = checkpoint_of(form)
    extra = {}
    if quantization is not None:
        extra["quantization_config"] = quantization_config(quantization, torch.float32)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": "cpu"}, **extra
    )
    return loaded.eval().requires_grad_(False)


@pytest.fixture
def ids(frequency_ordered: Any) -> Tensor:
    found: Tensor = frequency_ordered(V, 53)
    return found


def test_head_stays_plain_and_every_encoding_is_offered(target: Any, form: str) -> None:
    described = target.describe()
    assert (described.head, described.head_reason) == ("rows", None)
    assert described.encodings == ("probs", "logits", "hidden")
    assert described.quantization is not None
    assert type(target._model.get_output_embeddings().weight.data) is torch.Tensor


def test_what_was_proved_at_load_is_proved_again(target: Any) -> None:
    """Whose activations are quantised has rows that depend on one another, packed or not."""
    assert target.describe().hooks == "verified"
    found = {name: target.self_check(name) for name in SELF_CHECKS}
    expected = dict.fromkeys(SELF_CHECKS, "passed")
    if why_not_to_trim(target._model) is not None:
        expected["packing"] = "not_applicable"
        assert "rows of this target depend on one another" in found["packing"].words
    assert {name: each.status for name, each in found.items()} == expected, found


def test_documents_that_are_not_kept_apart_are_found_all_the_same(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(monkeypatch)
    assert target.self_check("packing").status == "failed"


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_served_exact_is_the_definition_and_the_co_located_target(
    target: Any, model: Any, ids: Tensor, encoding: str, left: bool, serve: Any, connect: Any,
    batch_of: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    """Layers against `output_hidden_states` and a pre-hook, rows against the full logits."""
    inputs = batch_of(V, (24, 17, 9), left=left)
    backend = connect(serve(target), ids, exact=True, encoding=encoding, aux_layer_ids=LAYERS)
    batch = backend.generate_batch(*inputs)
    matches(batch, expect(model, inputs, ids, LAYERS))
    beside = HFEagle3TargetModel(model, LAYERS).generate_batch(*inputs)
    attended, rows = inputs.attention_mask.bool(), batch.position_mask.squeeze(-1)
    assert torch.equal(batch.aux_hidden_states[attended], beside.aux_hidden_states[attended])
    assert rows.sum() > 4
    assert torch.equal(batch.target_probs[rows], beside.logits[rows][:, ids].float().softmax(-1))


def test_default_mode_is_exact_but_for_rounding(
    target: Any, model: Any, ids: Tensor, serve: Any, connect: Any, batch_of: Any, expect: Any
) -> None:
    """Ten columns of padding: cut where that only rounds, computed where it would do more."""
    inputs = batch_of(V, (34, 20, 9))
    for tensor in inputs:
        tensor[:, 24:] = 0
    batch = connect(serve(target), ids, aux_layer_ids=LAYERS).generate_batch(*inputs)
    expected = expect(model, inputs, ids, LAYERS)
    if not target._runner.can_trim:
        assert torch.equal(batch.target_probs, expected.target_probs)
        assert torch.equal(batch.aux_hidden_states, expected.aux_hidden_states)
    assert torch.equal(batch.position_mask, expected.position_mask)
    torch.testing.assert_close(batch.target_probs, expected.target_probs, rtol=0, atol=5e-5)
    scale = float(expected.aux_hidden_states.square().mean().sqrt())
    error = (batch.aux_hidden_states - expected.aux_hidden_states).abs().max() / scale
    assert error < 5e-5


def test_targets_whose_activations_are_quantised_are_not_trimmed(target: Any, form: str) -> None:
    quantises_activations = ("int8" in form and "bnb" in form) or "dynamic" in form
    quantises_activations |= form.startswith("compressed")
    assert target._runner.can_trim is not quantises_activations
    if "bnb-int8" in form:  # known, not left to what a probe of random tokens happens to show
        assert "depends on all rows of a batch" in str(why_not_to_trim(target._model))


def test_packed_rows_are_the_co_located_targets(
    target: Any, model: Any, ids: Tensor, serve: Any, connect: Any, batch_of: Any
) -> None:
    from eagle3_schemas.packing import restarting_positions

    inputs = batch_of(V, (24, 24))
    seq_lens = torch.tensor([[10, 14, 0], [7, 9, 8]])
    packed = {"seq_lens": seq_lens, "position_ids": restarting_positions(seq_lens, 24)}
    backend = connect(serve(target), ids, exact=True, aux_layer_ids=LAYERS)
    batch = backend.generate_batch(*inputs, **packed)
    beside = HFEagle3TargetModel(model, LAYERS).generate_batch(*inputs, **packed)
    assert torch.equal(batch.aux_hidden_states, beside.aux_hidden_states)
    rows = batch.position_mask.squeeze(-1)
    assert torch.equal(batch.target_probs[rows], beside.logits[rows][:, ids].float().softmax(-1))
