"""Which layers are captured: the default rule against its definition, and every refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle3_schemas import (
    AUX_LAYER_CONVENTION,
    default_aux_layer_ids,
    from_layer_inputs,
    to_layer_inputs,
    validate_aux_layer_ids,
)
from eagle3_schemas.aux_layers import FEWEST_LAYERS, validate_layer_ids
from eagle3_schemas.errors import InvalidRequest

SHALLOWEST = 7  # below it two of [1, L//2 - 1, L - 4] are equal, or one is negative


@pytest.mark.parametrize("num_layers", range(SHALLOWEST, 81))
def test_the_default_is_early_middle_and_late_layer(num_layers: int) -> None:
    early, middle, late = default_aux_layer_ids(num_layers)
    assert early == 1
    assert middle + 1 == num_layers // 2
    assert num_layers - late == 4
    assert validate_aux_layer_ids((early, middle, late), num_layers) == (early, middle, late)


@pytest.mark.parametrize(
    ("num_layers", "ids"),
    [(7, (1, 2, 3)), (8, (1, 3, 4)), (30, (1, 14, 26)), (36, (1, 17, 32)), (80, (1, 39, 76))],
)
def test_the_default_of_known_targets(num_layers: int, ids: tuple[int, ...]) -> None:
    """As SpecForge and NeMo AutoModel have it, e.g. Qwen3-8B's 36 layers."""
    assert default_aux_layer_ids(num_layers) == ids
    assert num_layers >= FEWEST_LAYERS == SHALLOWEST


@pytest.mark.parametrize(
    ("num_layers", "ids"),
    [
        (0, [1, -1, -4]),
        (1, [1, -1, -3]),
        (2, [1, 0, -2]),
        (3, [1, 0, -1]),
        (4, [1, 1, 0]),
        (5, [1, 1, 1]),
        (6, [1, 2, 2]),
    ],
)
def test_too_shallow_a_target_says_so_and_what_to_do(num_layers: int, ids: list[int]) -> None:
    message = (
        f"a target with {num_layers} decoder layers is too shallow for the default aux_layer_ids "
        f"[1, L//2 - 1, L - 4] = {ids}, which must be 3 distinct ids in [0, {num_layers}); pass "
        "aux_layer_ids explicitly"
    )
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}$"):
        default_aux_layer_ids(num_layers)


@pytest.mark.parametrize("ids", [(0, 1, 2), (15, 0, 7), [13, 14, 15], range(3)])
def test_three_distinct_layers_are_kept_in_the_callers_order(ids: Any) -> None:
    assert validate_aux_layer_ids(ids, 16) == tuple(ids)


@pytest.mark.parametrize(
    "ids",
    [
        (),
        (1,),
        (1, 2),
        (1, 2, 3, 4),
        (1, 1, 12),
        (1, 2, 3, 3),
        (1, 2, 1),
        (-1, 2, 3),
        (1, 2, 16),
        (1, 2, 1 << 70),
        (True, 2, 3),
        (False, 2, 3),
        (1.0, 2, 3),
        (1, 2, 2.5),
        (1, 2, float("nan")),
        ("1", "2", "3"),
        "123",
        (1, 2, None),
    ],
    ids=repr,
)
def test_anything_but_three_distinct_layers_is_refused(ids: Any) -> None:
    message = (
        "aux_layer_ids must be 3 distinct ids in [0, 16) (id i is the output of decoder layer i); "
        f"got {list(ids)}"
    )
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}$"):
        validate_aux_layer_ids(ids, 16)


def test_the_declared_convention_is_the_layers_output() -> None:
    assert AUX_LAYER_CONVENTION == "layer_output"


# --- the serving engines' convention ---


@given(st.data())
def test_the_engines_convention_names_the_layer_that_reads_the_state(data: Any) -> None:
    depth = data.draw(st.integers(3, 90))
    ids = tuple(data.draw(st.lists(st.integers(0, depth - 1), min_size=1, unique=True)))
    # A walk through the layers: what layer i leaves is what layer i + 1 finds, or the final norm.
    left_by, found_by = {}, {}
    for layer in range(depth):
        left_by[layer] = f"state after {layer} layers and one more"
        found_by[layer + 1] = left_by[layer]
    inputs = to_layer_inputs(ids, depth)
    assert [found_by[i] for i in inputs] == [left_by[i] for i in ids]
    assert from_layer_inputs(inputs, depth) == ids
    assert to_layer_inputs(from_layer_inputs(list(inputs), depth), depth) == inputs


@pytest.mark.parametrize("depth", [*range(SHALLOWEST, 81)])
def test_the_default_is_the_engines_default(depth: int) -> None:
    """vLLM's is (2, L // 2, L - 3)."""
    assert to_layer_inputs(default_aux_layer_ids(depth), depth) == (2, depth // 2, depth - 3)
    assert from_layer_inputs((2, depth // 2, depth - 3), depth) == default_aux_layer_ids(depth)


def test_the_last_layers_output_has_an_id_there_too() -> None:
    assert to_layer_inputs((0, 3, 7), 8) == (1, 4, 8)
    assert from_layer_inputs((1, 4, 8), 8) == (0, 3, 7)


def test_the_state_of_an_engines_id_is_that_layers_input(build_model: Any) -> None:
    """On a real model: ours by a hook on the output, theirs by a hook on the input."""
    model = build_model("llama")
    layers = list(model.model.layers)
    outputs: dict[int, torch.Tensor] = {}
    inputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _m, _a, out, i=index: outputs.__setitem__(
                i, out if torch.is_tensor(out) else out[0]
            )
        )
        layer.register_forward_pre_hook(
            lambda _m, args, i=index: inputs.__setitem__(i, args[0]), with_kwargs=False
        )
    model.model.norm.register_forward_pre_hook(
        lambda _m, args: inputs.__setitem__(len(layers), args[0])
    )
    with torch.no_grad():
        model(torch.arange(5)[None])
    for triple in [(0, 2, 4), (1, 3, 6), (5, 6, 0)]:
        for ours, theirs in zip(triple, to_layer_inputs(triple, len(layers)), strict=True):
            assert torch.equal(outputs[ours], inputs[theirs])


@pytest.mark.parametrize("ids", [(16, 1, 2), (), (1, 1, 2), (-1, 1, 2), (True, 2, 3)], ids=repr)
def test_what_is_no_layers_output_is_refused_before_it_is_converted(ids: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"must be distinct integers in \[0, 16\)"):
        to_layer_inputs(ids, 16)


@pytest.mark.parametrize(
    "ids",
    [(0, 1, 2), (1, 2, 17), (), (3, 3, 4), (True, 2, 3), (1.0, 2, 3), "123", (None,)],
    ids=repr,
)
def test_what_is_no_layers_input_is_refused_with_the_ids_that_are(ids: Any) -> None:
    words = rf"\[1, 16\].*got {re.escape(str(list(ids)))}.*eagle_aux_hidden_state_layer_ids"
    with pytest.raises(InvalidRequest, match=words):
        from_layer_inputs(ids, 16)


@pytest.mark.parametrize(
    "ids", [3, None, torch.tensor([1, 2]), [1.0], [True], "12", [[1]]], ids=repr
)
def test_layers_in_any_number_are_a_sequence_of_integers(ids: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"aux_layer_ids must be .*integers"):
        validate_layer_ids(ids, 16)
    assert validate_layer_ids([15, 0, 7, 1], 16) == (15, 0, 7, 1)
