"""What `POST /v1/inspect` takes and answers, for people and their page."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eagle3_schemas.messages import Count, Description, Digest, Message, RequestId


class InspectRequest(Message):
    """Body of `POST /v1/inspect`: a text whose tokens are to be looked at."""

    text: Annotated[str, Field(min_length=1)]
    """As a user wrote it; the tokenizer adds special tokens as it does by default."""
    draft_vocab_digest: Digest | None = None
    """None: the draft vocab that was used last."""
    top_k: Annotated[int, Field(ge=1, le=20)] = 5
    """How many expected tokens to tell of each position."""


class TokenText(Description):
    """A token of the target's tokenizer."""

    token_id: Count
    token: str | None
    """Its form in the tokenizer's vocab; None: the tokenizer does not have this id."""
    text: str
    """What it stands for; has U+FFFD where it is a part of a character."""


class ExpectedToken(TokenText):
    """A token of the draft vocab, as one that may come next."""

    probability: float
    """Softmax over the draft vocab's logits alone."""


class InspectedToken(TokenText):
    """A token of the text, and what the target expects after it."""

    next_expected: tuple[ExpectedToken, ...]
    """The likeliest of the draft vocab, likeliest first."""
    next_entropy_nats: float
    """Of the distribution over the draft vocab; at most ln D."""
    next_argmax: TokenText
    """The likeliest of all V tokens."""
    next_argmax_in_draft_vocab: bool
    """Whether a draft is trained here (`position_mask`), were the next token supervised."""


class InspectResponse(Description):
    """Answer to `POST /v1/inspect`."""

    request_id: RequestId
    fingerprint: str
    draft_vocab_digest: Digest
    draft_vocab_size: Count
    tokens: tuple[InspectedToken, ...]
    """One for each token of the text, special ones included."""
