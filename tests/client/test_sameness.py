"""Servers that say they are the same and compute another thing, and runs that expect a target."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.servers import router

from eagle3_client import FingerprintMismatch, InvalidRequest
from eagle3_client.sameness import AUX_BOUND, LOGSUMEXP_BOUND, Numbers, check_numbers
from eagle3_schemas.errors import TargetFailed
from eagle3_server import TransformersTarget

DRAFT_IDS = torch.arange(5, 65).flip(0)


class Changed:
    """A target that says what the one it changes says, but computes something else."""

    def __init__(self, model: Any, change: Any) -> None:
        self.inner = TransformersTarget(model, model_id="tiny")
        self.description = self.inner.describe()
        change(model)

    def describe(self) -> Any:
        return self.description

    def supervise(self, job: Any) -> Any:
        return self.inner.supervise(job)


def scale_layer(index: int, factor: float) -> Any:
    def change(model: Any) -> None:
        weight = model.model.layers[index].mlp.down_proj.weight
        weight.mul_(factor)

    return change


def scale_head(model: Any) -> None:
    model.lm_head.weight.mul_(1.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [(scale_layer(1, 3.0), "aux layer 0"), (scale_layer(6, -2.0), "logsumexp|argmax")],
    ids=["a layer that is sent", "one behind it"],
)
def test_servers_that_compute_another_thing_are_refused_and_named(
    build_model: Any, serve: Any, connect: Any, change: Any, words: str
) -> None:
    good, bad = serve(build_model("llama")), serve(Changed(build_model("llama"), change))
    backend = connect(router(a=good, b=bad), urls=["http://a", "http://b"])
    with pytest.raises(FingerprintMismatch, match=f"http://b.*http://a.*({words})"):
        backend.model_info()


def test_a_head_that_differs_is_seen_in_the_logits(
    build_model: Any, serve: Any, connect: Any
) -> None:
    good, bad = serve(build_model("llama")), serve(Changed(build_model("llama"), scale_head))
    backend = connect(router(a=good, b=bad), urls=["http://a", "http://b"])
    with pytest.raises(FingerprintMismatch, match="logsumexp"):
        backend.model_info()


@pytest.mark.parametrize("exact", [False, True])
def test_rounding_apart_is_the_same_unless_exact(
    build_model: Any, serve: Any, connect: Any, exact: bool
) -> None:
    good = serve(build_model("llama"))
    near = serve(Changed(build_model("llama"), scale_layer(1, 1.0001)))
    backend = connect(router(a=good, b=near), urls=["http://a", "http://b"], exact=exact)
    if exact:
        with pytest.raises(FingerprintMismatch, match=r"differ in their bits.*exact=True"):
            backend.model_info()
    else:
        assert backend.model_info().model_id == "tiny"


def test_a_server_that_fails_where_another_computes_is_refused(
    build_model: Any, serve: Any, connect: Any
) -> None:
    class Failing(Changed):
        def supervise(self, job: Any) -> Any:
            raise TargetFailed("layer 3 gave non-finite states")

    good, bad = serve(build_model("llama")), serve(Failing(build_model("llama"), lambda _: None))
    backend = connect(router(a=good, b=bad), urls=["http://a", "http://b"])
    with pytest.raises(FingerprintMismatch, match="http://b fails on a batch that http://a"):
        backend.model_info()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_id", "other"),
        ("revision", "abc"),
        ("quantization", "fp8"),
        ("tokenizer_digest", "0" * 32),
        ("attn_implementation", "eager"),
        ("dtype", "bfloat16"),
    ],
)
def test_servers_that_say_another_thing_are_refused_by_its_name(
    build_model: Any, serve: Any, connect: Any, name: str, value: str
) -> None:
    other = Changed(build_model("llama"), lambda _: None)
    other.description = dataclasses.replace(other.description, **{name: value})
    bridges = {"a": serve(build_model("llama")), "b": serve(other)}
    backend = connect(router(**bridges), urls=["http://a", "http://b"])
    with pytest.raises(FingerprintMismatch, match=f"{name} is .* at http://a .* and {value} at"):
        backend.model_info()


# --- the bounds ---


def numbers(**changes: Any) -> Numbers:
    generator = torch.Generator().manual_seed(1)
    aux = torch.randn(24, 12, generator=generator)
    logits = 3 * torch.randn(22, 50, generator=generator)
    return Numbers(**{"url": "http://x", "seed": 0, "aux": aux, "logits": logits} | changes)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_aux_states_may_differ_by_their_bound(factor: float) -> None:
    base = numbers()
    aux = base.aux.clone()
    aux[:, 4:8] *= 1 + factor * AUX_BOUND
    if factor < 1:
        check_numbers(base, numbers(aux=aux), exact=False)
    else:
        with pytest.raises(FingerprintMismatch, match="aux layer 1"):
            check_numbers(base, numbers(aux=aux), exact=False)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_logsumexp_may_differ_by_its_bound(factor: float) -> None:
    base = numbers()
    logits = base.logits.clone()
    logits[7] += factor * LOGSUMEXP_BOUND
    if factor < 1:
        check_numbers(base, numbers(logits=logits), exact=False)
    else:
        with pytest.raises(FingerprintMismatch, match="logsumexp"):
            check_numbers(base, numbers(logits=logits), exact=False)


@pytest.mark.parametrize(("margin", "is_same"), [(0.5, True), (2.0, False)])
def test_an_argmax_may_differ_only_where_the_two_are_near(margin: float, is_same: bool) -> None:
    logits = numbers().logits.clone()
    top = logits[7].topk(2)
    logits[7, top.indices[1]] = top.values[0] - margin * LOGSUMEXP_BOUND
    swapped = logits.clone()
    swapped[7, top.indices] = logits[7, top.indices.flip(0)]
    first, second = numbers(logits=logits), numbers(logits=swapped)
    if is_same:
        check_numbers(first, second, exact=False)
    else:
        with pytest.raises(FingerprintMismatch, match="argmax differs in 1 of 22"):
            check_numbers(first, second, exact=False)


def test_states_that_are_not_finite_are_not_the_same() -> None:
    aux = numbers().aux.clone()
    aux[3, 3] = float("nan")
    with pytest.raises(FingerprintMismatch):
        check_numbers(numbers(), numbers(aux=aux), exact=False)


# --- a run that is resumed ---


def test_a_run_names_its_target_and_refuses_another(
    build_model: Any, serve: Any, connect: Any
) -> None:
    bridge = serve(build_model("llama"))
    fingerprint = connect(bridge).fingerprint
    assert len(fingerprint) == 32
    assert connect(bridge, expect_fingerprint=fingerprint).fingerprint == fingerprint
    other = connect(serve(build_model("llama", seed=1)), expect_fingerprint=fingerprint)
    for call in (other.model_info, lambda: other.fingerprint):
        with pytest.raises(FingerprintMismatch, match=f"expected the target {fingerprint}.*tiny"):
            call()


def test_a_fingerprint_that_is_none_is_refused(connect: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"expect_fingerprint must be 32 hex.*'tiny'"):
        connect(None, expect_fingerprint="tiny")
