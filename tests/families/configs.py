"""The model families that are tested, in the order of the docs' table."""

from __future__ import annotations

from tests.families.family import CORE, SEED, Family, H, L, V
from tests.families.multimodal_and_moe import MULTIMODAL_AND_MOE
from tests.families.others import OTHERS
from tests.families.text_only import TEXT_ONLY

__all__ = ["CORE", "FALLS_BACK", "FAMILIES", "SEED", "Family", "H", "L", "V"]

FAMILIES = [*TEXT_ONLY, *MULTIMODAL_AND_MOE, *OTHERS]

FALLS_BACK: frozenset[str] = frozenset()
"""Families whose head runs for every position (`head: "full"`): served, not counted as covered."""
