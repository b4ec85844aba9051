"""Whether servers serve the same target: what they say of it, and what they compute."""

from __future__ import annotations

import logging
import secrets
import uuid
from dataclasses import dataclass
from typing import Final

import torch

from eagle3_client.config import ClientSettings
from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab, ModelInfo
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import (
    FingerprintMismatch,
    ProtocolMismatch,
    TargetFailed,
    VocabMappingMissing,
)
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.tokens import TokenBatch

AUX_BOUND: Final = 0.05
"""Largest mean over tokens of |a - b| / |a| of an aux layer, between servers of one target."""

LOGSUMEXP_BOUND: Final = 0.1
"""Largest difference of a row's logsumexp over V; also the margin below which argmax may differ."""

LAYERS_REMEDY: Final = "pass aux_layer_ids, or serve all with the same --aux-layer-ids"
"""What ends the error of servers whose default aux layers differ."""

_BATCH, _LENGTH = 4, 64
_ROWS, _COLUMNS = 2, 13  # whose logits are asked for: full-vocab rows are long
# In the order a mismatch is told: what says most first.
_SAME_EVERYWHERE = (
    "model_id",
    "revision",
    "architecture",
    "dtype",
    "quantization",
    "vocab_size",
    "input_vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "aux_layer_convention",
    "tokenizer_digest",
    "attn_implementation",
    "head",
    "packing",
    "config_digest",
    "weights_digest",
    "fingerprint",
)

logger = logging.getLogger("eagle3_client")


@dataclass(frozen=True)
class Numbers:
    """What a server computed for the probe's batch."""

    url: str
    seed: int  # of the batch
    aux: torch.Tensor  # [n, 3H]
    logits: torch.Tensor  # [m, V]


def check_same(
    expected: ModelInfo, expected_url: str, info: ModelInfo, url: str, settings: ClientSettings
) -> None:
    """Compare what two servers say; their default aux layers only if the trainer names none.

    Raises:
        FingerprintMismatch: they differ; the message names both and the difference.
    """
    for name in _SAME_EVERYWHERE:
        first, second = getattr(expected, name), getattr(info, name)
        if first != second:
            remedy = "Serve one model everywhere"
            if name == "model_id":
                remedy += ", under one name (--model-name)"
            raise FingerprintMismatch(
                f"all servers must serve the same target: {name} is {first} at {expected_url} "
                f"({expected.model_id}) and {second} at {url} ({info.model_id}). {remedy}",
                url=url,
            )
    # Each process, and a resumed run, would take those of the server that it happens to meet first.
    first, second = expected.aux_layer_ids, info.aux_layer_ids
    if settings.aux_layer_ids is None and first != second:
        raise FingerprintMismatch(
            f"servers' default aux layers differ: {_shown(first)} at {expected_url}, "
            f"{_shown(second)} at {url}; {LAYERS_REMEDY}",
            url=url,
        )


def _shown(layers: tuple[int, ...] | None) -> str:
    return "none" if layers is None else str(list(layers))


def name_of(info: ModelInfo) -> str:
    """Return the target's name, with its revision if it has one."""
    return info.model_id if info.revision is None else f"{info.model_id}, revision {info.revision}"


