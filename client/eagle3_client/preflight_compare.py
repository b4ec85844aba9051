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
from eagle3_schemas.aux_layers import NUM_AUX_LAYERS, example_aux_layer_ids
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
        words = words.partition("; pass a token")[0]  # the rest is for who calls from code
        remedy = "set EAGLE3_TOKEN to a token that the server was started with"
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
    passed, default, expected = (
        expect.settings.aux_layer_ids,
        info.aux_layer_ids,
        expect.aux_layer_ids,
    )
    used, count = default if passed is None else passed, info.num_hidden_layers
    values = {"aux_layer_ids": used and list(used), "expected": expected and list(expected)}
    example = _listed(example_aux_layer_ids(count))
    if count < NUM_AUX_LAYERS:
        words = f"{count} decoder layers are too few for supervision, which takes three"
        return Check("failed", words, "serve a target of three layers or more", values)
    if used is None:
        remedy = _to_pass(example) + f" here; or serve with --aux-layer-ids {example}"
        if expected is not None:
            remedy = _to_pass(_listed(expected)) + " here"
        words = f"{count} decoder layers are too few for a default: the server names none"
        return Check("failed", words, remedy, values)
    try:
        validate_aux_layer_ids(used, count)
        if expected is not None:
            validate_aux_layer_ids(expected, count)
    except InvalidRequest as exc:
        remedy = f"name three of the target's {count} layers, outputs, from 0, as {example}"
        return Check("failed", exc.detail, remedy, values)
    names = ", ".join(map(str, used))
    if expected not in (None, used):
        return _other_layers(used, expected, is_default=passed is None, values=values)
    whose = "the server's default" if passed is None else "as passed"
    words = f"{names} (layer outputs), {whose}"
    if expected is not None:
        words += ", as the draft expects"
    elif passed is None:
        words += "; no expectation was given to compare"
    if passed not in (None, default):
        other = "the server has no default"
        if default is not None:
            other = f"not the server's default {', '.join(map(str, default))}"
        words += f"; {other}: pass aux_layer_ids=[{_listed(used)}] to the client"
    return Check("ok", words, None, values)


def _other_layers(
    used: tuple[int, ...],
    expected: tuple[int, ...],
    *,
    is_default: bool,
    values: dict[str, Any],
) -> Check:
    """Return the check that failed since the draft expects other layers."""
    hint = ""
    if tuple(i + 1 for i in used) == expected:
        hint = "; they differ by one, so the draft's may name inputs: then give --draft-config"
    elif set(used) == set(expected):
        hint = "; the same layers in another order, which is another concatenation"
    whose = "the server's default gives" if is_default else "as passed they are"
    wanted = _listed(expected)
    remedy = f"{_to_pass(wanted)} here"
    if is_default:
        remedy += f"; or serve with --aux-layer-ids {wanted}"
    names = ", ".join(map(str, used))
    return Check(
        "failed",
        f"the draft expects {', '.join(map(str, expected))}; {whose} {names} (layer outputs){hint}",
        remedy,
        values,
    )


def _listed(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))


def _to_pass(layers: str) -> str:
    return f"pass aux_layer_ids=[{layers}] to the client, and --aux-layer-ids {layers}"
