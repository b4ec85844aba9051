"""A response through a real frame, spread to their positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from tests.schemas.sent import CPU, DIGEST, POSITION_MASK, SENT, SHIFTED_LOSS_MASK, D, H, bits

from eagle3_schemas.aux_states import encode_aux
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import MalformedPayload
from eagle3_schemas.exchange import Supervision, pack_request, rows_on_wire, unpack_response
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.supervision import pack_bits

PROPERTY = settings()  # the profile of tests/conftest.py
FIELDS: dict[str, Any] = {"request_id": "req-1", "draft_vocab_digest": DIGEST}
ROWS = {
    "position_mask": POSITION_MASK,
    "loss_mask": SHIFTED_LOSS_MASK,
    "all": bits([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]),
}
AUX = torch.arange(1, 1 + 2 * 5 * 3 * H).reshape(2, 5, 3 * H).bfloat16()
PROBS = torch.arange(1, 1 + 2 * 5 * D).reshape(2, 5, D).float()
HEAD = DraftHead.build(torch.arange(D * H).reshape(D, H).bfloat16(), None, LogitsTransform())
BF16 = r"torch\.bfloat16"


def answer(
    asked: str = "position_mask",
    tensors: dict[str, torch.Tensor | None] | None = None,
    *,
    how: dict[str, str] | None = None,
    head: DraftHead | None = None,
    **changes: Any,
) -> Supervision:
    """Unpack the right answer to a request, with these fields and tensors changed.

    `how` are the encoding and aux_dtype asked for.
    """
    how = {"encoding": "probs", "aux_dtype": "model", **(how or {})}
    request, _ = pack_request(SENT, **FIELDS, **how, rows=asked, aux_layer_ids=(1, 2, 4))
    fields = {
        "request_id": "req-1",
        "fingerprint": "f",
        "draft_vocab_digest": DIGEST,
        "aux_layer_ids": [1, 2, 4],
        "rows": asked,
        **how,
        **changes,
    }
    sent = {
        "aux_hidden_states": AUX[SENT.attention_mask],
        "position_mask": pack_bits(POSITION_MASK),
        "target_probs": PROBS[ROWS[asked]],
        **(tensors or {}),
    }
    frame = encode(fields, {name: t for name, t in sent.items() if t is not None})
    _, supervision = unpack_response(
        decode(frame.to_bytes()),
        request,
        SENT,
        hidden_size=H,
        dtype=torch.bfloat16,
        draft_vocab_size=D,
        draft_head=head,
        device=CPU,
    )
    return supervision


@pytest.mark.parametrize("rows", ROWS)
def test_an_answer_is_spread_to_its_positions_and_zero_elsewhere(rows: str) -> None:
    got = answer(rows)
    assert got.aux_hidden_states.dtype is torch.bfloat16
    assert got.target_probs.dtype is torch.float32
    assert got.position_mask.dtype is torch.bool
    assert got.position_mask.shape == (2, 5, 1)
    for row in range(2):
        for column in range(5):
            attended, sent = SENT.attention_mask[row, column], ROWS[rows][row, column]
            aux = AUX[row, column] if attended else torch.zeros(3 * H).bfloat16()
            probs = PROBS[row, column] if sent else torch.zeros(D)
            if rows == "all" and column == 4:  # never sent: the softmax of zeros, by definition
                probs = torch.softmax(torch.zeros(D), 0)
            assert torch.equal(got.aux_hidden_states[row, column], aux)
            assert torch.equal(got.target_probs[row, column], probs)
            assert got.position_mask[row, column, 0] == POSITION_MASK[row, column]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", "req-2"),
        ("draft_vocab_digest", "cd" * 32),
        ("aux_layer_ids", [1, 2, 3]),
        ("aux_layer_ids", [4, 2, 1]),
        ("encoding", "logits"),
        ("rows", "all"),
        ("aux_dtype", "float8_e4m3"),
    ],
)
def test_an_answer_to_another_request_is_refused(field: str, value: Any) -> None:
    words = {"aux_layer_ids": r"expected aux_layer_ids \(1, 2, 4\), got \("}
    with pytest.raises(
        MalformedPayload, match=words.get(field, f"the answer is to another request: {field} ")
    ):
        answer(**{field: value})


def test_default_layers_are_whatever_the_server_names() -> None:
    request, _ = pack_request(SENT, **FIELDS)
    frame = encode(
        {
            **FIELDS,
            "fingerprint": "f",
            "aux_layer_ids": [3, 1],
            "encoding": "probs",
            "rows": "position_mask",
            "aux_dtype": "model",
        },
        {
            "aux_hidden_states": torch.zeros(7, 2 * H),
            "position_mask": pack_bits(POSITION_MASK),
            "target_probs": torch.zeros(3, D),
        },
    )
    response, got = unpack_response(
        decode(frame.to_bytes()),
        request,
        SENT,
        hidden_size=H,
        dtype=torch.float32,
        draft_vocab_size=D,
        draft_head=None,
        device=CPU,
    )
    assert response.aux_layer_ids == (3, 1)
    assert got.aux_hidden_states.shape == (2, 5, 2 * H)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"aux_hidden_states": None}, rf"expected aux_hidden_states \[7, 12\] {BF16}, got None"),
        ({"aux_hidden_states": AUX[0, :, :] + AUX[1]}, rf"\[7, 12\] {BF16}, got \[5, 12\]"),
        ({"aux_hidden_states": AUX.view(15, 8)[:7]}, rf"\[7, 12\] {BF16}, got \[7, 8\]"),
        ({"aux_hidden_states": torch.zeros(7, 12)}, rf"{BF16}, got \[7, 12\] torch\.float32"),
        ({"position_mask": None}, r"expected position_mask \[2\] torch\.uint8, got None"),
        ({"position_mask": torch.zeros(1, dtype=torch.uint8)}, r"uint8, got \[1\] torch\.uint8"),
        ({"position_mask": torch.zeros(2)}, r"uint8, got \[2\] torch\.float32"),
        (
            {"position_mask": pack_bits(torch.ones(2, 5, dtype=torch.bool))},
            "position_mask marks positions outside the shifted loss_mask",
        ),
        ({"target_probs": None}, r"expected target_probs \[3, 3\] torch\.float32, got None"),
        ({"target_probs": torch.zeros(4, D)}, r"target_probs \[3, 3\] .*, got \[4, 3\]"),
        ({"target_probs": torch.zeros(3, D + 1)}, r"target_probs \[3, 3\] .*, got \[3, 4\]"),
        ({"target_probs": torch.zeros(3, D).double()}, "got .*torch.float64"),
        ({"target_probs": torch.zeros(3, D).bfloat16()}, "got .*torch.bfloat16"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(
    tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(MalformedPayload, match=message):
        answer(tensors=tensors)


@pytest.mark.parametrize("aux_dtype", ["model", "float8_e4m3"])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
@pytest.mark.parametrize("rows", ROWS)
def test_every_encoding_and_aux_dtype_is_decoded_and_spread(
    rows: str, encoding: str, aux_dtype: str
) -> None:
    hidden = torch.linspace(-2, 2, 2 * 5 * H).reshape(2, 5, H).bfloat16()
    weight = HEAD.weight[:D]
    logits = torch.nn.functional.linear(hidden.reshape(10, H), weight).view(2, 5, D)
    sent = ROWS[rows]
    wire = {"probs": logits.float().softmax(-1), "logits": logits, "hidden": hidden}[encoding]
    got = answer(
        rows,
        {
            **{"aux_hidden_states": None, "target_probs": None},
            **encode_aux(AUX[SENT.attention_mask], aux_dtype),
            ENCODINGS[encoding].tensor_name: wire[sent],
        },
        how={"encoding": encoding, "aux_dtype": aux_dtype},
        head=HEAD if encoding == "hidden" else None,
    )
    expected = torch.where(sent[..., None], logits.float().softmax(-1), torch.zeros(()))
    if rows == "all":
        expected[:, -1] = 1 / D
    torch.testing.assert_close(got.target_probs, expected, rtol=1e-2, atol=1e-6)
    assert torch.equal(got.target_probs == 0, expected == 0)
    assert got.aux_hidden_states.dtype is torch.bfloat16
    attended = SENT.attention_mask
    assert not got.aux_hidden_states[~attended].any()
    bound = {"model": 0.0, "float8_e4m3": 1 / 15}[aux_dtype]  # 2**-4, and bf16 on top
    torch.testing.assert_close(
        got.aux_hidden_states[attended], AUX[attended], rtol=bound, atol=0.2 * bound
    )


@pytest.mark.parametrize(
    ("how", "tensors", "message"),
    [
        ({"encoding": "logits"}, {}, r"expected draft_logits \[3, 3\] torch\.bfloat16, got None"),
        ({"encoding": "logits"}, {"draft_logits": torch.zeros(3, H)}, r"got \[3, 4\]"),
        (
            {"encoding": "logits"},
            {"draft_logits": torch.zeros(3, D).to(torch.float8_e4m3fn)},
            "got .*torch.float8_e4m3fn",
        ),
        ({"encoding": "hidden"}, {}, r"expected head_input \[3, 4\] torch\.bfloat16, got None"),
        ({"encoding": "hidden"}, {"head_input": torch.zeros(3, D).bfloat16()}, r"got \[3, 3\]"),
        ({"encoding": "hidden"}, {"head_input": torch.zeros(4, H).bfloat16()}, r"got \[4, 4\]"),
        ({"encoding": "hidden"}, {"head_input": torch.zeros(3, H)}, "got .*torch.float32"),
        (
            {"aux_dtype": "float8_e4m3"},
            {},
            r"expected aux_codes \[7, 12\] torch\.float8_e4m3fn, got None",
        ),
        (
            {"aux_dtype": "float8_e4m3"},
            {"aux_codes": torch.zeros(7, 12).to(torch.float8_e4m3fn)},
            r"expected aux_scales \[7, 1\] torch\.float32, got None",
        ),
        (
            {"aux_dtype": "float8_e4m3"},
            {"aux_codes": torch.zeros(7, 12), "aux_scales": torch.zeros(7, 1)},
            r"aux_codes .*got \[7, 12\] torch\.float32",
        ),
        (
            {"aux_dtype": "float8_e4m3"},
            {
                "aux_codes": torch.zeros(7, 12).to(torch.float8_e4m3fn),
                "aux_scales": torch.zeros(7, 2),
            },
            r"aux_scales .*got \[7, 2\]",
        ),
    ],
)
def test_an_answer_in_another_form_than_asked_for_is_refused(
    how: dict[str, str], tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(MalformedPayload, match=message):
        answer(tensors=tensors, how=how, head=HEAD if how.get("encoding") == "hidden" else None)


def test_the_last_column_is_never_on_the_wire() -> None:
    """Whatever the model says there: its logits are zeros by definition."""
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(rows_on_wire("all", everything, everything), ROWS["all"])
    assert torch.equal(
        rows_on_wire("loss_mask", POSITION_MASK, SHIFTED_LOSS_MASK), ROWS["loss_mask"]
    )
    assert torch.equal(
        rows_on_wire("position_mask", POSITION_MASK, SHIFTED_LOSS_MASK), POSITION_MASK
    )
    assert not rows_on_wire("all", bits([[0]]), bits([[0]])).any()
