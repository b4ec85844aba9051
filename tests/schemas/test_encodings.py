"""Every encoding through a frame: all decode to the same bits, those of `probs`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.encodings import ENCODINGS, LogitsEncoding, ProbsEncoding
from eagle3_schemas.frame import decode, encode

TRANSFORMS = {
    "identity": LogitsTransform(),
    "upcast": LogitsTransform(True),
    "scaled": LogitsTransform(multiply=0.0625),
    "softcapped": LogitsTransform(softcap=3.0),
    "all": LogitsTransform(True, 0.7, 1.3, 3.0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
H, D = 24, 37


@pytest.fixture(params=TRANSFORMS)
def transform(request: pytest.FixtureRequest) -> LogitsTransform:
    return TRANSFORMS[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def head_and_rows(
    count: int, dtype: torch.dtype, transform: LogitsTransform
) -> tuple[DraftHead, Tensor]:
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(D, H, generator=generator).to(dtype)
    bias = torch.randn(D, generator=generator).to(dtype)
    rows = torch.randn(count, H, generator=generator).to(dtype)
    return DraftHead.build(weight, bias, transform), rows


def test_encodings_are_listed_by_the_names_of_the_protocol() -> None:
    assert {name: encoding.tensor_name for name, encoding in ENCODINGS.items()} == {
        "probs": "target_probs",
        "logits": "draft_logits",
        "hidden": "head_input",
    }
    assert [name for name, encoding in ENCODINGS.items() if encoding.needs_draft_head] == ["hidden"]


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("count", [0, 1, 5, 16, 33])
def test_every_encoding_decodes_to_the_softmax_of_the_draft_logits(
    name: str, count: int, dtype: torch.dtype, transform: LogitsTransform
) -> None:
    encoding = ENCODINGS[name]
    head, head_input = head_and_rows(count, dtype, transform)
    draft_logits = head.logits(head_input)
    before = draft_logits.clone()
    sent = encoding.encode(head_input, draft_logits, transform)
    columns, dtypes = encoding.columns_and_dtypes(D, dtype, head)
    assert sent.shape == (count, columns)
    assert sent.dtype in dtypes
    received = decode(encode({}, {encoding.tensor_name: sent}).to_bytes())
    got = encoding.decode(received.tensors[encoding.tensor_name], head)
    assert got.dtype is torch.float32
    assert got.shape == (count, D)
    assert torch.equal(got, torch.softmax(draft_logits.float(), dim=-1))
    assert torch.equal(draft_logits, before)


def test_logits_travel_in_the_narrowest_dtype_that_holds_them(
    dtype: torch.dtype, transform: LogitsTransform
) -> None:
    head, head_input = head_and_rows(4, dtype, transform)
    draft_logits = head.logits(head_input)
    sent = LogitsEncoding().encode(head_input, draft_logits, transform)
    holds_more = transform == TRANSFORMS["all"]
    assert sent.dtype is (torch.float32 if holds_more else dtype)
    assert torch.equal(sent.float(), draft_logits.float())


def test_logits_that_were_changed_after_the_upcast_are_not_narrowed() -> None:
    """Narrowing them would lose bits, and with them the equality of the encodings."""
    head, head_input = head_and_rows(9, torch.bfloat16, TRANSFORMS["all"])
    logits = head.logits(head_input)
    assert not torch.equal(logits.bfloat16().float(), logits)


def test_hidden_rows_are_the_heads_input_itself() -> None:
    head, head_input = head_and_rows(4, torch.bfloat16, TRANSFORMS["all"])
    none = head_input.new_empty(4, 0)
    assert ENCODINGS["hidden"].encode(head_input, none, head.transform) is head_input


def test_hidden_without_a_draft_head_says_what_it_needs() -> None:
    for use in (
        lambda: ENCODINGS["hidden"].decode(torch.zeros(3, H), None),
        lambda: ENCODINGS["hidden"].columns_and_dtypes(D, torch.float32, None),
    ):
        with pytest.raises(ValueError, match="`hidden` needs the draft vocab's head"):
            use()


def test_probs_are_sums_to_one_over_the_draft_vocab_alone(dtype: torch.dtype) -> None:
    head, head_input = head_and_rows(6, dtype, TRANSFORMS["identity"])
    rows = ProbsEncoding().encode(head_input, head.logits(head_input), head.transform)
    torch.testing.assert_close(rows.sum(-1), torch.ones(6))
