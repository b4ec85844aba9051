"""A co-located target whose sequences are split over two processes, against a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.parallel.conftest import V, run_ranks
from tests.ports import free_port

pytestmark = pytest.mark.slow

# About four times what was measured on tokens that are attended; a rank that sees its own columns
# alone is off by more than 1.
AUX = {"float32": 2e-5, "bfloat16": 0.15}  # relative to their root mean square
LOGITS = {"float32": 5e-5, "bfloat16": 0.4}  # absolute; they reach 15


@pytest.fixture(scope="module")
def cases(checkpoint: Path, tmp_path_factory: Any) -> dict[str, list[dict[str, Any]]]:
    """What `meshes.py` found, by case: one entry a rank."""
    lines = run_ranks(free_port(), "meshes", checkpoint).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {each["case"]: each["ranks"] for each in found}


@pytest.mark.parametrize(
    ("case", "shape", "columns"),
    [
        ("right", [3, 71, V], ([36], [35])),
        ("left", [3, 71, V], ([36], [35])),
        ("one row", [1, 64, V], ([32], [32])),
        ("short", [2, 31, V], ([31], [31])),  # fewer than 16 a rank: both run it whole
        ("packed", [1, 108, V], ([30], [30])),  # a row for each document
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_split_sequence_gives_what_the_whole_gives(
    cases: dict[str, list[dict[str, Any]]],
    case: str,
    shape: list[int],
    columns: tuple[list[int], ...],
    dtype: str,
) -> None:
    """On both ranks, of which each ran its own columns alone."""
    for found, ran in zip(cases[f"{case} {dtype}"], columns, strict=True):
        assert found["shape"] == shape
        assert found["columns"] == ran
        assert found["aux"] <= AUX[dtype]
        assert found["logits"] <= LOGITS[dtype]
        if case == "short":
            assert found["aux"] == found["logits"] == 0.0


def test_what_cannot_be_split_is_refused_with_the_reason(
    cases: dict[str, list[dict[str, Any]]],
) -> None:
    for found in cases["Mamba2 refused"]:
        assert "its forward takes no past_key_values" in found["error"]
        assert "without cp_mesh" in found["error"]
    for found in cases["RecurrentGemma refused"]:  # it runs, and forgets what came before
        assert "a split sequence differs from the whole by 0." in found["error"]
    for found in cases["plane refused"]:
        assert "cp_mesh must have one dimension, got 2" in found["error"]
        assert 'mesh["cp"]' in found["error"]


def test_ranks_share_rows_and_what_is_wrong_with_one(
    cases: dict[str, list[dict[str, Any]]],
) -> None:
    """A row that is not finite is found by one rank, and told by both; then they go on."""
    mask = [[False, True, False], [False, True, False]]
    for name in ("shared", "after it"):
        for found in cases[name]:
            assert found["rows"] == [[1.0, 1.0]] * 3
            assert found["dtype"] == "torch.bfloat16"
            assert found["position_mask"] == mask
            assert found["ones"] == [1.0] * 6
            assert found["twos"] == [2.0] * 6
    assert [each["error"] for each in cases["one fails"]] == ["row 7 is not finite: é"] * 2
    for name, kind, words in (
        ("one fails", "TargetFailed", "row 7"),
        ("one lacks memory", "OutOfMemoryError", "can't allocate memory"),
        ("one errs", "RuntimeError", "ZeroDivisionError on a rank"),
    ):
        for found in cases[name]:
            assert found["kind"] == kind
            assert words in found["error"]


def test_ranks_that_come_with_different_batches_are_told_so(
    cases: dict[str, list[dict[str, Any]]],
) -> None:
    """Their keys would be mixed without a word; and they can go on with one batch."""
    for rank, found in enumerate(cases["other batches"]):
        assert f"rank {rank} of the context-parallel mesh has another batch" in found["error"]
    assert [found["shape"] for found in cases["the same again"]] == [[1, 64, 144]] * 2


def test_a_call_that_failed_in_the_middle_is_the_last(
    cases: dict[str, list[dict[str, Any]]],
) -> None:
    """The other ranks may be a collective ahead."""
    for found in cases["out of step"]:
        first, second = found["errors"]
        assert "by zero" in first
        assert "out of step; end them all, and start them again" in second
