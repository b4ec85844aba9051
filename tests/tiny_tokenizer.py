"""A checkpoint with a tokenizer of its own: bytes, a few words, and what else a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.servers import save_tiny_llama

VOCAB_SIZE = 300
"""Of the model: a little wider than the tokenizer's, as real ones are."""


def save_tokenizer(path: Path, words: Sequence[str] = (), *, begins: bool = True) -> None:
    """Save one: every byte, `words` as tokens, and <s> before every text if `begins`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.add_tokens(list(words))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert len(fast) < VOCAB_SIZE
    fast.save_pretrained(path)


def save_with_tokenizer(path: Path, words: Sequence[str] = (), **sizes: int) -> Path:
    """Save a tiny Llama and its tokenizer."""
    save_tiny_llama(path, **{"vocab_size": VOCAB_SIZE, **sizes})
    save_tokenizer(path, words)
    return path
