"""The weights a draft of speculators' takes, and every target that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.client.adapters.captures import (
    EPS,
    HIDDEN_SIZE,
    VOCAB_SIZE,
    make_head,
)
from torch import Tensor

from eagle3_client.adapters import speculators_weights
from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.target_head import FinalNorm, NormForm


def make_t2d() -> Tensor:
    return torch.arange(VOCAB_SIZE) % 3 == 1


@pytest.mark.parametrize("transform", [LogitsTransform(), LogitsTransform(upcast=True)])
def test_the_weights_give_the_targets_logits_of_the_draft_vocab(transform: LogitsTransform) -> None:
    head, t2d = make_head(transform=transform), make_t2d()
    embeddings = torch.randn(VOCAB_SIZE, HIDDEN_SIZE)
    weights = speculators_weights(embeddings, head, t2d, rms_norm_eps=EPS)
    states = torch.randn(19, HIDDEN_SIZE)
    expected = head.logits(head.norm(states))[:, t2d]
    scaled = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + EPS)
    got = (weights["verifier_norm.weight"] * scaled) @ weights["verifier_lm_head.weight"].T
    torch.testing.assert_close(got, expected)
    assert torch.equal(weights["lm_head.weight"], weights["verifier_lm_head.weight"])
    assert weights["embed_tokens.weight"] is embeddings


def test_weights_of_a_draft_with_the_whole_vocab() -> None:
    head = make_head()
    weights = speculators_weights(torch.zeros(1), head, None, rms_norm_eps=EPS)
    assert torch.equal(weights["verifier_lm_head.weight"], head.weight)


def test_a_norm_without_gain_has_a_gain_of_ones() -> None:
    head = make_head(norm=FinalNorm(NormForm("rms", EPS, False), None, None))
    weights = speculators_weights(torch.zeros(1), head, None, rms_norm_eps=EPS)
    assert torch.equal(weights["verifier_norm.weight"], torch.ones(HIDDEN_SIZE))


GAIN = torch.ones(HIDDEN_SIZE)
UNREPRESENTABLE: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": torch.ones(VOCAB_SIZE)}, "got a head with a bias"),
    "multiply": ({"transform": LogitsTransform(multiply=0.3)}, "multiply=0.3"),
    "divide": ({"transform": LogitsTransform(divide=3.0)}, "divide=3.0"),
    "softcap": ({"transform": LogitsTransform(upcast=True, softcap=2.0)}, "softcap=2.0"),
    "no norm": ({"norm": None}, "of no form known"),
    "layer norm": (
        {"norm": FinalNorm(NormForm("layer", EPS, False), GAIN, None)},
        r"got .*'layer'",
    ),
    "norm bias": (
        {"norm": FinalNorm(NormForm("rms", EPS, False), GAIN, GAIN)},
        r"'rms'.* with a bias",
    ),
    "gemma": ({"norm": FinalNorm(NormForm("rms", EPS, True), GAIN, None)}, "gain_in_float32=True"),
}


@pytest.mark.parametrize("case", UNREPRESENTABLE)
def test_a_target_that_computes_otherwise_is_refused(case: str) -> None:
    changes, words = UNREPRESENTABLE[case]
    with pytest.raises(InvalidRequest, match=words) as error:
        speculators_weights(GAIN, make_head(**changes), make_t2d(), rms_norm_eps=EPS)
    assert "generate_batch" in error.value.detail


def test_another_eps_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"1e-05; got rms_norm_eps=1e-06\. Set it"):
        speculators_weights(GAIN, make_head(), make_t2d(), rms_norm_eps=1e-6)


@pytest.mark.parametrize("t2d", [make_t2d().long(), make_t2d()[:-1]], ids=["ids", "short"])
def test_another_t2d_is_refused(t2d: Tensor) -> None:
    with pytest.raises(InvalidRequest, match=r"t2d must be \[23\] bool.*to_t2d_d2t"):
        speculators_weights(GAIN, make_head(), t2d, rms_norm_eps=EPS)
