"""`tokenizer_digest`: whether two tokenizers number the same tokens alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol


class HasVocab(Protocol):
    """What is needed of a tokenizer: transformers', or `tokenizers.Tokenizer`."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return token -> id, added tokens included."""


def tokenizer_digest(tokenizer: HasVocab) -> str:
    """Digest which id means which token; 32 hex digits.

    Ids trained on with another tokenizer are valid and meaningless, which nothing else would tell.
    How text is cut into tokens is not covered: it decides which ids there are, not what they mean.

    Args:
        tokenizer: transformers' or `tokenizers.Tokenizer`; its added tokens count too.
    """
    digest = hashlib.sha256(b"eagle3-tokenizer-v1\0")
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{token_id}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
