"""What a preflight says of the aux layers."""

from __future__ import annotations

from typing import Any

import pytest

from eagle3_client.preflight_compare import Expectation, aux_check
from eagle3_schemas.aux_layers import example_aux_layer_ids, validate_aux_layer_ids


@pytest.fixture
def check(bridge: Any, connect: Any) -> Any:
    """`check(passed, expected, default, layers)`: the check of such a trainer and server."""
    info = connect(bridge).model_info()

    def of(passed: Any, expected: Any = None, default: Any = (1, 2, 3), layers: int = 7) -> Any:
        told = info.model_copy(update={"aux_layer_ids": default, "num_hidden_layers": layers})
        settings = connect(urls="http://127.0.0.1:9", aux_layer_ids=passed)._settings
        return aux_check(told, Expectation(settings, None, expected, None, 0.6))

    return of


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None,), "1, 2, 3 (layer outputs), the server's default; no expectation was given to "
         "compare"),
        ((None, (1, 2, 3)), "1, 2, 3 (layer outputs), the server's default, as the draft expects"),
        (((1, 2, 3),), "1, 2, 3 (layer outputs), as passed"),
        (((0, 2, 4),), "0, 2, 4 (layer outputs), as passed; not the server's default 1, 2, 3: pass "
         "aux_layer_ids=[0,2,4] to the client"),
        (((0, 2, 4), (0, 2, 4)), "0, 2, 4 (layer outputs), as passed, as the draft expects; not "
         "the server's default 1, 2, 3: pass aux_layer_ids=[0,2,4] to the client"),
        (((0, 2, 4), None, None, 6), "0, 2, 4 (layer outputs), as passed; the server has no "
         "default: pass aux_layer_ids=[0,2,4] to the client"),
    ],
)  # fmt: skip
def test_layers_that_will_do(check: Any, arguments: Any, words: str) -> None:
    found = check(*arguments)
    assert (found.status, found.detail, found.remedy) == ("ok", words, None)


@pytest.mark.parametrize(
    ("arguments", "words", "remedy"),
    [
        (
            (None, (0, 2, 4)),
            "the draft expects 0, 2, 4; the server's default gives 1, 2, 3 (layer outputs)",
            "pass aux_layer_ids=[0,2,4] to the client, and --aux-layer-ids 0,2,4 here; or serve "
            "with --aux-layer-ids 0,2,4",
        ),
        (
            ((1, 2, 3), (0, 2, 4)),
            "the draft expects 0, 2, 4; as passed they are 1, 2, 3 (layer outputs)",
            "pass aux_layer_ids=[0,2,4] to the client, and --aux-layer-ids 0,2,4 here",
        ),
        (
            (None, None, None, 6),
            "6 decoder layers are too few for a default: the server names none",
            "pass aux_layer_ids=[0,2,4] to the client, and --aux-layer-ids 0,2,4 here; or serve "
            "with --aux-layer-ids 0,2,4",
        ),
        (
            (None, (3, 1, 5), None, 6),
            "6 decoder layers are too few for a default: the server names none",
            "pass aux_layer_ids=[3,1,5] to the client, and --aux-layer-ids 3,1,5 here",
        ),
        (
            (None, None, None, 2),
            "2 decoder layers are too few for supervision, which takes three",
            "serve a target of three layers or more",
        ),
        (
            ((0, 2),),
            "aux_layer_ids must be 3 distinct ids in [0, 7) (id i is the output of decoder layer "
            "i); got [0, 2]",
            "name three of the target's 7 layers, outputs, from 0, as 0,3,6",
        ),
    ],
)
def test_layers_that_will_not_do(check: Any, arguments: Any, words: str, remedy: str) -> None:
    found = check(*arguments)
    assert (found.status, found.detail, found.remedy) == ("failed", words, remedy)


@pytest.mark.parametrize("num_layers", range(3, 40))
def test_an_example_can_be_used(num_layers: int) -> None:
    validate_aux_layer_ids(example_aux_layer_ids(num_layers), num_layers)
