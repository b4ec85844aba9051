"""What `POST /v1/self-check` answers: what a server found of its target now."""

from __future__ import annotations

from typing import Final, Literal

from eagle3_schemas.messages import Description, RequestId

SELF_CHECKS: Final = ("hooks", "head", "packing", "bits_repeat")
"""Names of the checks, in the order of the answer; a later server may have more."""


class SelfCheck(Description):
    """One thing that a server checked of its target, anew."""

    name: str
    """One of `SELF_CHECKS`: the captured layers against transformers' own `hidden_states`, the
    rows-only head against the model's full logits, whether packed documents see one another, and
    whether two equal forwards have equal bits."""
    status: Literal["passed", "failed", "not_applicable"]
    words: str
    """What was found, or why there was nothing to check."""
    largest_difference: float | None = None
    """Absolute for `head`, else relative; None: nothing was measured, or it was not finite."""


class SelfCheckResponse(Description):
    """Answer to `POST /v1/self-check`."""

    request_id: RequestId
    fingerprint: str
    checks: tuple[SelfCheck, ...]
