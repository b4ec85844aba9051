"""A capture's answer through a real frame, spread to its positions; and a target's head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.schemas.sent import CPU, DIGEST, POSITION_MASK, SENT, SHIFTED_LOSS_MASK, D, H

from eagle3_schemas.capture import OUTPUTS, Capture, pack_capture, unpack_capture
from eagle3_schemas.errors import InvalidRequest, MalformedPayload
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.supervision import pack_bits
from eagle3_schemas.target_head import TargetHead, unpack_target_head

N = 2  # layers
WHOLE: dict[str, torch.Tensor] = {
    "aux": torch.arange(1, 1 + 10 * N * H).reshape(2, 5, N * H).bfloat16(),
    "last_hidden_prenorm": torch.arange(1, 41).reshape(2, 5, H).bfloat16(),
    "last_hidden": torch.arange(2, 42).reshape(2, 5, H).bfloat16(),
    "argmax": torch.arange(1, 11).reshape(2, 5),
    "logsumexp": torch.arange(1, 11).reshape(2, 5) / 7,
    "loss_mask_probs": torch.arange(1, 31).reshape(2, 5, D).float(),
    "loss_mask_logits": torch.arange(3, 33).reshape(2, 5, D).bfloat16(),
    "draft_logsumexp": torch.arange(1, 11).reshape(2, 5) / 9,
}
ALL = tuple(OUTPUTS)


def mask_of(name: str) -> torch.Tensor:
    return SENT.attention_mask if "hidden" in name or name == "aux" else SHIFTED_LOSS_MASK


def answer(
    tensors: dict[str, torch.Tensor | None] | None = None, outputs: Any = ALL, **changes: Any
) -> dict[str, torch.Tensor]:
    """Unpack the right answer to a request, with these tensors and fields changed."""
    request, _ = pack_capture(
        SENT, request_id="req-1", outputs=outputs, aux_layer_ids=(4, 1), draft_vocab_digest=DIGEST
    )
    fields = {
        "request_id": "req-1",
        "fingerprint": "f",
        "outputs": changes.pop("said", list(outputs)),
        "aux_layer_ids": [4, 1],
        "draft_vocab_digest": DIGEST,
        **changes,
    }
    sent: dict[str, torch.Tensor | None] = {
        name: tensor[
            SENT.attention_mask if "hidden" in name or name == "aux" else SHIFTED_LOSS_MASK
        ]
        for name, tensor in WHOLE.items()
        if name in outputs
    }
    if "argmax" in outputs:
        sent["argmax"] = WHOLE["argmax"][SHIFTED_LOSS_MASK].int()
    if "position_mask" in outputs:
        sent["position_mask"] = pack_bits(POSITION_MASK)
    sent |= tensors or {}
    frame = encode(fields, {name: t for name, t in sent.items() if t is not None})
    return unpack_capture(
        decode(frame.to_bytes()),
        request,
        SENT,
        hidden_size=H,
        dtype=torch.bfloat16,
        draft_vocab_size=D,
        device=CPU,
    )


def test_every_output_is_spread_and_zero_elsewhere() -> None:
    got = answer()
    assert list(got) == list(ALL)
    for name, whole in WHOLE.items():
        mask = mask_of(name)
        mask = mask.view(*mask.shape, *(1,) * (whole.ndim - 2))
        torch.testing.assert_close(
            got[name], torch.where(mask, whole, whole.new_zeros(())), rtol=0, atol=0
        )
    assert torch.equal(got["position_mask"], POSITION_MASK[..., None])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request_id": "req-2"}, "another request: request_id req-2"),
        ({"aux_layer_ids": [1, 4]}, "another request: aux_layer_ids"),
        ({"said": ["aux"]}, "another request: outputs"),
        ({"draft_vocab_digest": "cd" * 32}, "another request: draft_vocab_digest"),
        ({"draft_vocab_digest": None}, "another request: draft_vocab_digest None"),
    ],
)
def test_an_answer_to_another_request_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(MalformedPayload, match=words):
        answer(**changes)


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_that_is_not_what_was_asked_for_is_refused(name: str) -> None:
    with pytest.raises(MalformedPayload, match=f"expected .*'{name}'.*, got"):
        answer({name: None})
    with pytest.raises(MalformedPayload, match=f"expected {name} "):
        answer({name: torch.zeros(1, 1, dtype=torch.bfloat16)})
    with pytest.raises(MalformedPayload, match=r"expected .*, got .*'extra'"):
        answer({"extra": torch.zeros(1)}, outputs=(name,))


def test_a_position_mask_beyond_the_loss_mask_is_refused() -> None:
    with pytest.raises(MalformedPayload, match="outside the shifted loss_mask"):
        answer({"position_mask": pack_bits(torch.ones(2, 5, dtype=torch.bool))})


def test_a_layer_that_was_not_captured_says_which_were() -> None:
    captured = Capture(answer(), (4, 1), SENT.input_ids, SENT.attention_mask, SENT.loss_mask)
    assert torch.equal(captured.aux_of(1), captured.aux[..., H:])
    with pytest.raises(InvalidRequest, match=r"layer 2 was not captured, \[4, 1"):
        captured.aux_of(2)


# --- the target's head ---

HEAD_FIELDS: dict[str, Any] = {
    "fingerprint": "f", "upcast": False, "multiply": None, "divide": None, "softcap": None,
    "norm": "rms", "norm_eps": 1e-5, "norm_gain_in_float32": False,
}  # fmt: skip


def head(tensors: dict[str, torch.Tensor | None] | None = None, **changes: Any) -> TargetHead:
    sent: dict[str, torch.Tensor | None] = {
        "weight": torch.arange(28).reshape(7, H).float(),
        "norm_weight": torch.arange(1, 1 + H).float(),
        **(tensors or {}),
    }
    frame = encode(HEAD_FIELDS | changes, {n: t for n, t in sent.items() if t is not None})
    return unpack_target_head(decode(frame.to_bytes()), 7, H, CPU)


def test_a_head_applies_its_norm_its_bias_and_its_transform() -> None:
    got = head({"bias": torch.arange(7).float()}, softcap=2.0)
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    normed = x / (x.pow(2).mean() + 1e-5).sqrt() * torch.arange(1, 1 + H)
    assert got.norm is not None
    torch.testing.assert_close(got.norm(x), normed)
    raw = normed @ got.weight.T + torch.arange(7)
    torch.testing.assert_close(got.logits(got.norm(x)), torch.tanh(raw / 2) * 2)
    assert got.logits(normed.view(1, 1, H)).shape == (1, 1, 7)


@pytest.mark.parametrize("in_float32", [False, True])
def test_a_layer_norm_is_torchs(in_float32: bool) -> None:
    bias = torch.tensor([0.5, -1.0, 2.0, 0.0])
    got = head({"norm_bias": bias}, norm="layer", norm_gain_in_float32=in_float32)
    x = torch.randn(3, 5, H, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.layer_norm(x, (H,), torch.arange(1, 1 + H).float(), bias)
    assert got.norm is not None
    torch.testing.assert_close(got.norm(x), expected)


def test_a_head_without_a_known_norm_has_none() -> None:
    assert head({"norm_weight": None}, norm=None, norm_eps=None).norm is None


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": None},
        {"weight": torch.zeros(6, H)},
        {"weight": torch.zeros(7, H + 1)},
        {"bias": torch.zeros(6)},
        {"norm_weight": torch.zeros(H + 1)},
        {"norm_bias": torch.zeros(1, H)},
        {"extra": torch.zeros(1)},
    ],
)
def test_a_head_of_other_shapes_is_refused(tensors: Any) -> None:
    with pytest.raises(MalformedPayload, match="expected a target head's"):
        head(tensors)


def test_a_head_of_other_fields_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="norm: "):
        head(norm="batch")
