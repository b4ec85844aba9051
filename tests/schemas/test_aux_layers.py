"""Which layers are captured: the default rule against its definition, and every refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from eagle3_schemas import AUX_LAYER_CONVENTION, default_aux_layer_ids, validate_aux_layer_ids
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
