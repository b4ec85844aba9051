"""What a preflight compares: what a server says of its target, and what the trainer expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from eagle3_client.config import ClientSettings
from eagle3_client.failures import is_refused
from eagle3_client.preflight_report import Check
from eagle3_client.sameness import LAYERS_REMEDY, name_of
from eagle3_schemas import ModelInfo, tokenizer_digest, validate_aux_layer_ids
from eagle3_schemas.errors import (
    FingerprintMismatch,
    InvalidRequest,
    NotReady,
    ProtocolMismatch,
    RemoteEagle3Error,
    TargetFailed,
    TransportError,
    Unauthorized,
)
from eagle3_schemas.tokenizer import HasVocab


@dataclass(frozen=True)
class Expectation:
    """What the trainer's side brings to a preflight, beside its settings."""

    settings: ClientSettings
    tokenizer: HasVocab | None
    aux_layer_ids: tuple[int, ...] | None
    draft_vocab_size: int | None
    supervised_share: float


def failed(error: RemoteEagle3Error, **values: Any) -> Check:
    """Return the check that failed with an error: its words, and what to do about it."""
    words, remedy = error.detail, "read the server's log"
    if isinstance(error, TargetFailed) and error.request_id is not None:
        words += f" (request id {error.request_id})"
    if isinstance(error, TransportError) and isinstance(error.__cause__, httpx.TransportError):
        words, _, remedy = error.detail.rpartition("; ")
        if is_refused(error):
            remedy = (
                "nothing listens there: start the server (eagle3-remote serve MODEL --host … "
                "--port …), or correct the URL"
            )
        elif isinstance(error.__cause__, httpx.TimeoutException):
            remedy = "correct the URL, or see what drops the packets: a firewall, or a server hung"
    elif isinstance(error, TransportError):
        remedy = "see what stands between here and the server, such as a gateway"
    elif isinstance(error, Unauthorized):
        remedy = "set EAGLE3_TOKEN (token=) to a token that the server was started with"
    elif isinstance(error, NotReady):
        remedy = "wait until it is ready; if it never is, its log says why"
    elif isinstance(error, ProtocolMismatch):
        remedy = "correct the URL, or install one version of eagle3-remote on both sides"
    elif isinstance(error, FingerprintMismatch) and words.endswith(LAYERS_REMEDY):
        words, remedy = words.removesuffix(f"; {LAYERS_REMEDY}"), LAYERS_REMEDY
    elif isinstance(error, FingerprintMismatch):
        remedy = "serve one model, of one name, revision and dtype, on all servers"
    elif isinstance(error, TargetFailed):
        remedy = "read the server's log under this request id; the batch was random ids"
    elif isinstance(error, InvalidRequest):
        remedy = "change what the server refuses: the client's options, or its own"
    return Check("failed", words, remedy, values)


def fingerprint_check(info: ModelInfo, settings: ClientSettings) -> Check:
    """Compare the target's fingerprint with `expect_fingerprint`."""
    expected = settings.expect_fingerprint
    values = {
        "fingerprint": info.fingerprint, "expected": expected, "model_id": info.model_id,
        "revision": info.revision, "dtype": info.dtype, "device_name": info.device_name,
    }  # fmt: skip
    words = f"{info.fingerprint} ({name_of(info)}, {info.dtype} on {info.device_name})"
    if expected in (None, info.fingerprint):
        return Check("ok", words, None, values)
    return Check(
        "failed", f"expected {expected}; the server has {words}",
        "serve the target that the run began with, under its name (--model-name), or begin a new "
        "run", values,
    )  # fmt: skip


def tokenizer_check(info: ModelInfo, tokenizer: HasVocab | None) -> Check:
    """Compare which id means which token, here and in the served checkpoint."""
    values: dict[str, Any] = {"digest": info.tokenizer_digest, "expected": None}
    if tokenizer is None:
        return Check("skipped", "no tokenizer was given (--tokenizer)", None, values)
    values["expected"] = digest = tokenizer_digest(tokenizer)
    if info.tokenizer_digest is None:
        words = "could not be compared: the served checkpoint has no tokenizer"
        return Check("unknown", words, None, values)
    if digest == info.tokenizer_digest:
        return Check("ok", "numbers the tokens as the server's does", None, values)
    return Check(
        "failed",
        f"the tokenizer given ({digest}, {len(tokenizer.get_vocab())} tokens) numbers tokens "
        f"otherwise than the server's ({info.tokenizer_digest}; {info.input_vocab_size} input ids)",
        f"tokenize with the tokenizer of {name_of(info)}",
        values,
    )


def aux_check(info: ModelInfo, expect: Expectation) -> Check:
    """Compare the layers that requests will name with those the draft expects."""
    requested, expected = expect.settings.aux_layer_ids, expect.aux_layer_ids
    used = info.aux_layer_ids if requested is None else requested
    values = {"aux_layer_ids": used and list(used), "expected": expected and list(expected)}
    whose = "the server's default" if requested is None else "aux_layer_ids of the client"
    try:
        if used is None:
            raise InvalidRequest("the target is too shallow for the default rule: it names none")
        validate_aux_layer_ids(used, info.num_hidden_layers)
        if expected is not None:
            validate_aux_layer_ids(expected, info.num_hidden_layers)
    except InvalidRequest as exc:
        remedy = f"name three of the target's {info.num_hidden_layers} layers, outputs, from 0"
        return Check("failed", exc.detail, remedy, values)
    names = ", ".join(map(str, used))
    if expected is None:
        words = f"{names} (layer outputs, {whose}); no expectation was given to compare"
        return Check("ok", words, None, values)
    if used == expected:
        return Check("ok", f"{names} (layer outputs), as the draft expects", None, values)
    wanted = ",".join(map(str, expected))
    hint = ""
    if tuple(i + 1 for i in used) == expected:
        hint = "; they differ by one, so the draft's may name inputs: then give --draft-config"
    elif set(used) == set(expected):
        hint = "; the same layers in another order, which is another concatenation"
    return Check(
        "failed",
        f"the draft expects {wanted.replace(',', ', ')}; {whose} gives {names} (layer outputs)"
        f"{hint}",
        f"pass aux_layer_ids=[{wanted}] to the client, or serve with --aux-layer-ids {wanted}",
        values,
    )
