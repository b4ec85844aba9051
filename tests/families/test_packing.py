"""Packed rows of every family: each document as it is alone, and as a co-located target has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.families.configs import FAMILIES
from tests.families.packing import (
    AMPLIFIED,
    IMPLEMENTATIONS,
    PAGE,
    PART,
    SAME,
    PackedCase,
)
from tests.generated import part_of

BY_DOCUMENT = {
    "Bloom", "MPT", "MiniMax", "Qwen3-Next", "Qwen3.5", "Mamba2", "Falcon-H1", "RecurrentGemma",
    "Qwen3.5 (conditional)", "Nemotron-H", "Jamba", "GraniteMoE hybrid",
}  # fmt: skip
"""Recurrent, or without position ids: no mask keeps their documents apart."""

WINDOWED = {
    "Mistral", "Gemma2", "Gemma3 (text)", "GPT-OSS", "OLMo3", "Cohere2", "Exaone4", "Starcoder2",
    "Gemma4 (text)", "Llama4 (text)",
}  # fmt: skip


def _cases() -> Iterator[object]:
    for family in FAMILIES:
        for dtype in SAME:
            for implementation in IMPLEMENTATIONS:
                if implementation and (family.name not in WINDOWED or dtype is not torch.float32):
                    continue  # the page's table has all of them
                is_quick = family.name in ("Llama", "Gemma2", "GPT-OSS", "Mamba2")
                is_quick = is_quick and implementation is None and dtype is torch.float32
                words = (
                    family.name,
                    str(dtype).removeprefix("torch."),
                    implementation or "default",
                )
                yield pytest.param(
                    (family, dtype, implementation),
                    id="-".join(words),
                    marks=[] if is_quick else [pytest.mark.slow],
                )


@pytest.fixture(scope="module", params=_cases())
def case(request: pytest.FixtureRequest) -> PackedCase:
    return PackedCase(*request.param)


@pytest.mark.parametrize("exact", [True, False])
def test_each_document_is_as_it_is_alone(case: PackedCase, exact: bool) -> None:
    bound = AMPLIFIED.get((case.family.name, case.dtype), SAME[case.dtype])
    assert case.worst(exact=exact) <= bound
    _, _, mask = case.run(exact=exact)
    flipped = int((mask != case.expected()[2]).sum())
    assert flipped <= (0 if case.dtype is torch.float32 else 3)


def test_exact_is_the_co_located_targets_bits(case: PackedCase) -> None:
    for got, expected in zip(case.run(exact=True), case.co_located(), strict=True):
        assert torch.equal(got, expected)


def test_the_way_is_the_one_known_of_the_family(case: PackedCase) -> None:
    description = case.target.describe()
    expected = "documents" if case.family.name in BY_DOCUMENT else "masked"
    assert description.packing == expected
    assert (description.packing_reason is None) == (expected == "masked")


def test_the_page_lists_every_family_and_its_way() -> None:
    table = part_of(PAGE.read_text(encoding="utf-8"), PART)
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [family.name for family in FAMILIES]
    for name, _, way, *_ in ([row[0].removeprefix("| "), *row[1:]] for row in rows):
        assert way == ("documents" if name in BY_DOCUMENT else "masked"), name
    peers = {row[0].removeprefix("| "): row[-1] for row in rows}
    assert all("**" in peers[name] for name in WINDOWED)