def ask_numbers(
    connection: Connection, info: ModelInfo, settings: ClientSettings, seed: int | None = None
) -> Numbers | None:
    """Have a server compute a batch; None, with a warning, if its target gives no numbers.

    Its ids are random, by `seed` or anew: what two servers differ in is met sooner or later.

    Raises:
        RemoteEagle3Error: as for any request.
    """
    seed = secrets.randbits(32) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    bound = min(info.vocab_size, info.input_vocab_size)
    limits = info.limits
    length = min(_LENGTH, limits.max_tokens_per_request // _BATCH)
    shape = _BATCH, max(min(length, limits.max_sequence_length or length), 2)
    ones = torch.ones(shape, dtype=torch.bool)
    supervised = torch.zeros_like(ones)
    supervised[:_ROWS, 1:_COLUMNS] = True
    vocab = DraftVocab.from_ids(torch.arange(info.vocab_size))
    request, frame = pack_request(
        TokenBatch(torch.randint(bound, shape, generator=generator), ones, supervised),
        request_id=uuid.uuid4().hex,
        draft_vocab_digest=vocab.digest,
        aux_layer_ids=_three_layers(info, settings),
        encoding="logits",
        rows="loss_mask",
        aux_dtype="model",
        exact=settings.exact,
    )
    connection.ensure_registered(vocab, info.vocab_size)
    try:
        answer = connection.supervise(frame, request.request_id)
    except VocabMappingMissing as exc:  # it restarted in between
        connection.forget_registered()
        exc.is_retryable = True
        raise
    except TargetFailed as exc:  # random ids may overflow where text does not
        logger.warning("the servers' numbers cannot be compared: %s", exc)
        return None
    tensors = answer.tensors
    aux, logits = tensors.get("aux_hidden_states"), tensors.get(ENCODINGS["logits"].tensor_name)
    rows = int(supervised.sum())
    shapes = (ones.numel(), 3 * info.hidden_size), (rows, info.vocab_size)
    if aux is None or logits is None or (aux.shape, logits.shape) != shapes:
        raise ProtocolMismatch(
            f"expected aux states and logits of shapes {shapes}; got {sorted(tensors)}. Check that "
            "both sides have the same version",
            url=connection.url,
        )
    return Numbers(connection.url, seed, aux, logits)


def _three_layers(info: ModelInfo, settings: ClientSettings) -> tuple[int, ...]:
    """Return the trainer's layers, the default's, or of a shallow target any."""
    chosen = settings.aux_layer_ids or info.aux_layer_ids or ()
    return chosen if len(chosen) == 3 else tuple(range(min(3, info.num_hidden_layers)))


def compare_numbers(
    expected: Numbers, connection: Connection, info: ModelInfo, settings: ClientSettings
) -> None:
    """Have a server compute the batch that another computed, and compare.

    Raises:
        FingerprintMismatch: it fails on it, or computes something else.
        RemoteEagle3Error: as for any request.
    """
    numbers = ask_numbers(connection, info, settings, expected.seed)
    if numbers is None:
        raise FingerprintMismatch(
            f"{connection.url} fails on a batch that {expected.url} computed; its log says why. "
            "Serve the same weights, and look at both servers' devices",
            url=connection.url,
        )
    check_numbers(expected, numbers, exact=settings.exact)


def check_numbers(expected: Numbers, got: Numbers, *, exact: bool) -> None:
    """Compare what two servers computed: bit for bit if `exact`, else within the bounds above.

    Rounding differs between kinds of devices by a small part of these; other weights, layers or
    tokens by many times as much.

    Raises:
        FingerprintMismatch: they differ; the message names both and the difference.
    """
    difference = _exact_difference(expected, got) if exact else _difference(expected, got)
    if difference is not None:
        raise FingerprintMismatch(
            f"{got.url} does not compute what {expected.url} does: {difference}. Serve the same "
            "weights, and look at both servers' devices and versions",
            url=got.url,
        )


def _exact_difference(expected: Numbers, got: Numbers) -> str | None:
    for name in ("aux", "logits"):
        first, second = getattr(expected, name), getattr(got, name)
        if first.dtype != second.dtype or not torch.equal(first, second):
            return (
                f"{name} differ in their bits, and exact=True needs servers of equal device, "
                "threads, attention and torch build"
            )
    return None


def _difference(expected: Numbers, got: Numbers) -> str | None:
    layers = zip(expected.aux.float().chunk(3, 1), got.aux.float().chunk(3, 1), strict=True)
    for index, (first, second) in enumerate(layers):
        # Token by token: one of them may be a hundred times as long as the others.
        errors = (first - second).norm(dim=1) / first.norm(dim=1).clamp_min(1e-12)
        error = errors.mean().item()
        if not error <= AUX_BOUND:
            return (
                f"aux layer {index} of the three differs by {error:.2g} of its norm (mean over "
                f"tokens; bound {AUX_BOUND})"
            )
    first, second = expected.logits.float(), got.logits.float()
    error = (first.logsumexp(1) - second.logsumexp(1)).abs().max().item()
    if not error <= LOGSUMEXP_BOUND:
        return f"logsumexp differs by {error:.2g} (bound {LOGSUMEXP_BOUND})"
    top = first.topk(2, dim=1).values if first.shape[1] > 1 else None
    differs = first.argmax(1) != second.argmax(1)
    if top is not None:
        differs &= top[:, 0] - top[:, 1] > LOGSUMEXP_BOUND
    if bool(differs.any()):
        return f"the argmax differs in {int(differs.sum())} of {len(differs)} rows"
    return None
