"""`POST /v1/self-check` names each error planted in a target that is served, and no other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.server.self_check.conftest import by_status
from tests.server.self_check.planting import (
    add_noise,
    change_runner,
    forget_transform,
    hook_layers,
    join,
    leak,
    one_back,
    spoil_row,
    swap,
)

from eagle3_server import TransformersTarget
from eagle3_server.packing import Packing


def test_what_is_right_passes(check: Any, target: TransformersTarget) -> None:
    found = check(target)
    assert by_status(found, "passed") == set(found)
    assert "all 7 layers are transformers' own hidden_states, bit" in found["hooks"]["words"]
    assert found["head"]["words"] == "66 rows x 131 ids equal the model's full logits"
    assert "in one forward under a mask; each document as a row" in found["packing"]["words"]
    assert "equal bits" in found["bits_repeat"]["words"]
    exact = {"hooks", "head", "bits_repeat"}
    assert {name for name, each in found.items() if each["largest_difference"] == 0} >= exact
    assert 0 <= found["packing"]["largest_difference"] < 1e-5


def test_a_hook_on_the_wrong_layer(
    check: Any, target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    for order, words in ((one_back, "layer 1 is layer 0's output"), (swap, "2 is layer 3's outp")):
        hook_layers(monkeypatch, order)
        found = check(target)
        assert by_status(found, "failed") == {"hooks"}
        assert words in found["hooks"]["words"]
        assert found["hooks"]["largest_difference"] > 0.01
        monkeypatch.undo()


def test_rows_without_the_softcap(check: Any, target: TransformersTarget) -> None:
    forget_transform(target)
    found = check(target)
    assert by_status(found, "failed") == {"head"}
    assert "1 rows differ from the model's full logits by" in found["head"]["words"]
    assert found["head"]["largest_difference"] > 0.1


@pytest.mark.parametrize("token_id", [1, 77, 130])
def test_a_wrong_row_of_the_head(
    check: Any, target: TransformersTarget, monkeypatch: pytest.MonkeyPatch, token_id: int
) -> None:
    spoil_row(monkeypatch, token_id)
    assert by_status(check(target), "failed") == {"head"}


def test_a_head_that_is_not_the_models(check: Any, target: TransformersTarget) -> None:
    head = target._runner.head
    assert head is not None
    change_runner(target, head=replace(head, module=copy.deepcopy(head.module)))
    found = check(target)
    assert by_status(found, "failed") == {"head"}
    assert "does not call the head that is served" in found["head"]["words"]


def test_a_head_whose_forward_changed_since(check: Any, build_model: Any) -> None:
    """A forward that looks at its logits, and does otherwise with those of one row."""
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")

    def looks(_module: Any, _args: Any, out: Any) -> None:
        if out.logits.shape[1] == 1:
            raise ValueError("one row")

    model.register_forward_hook(looks)
    found = check(target)
    assert by_status(found, "failed") == {"head"}
    assert "its forward fails: ValueError('one row')" in found["head"]["words"]


def test_weights_that_broke_since(check: Any, build_model: Any) -> None:
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    found = check(target)
    assert by_status(found, "failed") == {"head", "packing"}
    assert "in what is not finite" in found["head"]["words"]
    assert found["head"]["largest_difference"] is None
    assert "by nan" in found["packing"]["words"]


def test_a_mask_that_leaks(
    check: Any, target: TransformersTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak(monkeypatch)
    found = check(target)
    assert by_status(found, "failed") == {"packing"}
    words = "in one forward under a mask: packed documents differ from the same alone by"
    assert words in found["packing"]["words"]


def test_documents_that_are_not_kept_apart(
    check: Any, build_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a target whose documents are rows of their own, and nothing else."""
    target = TransformersTarget(build_model("mpt"), model_id="tiny")
    assert by_status(check(target), "passed") >= {"packing"}
    join(monkeypatch)
    found = check(target)
    assert by_status(found, "failed") == {"packing"}
    assert "each document as a row of its own: packed documents diff" in found["packing"]["words"]


def test_a_model_that_leaks_although_packing_is_claimed(check: Any, build_model: Any) -> None:
    """A layer that carries a state along the row, which no mask stops."""
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")

    def carries(_module: Any, _args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        state = state + 0.1 * state.cumsum(1)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    model.model.layers[2].register_forward_hook(carries)
    found = check(target)
    assert by_status(found, "failed") == {"packing"}
    assert "in one forward under a mask" in found["packing"]["words"]


def test_a_way_of_packing_that_the_model_does_not_take(check: Any, build_model: Any) -> None:
    target = TransformersTarget(build_model("mpt"), model_id="tiny")
    change_runner(target, packing=Packing("masked", None))
    found = check(target)
    assert by_status(found, "failed") == {"packing"}
    assert "takes no position_ids" in found["packing"]["words"]


@pytest.mark.parametrize("size", [1e-5, 1e-2, 3.0])
def test_a_model_that_does_not_repeat_itself(check: Any, build_model: Any, size: float) -> None:
    """Nothing else is blamed, however much it moves."""
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")
    add_noise(model, size)
    found = check(target)
    assert by_status(found, "failed") == {"bits_repeat"}
    assert "two equal forwards differ by" in found["bits_repeat"]["words"]
    if size > 1:
        assert "documents cannot be told" in found["packing"]["words"]


def test_what_was_known_at_load_is_no_failure(serve: Any, build_model: Any) -> None:
    """The server refuses `exact` then, so it claims nothing that is wrong."""

    def load() -> TransformersTarget:
        model = build_model("llama")
        target = TransformersTarget(model, model_id="tiny")
        add_noise(model, 1e-3)
        return target

    bridge = serve(load)
    while bridge.app_client.get("/readyz").status_code != 200:
        pass
    assert bridge.app_client.get("/v1/model").json()["deterministic"] is False
    (check,) = bridge.app_client.post("/v1/self-check").json()["checks"][-1:]
    assert (check["name"], check["status"]) == ("bits_repeat", "not_applicable")
    assert "as the server found at load: it refuses exact" in check["words"]


def test_a_forward_that_fails_is_told_of_each(check: Any, build_model: Any) -> None:
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")

    def fails(_module: Any, _args: Any, _output: Any) -> None:
        raise ValueError("broken")

    model.model.layers[1].register_forward_hook(fails)
    found = check(target)
    assert by_status(found, "failed") == {"head", "packing", "bits_repeat"}
    assert "its forward fails with output_hidden_states: ValueError" in found["hooks"]["words"]
    assert "ValueError; the server's log has the traceback" in found["head"]["words"]


def test_a_full_head_has_nothing_to_compare(check: Any, target: TransformersTarget) -> None:
    change_runner(target, head=None)
    found = check(target)
    assert found["head"]["status"] == "not_applicable"
    assert "full logits are what is served" in found["head"]["words"]
