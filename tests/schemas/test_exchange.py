"""A request and its response through real frames: padding left out, everything put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_schemas import DraftVocab
from eagle3_schemas.aux_states import encode_aux
from eagle3_schemas.draft_head import DraftHead, LogitsTransform
from eagle3_schemas.encodings import ENCODINGS
from eagle3_schemas.errors import InvalidRequest, MalformedPayload
from eagle3_schemas.exchange import (
    Supervision,
    TokenBatch,
    check_batch_shapes,
    pack_request,
    rows_on_wire,
    unpack_draft_head,
    unpack_request,
    unpack_response,
)
from eagle3_schemas.frame import Frame, decode, encode
from eagle3_schemas.messages import SupervisionRequest, parse
from eagle3_schemas.supervision import pack_bits

PROPERTY = settings()  # the profile of tests/conftest.py
DIGEST = "ab" * 32
FIELDS: dict[str, Any] = {"request_id": "req-1", "draft_vocab_digest": DIGEST}
H, D = 4, 3
CPU = torch.device("cpu")


def bits(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


# --- request ---


@st.composite
def token_batches(draw: st.DrawFn) -> TokenBatch:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    ids = draw(st.sampled_from([st.integers(-(2**31), 2**31 - 1), st.integers(0, 1)]))

    def grid(values: st.SearchStrategy[Any]) -> torch.Tensor:
        flat = draw(st.lists(values, min_size=batch * length, max_size=batch * length))
        return torch.tensor(flat).reshape(batch, length)

    return TokenBatch(grid(ids).long(), grid(st.booleans()), grid(st.booleans()))


@PROPERTY
@given(token_batches())
def test_any_batch_comes_back_as_it_was(batch: TokenBatch) -> None:
    request, frame = pack_request(batch, **FIELDS)
    received = decode(frame.to_bytes())
    assert parse(SupervisionRequest, received.fields) == request
    back = unpack_request(request, received)
    for name in ("input_ids", "attention_mask", "loss_mask"):
        sent, got = getattr(batch, name), getattr(back, name)
        assert got.dtype is sent.dtype
        assert torch.equal(got, sent)


PADDED = TokenBatch(
    input_ids=torch.tensor([[9, 9, 5, 6], [7, 8, 2, 9]]),
    attention_mask=bits([[0, 0, 1, 1], [1, 1, 0, 0]]),
    loss_mask=bits([[0, 0, 0, 1], [0, 0, 1, 0]]),
)


def test_ids_travel_only_where_a_mask_is_set_if_the_others_are_one_pad_id() -> None:
    request, frame = pack_request(PADDED, **FIELDS)
    sent = decode(frame.to_bytes()).tensors
    assert request.pad_token_id == 9
    assert (request.batch_size, request.sequence_length) == (2, 4)
    assert sent["input_ids"].dtype is torch.int32
    assert sent["input_ids"].tolist() == [5, 6, 7, 8, 2]
    assert sent["attention_mask"].tolist() == [0b00111100]
    assert sent["loss_mask"].tolist() == [0b01001000]


@pytest.mark.parametrize(
    "batch",
    [
        TokenBatch(torch.tensor([[1, 2, 3]]), bits([[0, 0, 1]]), bits([[0, 0, 1]])),
        TokenBatch(torch.tensor([[1, 2, 3]]), bits([[1, 1, 1]]), bits([[0, 0, 0]])),
    ],
    ids=["two pad ids", "no padding"],
)
def test_without_one_pad_id_every_id_travels(batch: TokenBatch) -> None:
    request, frame = pack_request(batch, **FIELDS)
    assert request.pad_token_id is None
    assert decode(frame.to_bytes()).tensors["input_ids"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1])
def test_an_id_that_does_not_fit_int32_is_never_wrapped(token: int) -> None:
    batch = TokenBatch(torch.tensor([[token]]), bits([[1]]), bits([[1]]))
    with pytest.raises(InvalidRequest, match="input_ids must fit int32"):
        pack_request(batch, **FIELDS)


def test_a_field_the_request_refuses_is_named_before_anything_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="rows: "):
        pack_request(PADDED, **FIELDS, rows="some")


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            (torch.ones(6).long(), ONES, ONES),
            r"input_ids must be \[B, T\] with B, T >= 1; got shap",
        ),
        ((torch.ones(2, 0).long(), ONES, ONES), r"got shape \[2, 0\]"),
        ((torch.ones(0, 3).long(), ONES, ONES), r"got shape \[0, 3\]"),
        ((ONES, ONES, ONES), "input_ids must be integers; got torch.float32"),
        ((ONES.bool(), ONES, ONES), "input_ids must be integers; got torch.bool"),
        ((ONES.cfloat(), ONES, ONES), "input_ids must be integers; got torch.complex64"),
        (
            (ONES.long(), ONES.T, ONES),
            r"attention_mask must have the shape .*\[2, 3\]; got \[3, 2\]",
        ),
        ((ONES.long(), ONES, ONES[:1]), r"loss_mask must have the shape .*\[2, 3\]; got \[1, 3\]"),
    ],
)
def test_a_batch_of_wrong_shapes_is_refused(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_batch_shapes(*tensors)


REQUEST_TENSORS = {
    "input_ids": torch.tensor([5, 6, 7, 8, 2], dtype=torch.int32),
    "attention_mask": torch.tensor([0b00111100], dtype=torch.uint8),
    "loss_mask": torch.tensor([0b01001000], dtype=torch.uint8),
}
IDS = "input_ids int32, loss_mask uint8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_mask": None}, f"expected tensors attention_mask uint8, {IDS}; got attention_mask"),
        ({"extra": torch.zeros(1)}, "got attention_mask uint8, extra float32, input_ids"),
        ({"input_ids": torch.arange(5)}, "got attention_mask uint8, input_ids int64"),
        ({"loss_mask": torch.ones(8, dtype=torch.bool)}, "loss_mask bool"),
        (
            {"loss_mask": torch.zeros(2, dtype=torch.uint8)},
            r"must be \[1\] bytes of bits; got \[2\]",
        ),
        ({"attention_mask": torch.zeros(1, 1, dtype=torch.uint8)}, r"of bits; got \[1, 1\]"),
        (
            {"input_ids": torch.zeros(4, dtype=torch.int32)},
            r"must be \[5\] for a \[2, 4\] batch.*\[4\]",
        ),
        ({"input_ids": torch.zeros(8, dtype=torch.int32)}, r"pad_token_id=9; got \[8\]"),
    ],
)
def test_a_request_whose_tensors_do_not_fit_its_fields_is_refused(
    changes: dict[str, torch.Tensor | None], message: str
) -> None:
    request, _ = pack_request(PADDED, **FIELDS)
    tensors = {k: v for k, v in {**REQUEST_TENSORS, **changes}.items() if v is not None}
    with pytest.raises(InvalidRequest, match=message):
        unpack_request(request, Frame({}, tensors))


def test_a_batch_size_beyond_the_tensors_is_refused_before_it_is_built() -> None:
    lie = parse(SupervisionRequest, {**FIELDS, "batch_size": 1 << 20, "sequence_length": 1 << 24})
    with pytest.raises(InvalidRequest, match=r"must be \[2199023255552\] bytes of bits; got \[1\]"):
        unpack_request(lie, Frame({}, REQUEST_TENSORS))


# --- response ---

SENT = TokenBatch(
    input_ids=torch.arange(10).reshape(2, 5),
    attention_mask=bits([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    loss_mask=bits([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]]),
)
SHIFTED_LOSS_MASK = bits([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
POSITION_MASK = bits([[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]])
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


# --- a draft vocab's head ---

VOCAB = DraftVocab.from_ids(torch.tensor([7, 2, 5]))
HEAD_FIELDS: dict[str, Any] = {
    "fingerprint": "f",
    "draft_vocab_digest": VOCAB.digest,
    "upcast": True,
    "multiply": 0.5,
    "divide": None,
    "softcap": 30.0,
}


def draft_head(tensors: dict[str, torch.Tensor], **changes: Any) -> DraftHead:
    frame = decode(encode({**HEAD_FIELDS, **changes}, tensors).to_bytes())
    return unpack_draft_head(frame, VOCAB, CPU)


@pytest.mark.parametrize("bias", [None, torch.tensor([3.0, 4.0, 5.0])], ids=["no-bias", "bias"])
def test_a_draft_head_survives_a_frame(bias: torch.Tensor | None) -> None:
    weight = torch.arange(3.0 * H).reshape(3, H)
    got = draft_head({"weight": weight} | ({} if bias is None else {"bias": bias}))
    assert got.draft_vocab_size == 3
    assert got.transform == LogitsTransform(True, 0.5, None, 30.0)
    assert torch.equal(got.weight[:3], weight)
    assert (got.bias is None) == (bias is None)
    assert bias is None or torch.equal(got.bias[:3], bias)


WEIGHT = torch.zeros(3, H)


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({}, {}, r"expected weight \[3, H\] .*got None"),
        ({"weight": torch.zeros(4, H)}, {}, r"got \[4, 4\]"),
        ({"weight": torch.zeros(3)}, {}, r"got \[3\]"),
        ({"weight": WEIGHT, "bias": torch.zeros(4)}, {}, r"expected bias \[3\] .*got \[4\]"),
        ({"weight": WEIGHT, "bias": torch.zeros(3).bfloat16()}, {}, "got .*bfloat16"),
        ({"weight": WEIGHT}, {"draft_vocab_digest": DIGEST}, "got that of abab"),
        ({"weight": WEIGHT}, {"softcap": "30"}, "softcap"),
        ({"weight": WEIGHT}, {"scale": 2.0}, "scale"),
    ],
)
def test_a_draft_head_that_is_not_the_one_asked_for_is_refused(
    tensors: dict[str, torch.Tensor], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        draft_head(tensors, **fields)
