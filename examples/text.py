"""Real English text that every Python brings along, cut into padded batches of tokens.

The text is the standard library's own documentation: the docstrings of its modules, classes and
functions. It is split by module into text to train on and text held out.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Present in every Python from 3.10 on, on every platform, and without side effects on import.
# Split from a string, since ruff would lay a list out over sixty lines.
TRAINING_MODULES = """
    argparse asyncio.events asyncio.tasks calendar cmd codecs collections configparser contextlib
    copy csv datetime decimal difflib doctest email.message enum fileinput functools gzip heapq
    http.client inspect io ipaddress itertools json logging mailbox math optparse os pathlib pdb
    pprint queue random re sched shelve shutil smtplib socket statistics subprocess tarfile
    tempfile threading timeit tokenize traceback unittest.case unittest.mock urllib.parse weakref
    xml.etree.ElementTree
""".split()  # noqa: SIM905
HELD_OUT_MODULES = """
    asyncio.queues fractions hashlib locale operator pickle string struct textwrap urllib.request
    uuid zipfile
""".split()  # noqa: SIM905


class TokenBatch(NamedTuple):
    """One batch as every backend takes it: ``backend.generate_batch(*batch)``. [B, T] int64."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Return a mapping whose ``input_ids`` are the token ids of the text."""


def module_documents(name: str) -> list[str]:
    """Return a standard-library module's docstrings in a fixed order.

    The module's own is one document, each function's is one, and so is each class with its methods.
    ``pydoc.plaintext`` would add the values of module data, which depend on the machine.
    """
    module = importlib.import_module(name)
    documents = [inspect.getdoc(module) or ""]
    for label, member in sorted(vars(module).items()):
        if label.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        members = {label: member}
        if inspect.isclass(member):
            members |= {f"{label}.{method}": value for method, value in _methods(member)}
        paragraphs = (f"{key}\n{inspect.getdoc(value) or ''}" for key, value in members.items())
        documents.append("\n\n".join(paragraph.strip() for paragraph in paragraphs))
    return documents


def _methods(documented_class: type) -> Iterator[tuple[str, object]]:
    for name, member in sorted(vars(documented_class).items()):
        is_documented = inspect.isroutine(member) or isinstance(member, property)
        if is_documented and not name.startswith("_"):
            yield name, member


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return one list of token ids per text, without special tokens."""
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def every_token(documents: Iterable[Sequence[int]]) -> Iterator[tuple[Tensor, None]]:
    """Return documents as `eagle3_client.count_token_ids` takes them: no token is masked."""
    return ((torch.tensor(document, dtype=torch.int64), None) for document in documents)


def chunk(
    documents: Iterable[Sequence[int]], sequence_length: int, min_length: int = 32
) -> list[list[int]]:
    """Cut each document into sequences of at most `sequence_length` tokens.

    The last piece of a document is usually shorter; pieces under `min_length` are dropped.
    """
    pieces = (
        list(document[start : start + sequence_length])
        for document in documents
        for start in range(0, len(document), sequence_length)
    )
    return [piece for piece in pieces if len(piece) >= min(min_length, sequence_length)]


def make_batches(
    sequences: Sequence[Sequence[int]],
    *,
    num_batches: int,
    batch_size: int,
    sequence_length: int,
    prompt_tokens: int = 8,
    pad_token_id: int = 0,
    seed: int = 0,
) -> list[TokenBatch]:
    """Shuffle sequences and pad them on the right; start over, reshuffled, when they run out.

    Args:
        sequences: token ids, each at most `sequence_length` long.
        num_batches: how many batches to return.
        batch_size: sequences per batch.
        sequence_length: tokens per sequence after padding.
        prompt_tokens: leading tokens that get no supervision, as a chat prompt would.
        pad_token_id: any valid id; what it is does not matter, since padding is masked.
        seed: of the shuffle.

    Raises:
        ValueError: there are no sequences.
    """
    if not sequences:
        raise ValueError("no sequences to train on: the text is empty or too short")
    shuffler, queue = random.Random(seed), list[Sequence[int]]()
    batches = []
    for _ in range(num_batches):
        while len(queue) < batch_size:
            queue += shuffler.sample(list(sequences), len(sequences))
        rows, queue = queue[:batch_size], queue[batch_size:]
        batches.append(pad(rows, sequence_length, prompt_tokens, pad_token_id))
    return batches


def pad(
    rows: Sequence[Sequence[int]],
    sequence_length: int,
    prompt_tokens: int = 8,
    pad_token_id: int = 0,
) -> TokenBatch:
    """Return the rows as one right-padded batch."""
    input_ids = torch.full((len(rows), sequence_length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    loss_mask = torch.zeros_like(input_ids)
    for row, token_ids in enumerate(rows):
        length = len(token_ids)
        input_ids[row, :length] = torch.tensor(token_ids)
        attention_mask[row, :length] = 1
        loss_mask[row, prompt_tokens:length] = 1
    return TokenBatch(input_ids, attention_mask, loss_mask)
