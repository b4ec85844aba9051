"""What tests of supervision share: dtypes, families, a draft vocab, and a batch that is padded."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.padding import PADDING, V, widen
from torch import Tensor


@pytest.fixture
def draft_ids(frequency_ordered: Any) -> Tensor:
    ids: Tensor = frequency_ordered(V, 53)
    return ids


@pytest.fixture
def padded(batch_of: Any) -> Any:
    """A batch whose last columns are padding in every row."""
    return widen(batch_of(V, (10, 7, 4)), PADDING)
