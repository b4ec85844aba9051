"""Adapters against slow loops from their definitions, and every refusal; no other trainer needed.

`tests/peer` trains those trainers' own models on them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagle3_client.adapters import specforge_inputs, speculators_inputs, speculators_weights
from eagle3_schemas import shift_left_with_zero
from eagle3_schemas.capture import Capture
from eagle3_schemas.draft_head import LogitsTransform
from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.target_head import FinalNorm, NormForm, TargetHead

# All different, so that a transposed axis fails.
HIDDEN_SIZE, NUM_AUX, VOCAB_SIZE = 5, 2, 23
EPS = 1e-5

Document = dict[str, Tensor]
"""A document as speculators' datasets have it: one entry a token, nothing shifted."""


def make_documents(lengths: list[int], seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "hidden_states": torch.randn(n, NUM_AUX * HIDDEN_SIZE, generator=generator),
            "verifier_last_hidden_states": torch.randn(n, HIDDEN_SIZE, generator=generator),
            "input_ids": torch.randint(1, VOCAB_SIZE, (n,), generator=generator),
            "loss_mask": torch.randint(0, 2, (n,), generator=generator),
        }
        for n in lengths
    ]


def capture_of(
    rows: list[list[Document]], length: int, *, left: bool = False, packed: bool = False
) -> Capture:
    """Lay documents out as a capture of them has them: ids and loss mask shifted in each row.

    What is not attended holds noise, which must reach no result.
    """
    shape = len(rows), length
    generator = torch.Generator().manual_seed(99)
    tokens = {
        "hidden_states": torch.randn(*shape, NUM_AUX * HIDDEN_SIZE, generator=generator),
        "verifier_last_hidden_states": torch.randn(*shape, HIDDEN_SIZE, generator=generator),
        "input_ids": torch.full(shape, 7),
        "loss_mask": torch.ones(shape, dtype=torch.int64),
    }
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    seq_lens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, documents in enumerate(rows):
        count = sum(len(document["input_ids"]) for document in documents)
        column = length - count if left else 0
        for number, document in enumerate(documents):
            n = len(document["input_ids"])
            attention_mask[row, column : column + n] = 1
            for name, tensor in tokens.items():
                tensor[row, column : column + n] = document[name]
            seq_lens[row, number] = n
            column += n
        seq_lens[row, len(documents) - 1] += length - count
    return Capture(
        {
            "aux": tokens["hidden_states"],
            "last_hidden_prenorm": tokens["verifier_last_hidden_states"],
        },
        (1, 4),
        shift_left_with_zero(tokens["input_ids"]),
        attention_mask,
        shift_left_with_zero(tokens["loss_mask"]),
        seq_lens=seq_lens if packed else None,
    )


def slow_speculators_inputs(documents: list[Document]) -> dict[str, Tensor]:
    """From the definition, a position at a time."""
    positions: dict[str, list[Tensor]] = {}
    for number, document in enumerate(documents):
        for t in range(len(document["input_ids"]) - 1):
            position = {
                "hidden_states": document["hidden_states"][t],
                "input_ids": document["input_ids"][t + 1],
                "verifier_last_hidden_states": document["verifier_last_hidden_states"][t + 1],
                "loss_mask": document["loss_mask"][t + 1],
                "position_ids": torch.tensor(t + 1),
                "document_ids": torch.tensor(number),
            }
            for name, value in position.items():
                positions.setdefault(name, []).append(value)
    return {name: torch.stack(values)[None] for name, values in positions.items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


LENGTHS = [6, 1, 9, 2, 4]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_a_document_whichever_side_is_padded(side: str) -> None:
    documents = make_documents(LENGTHS)
    capture = capture_of([[document] for document in documents], 11, left=side == "left")
    assert_equal(speculators_inputs(capture), slow_speculators_inputs(documents))


def test_packed_rows_are_the_same_documents() -> None:
    documents = make_documents(LENGTHS)
    capture = capture_of([documents[:3], documents[3:]], 17, packed=True)
    assert_equal(speculators_inputs(capture), slow_speculators_inputs(documents))


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_any_packing(rows: list[list[int]], padding: int) -> None:
    length = max(map(sum, rows)) + padding
    documents = make_documents([n for row in rows for n in row])
    left = iter(documents)
    capture = capture_of([[next(left) for _ in row] for row in rows], length, packed=True)
    got = speculators_inputs(capture)
    expected = slow_speculators_inputs(documents)
    if expected:
        assert_equal(got, expected)
    assert all(
        tensor.shape[:2] == (1, sum(n - 1 for r in rows for n in r)) for tensor in got.values()
    )


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_any_padding(lengths: list[int], padding: int, left: bool) -> None:
    documents = make_documents(lengths)
    rows = [[document] for document in documents]
    got = speculators_inputs(capture_of(rows, max(lengths) + padding, left=left))
    expected = slow_speculators_inputs(documents)
    if expected:
        assert_equal(got, expected)
    assert all(t.shape[:2] == (1, sum(max(n - 1, 0) for n in lengths)) for t in got.values())


def test_tokens_that_are_not_attended_are_no_part_of_a_document() -> None:
    (whole,) = make_documents([9])
    capture = capture_of([[whole]], 9)
    kept = torch.tensor([0, 1, 4, 5, 8])
    attention_mask = torch.zeros_like(capture.attention_mask)
    attention_mask[0, kept] = 1
    document = {name: tensor[kept] for name, tensor in whole.items()}
    got = speculators_inputs(replace(capture, attention_mask=attention_mask))
    assert_equal(got, slow_speculators_inputs([document]))


def test_a_capture_of_packed_rows_knows_its_documents(
    serve: Any, connect: Any, build_model: Any
) -> None:
    backend = connect(serve(build_model("llama")), exact=True)
    seq_lens = torch.tensor([[4, 3, 3], [1, 9, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], [0, *range(9)]])
    input_ids = torch.randint(1, 131, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 9] = 0  # padding
    given = {"input_ids": input_ids, "attention_mask": mask, "loss_mask": mask}
    capture = backend.capture(
        **given, position_ids=positions, seq_lens=seq_lens, outputs=["aux", "last_hidden_prenorm"]
    )
    assert torch.equal(capture.seq_lens, seq_lens)
    documents = [
        {
            "hidden_states": capture.aux[row, start:end],
            "verifier_last_hidden_states": capture.last_hidden_prenorm[row, start:end],
            "input_ids": input_ids[row, start:end],
            "loss_mask": mask[row, start:end],
        }
        for row, start, end in [(0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 0, 1), (1, 1, 10)]
    ]
    assert_equal(speculators_inputs(capture), slow_speculators_inputs(documents))
    unpacked = backend.capture(**given, outputs=["aux"])
    assert unpacked.seq_lens is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    documents = make_documents(LENGTHS)
    capture = capture_of([[document] for document in documents], 11)
    masks = {n: getattr(capture, n).to(dtype) * 3 for n in ("attention_mask", "loss_mask")}
    got = speculators_inputs(replace(capture, **{n: m.to(dtype) for n, m in masks.items()}))
    assert_equal(got, slow_speculators_inputs(documents))


# --- speculators' weights ---


def make_head(**changes: Any) -> TargetHead:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    gain = torch.randn(HIDDEN_SIZE, generator=generator)
    norm = FinalNorm(NormForm("rms", EPS, False), gain, None)
    return replace(TargetHead(weight, None, LogitsTransform(), norm), **changes)


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


# --- SpecForge ---


def padded(left: bool = False) -> tuple[Capture, Tensor]:
    """A capture with `last_hidden`, and the mask it was made with."""
    documents = make_documents([6, 1, 9, 4])
    rows = [[document] for document in documents]
    capture = capture_of(rows, 11, left=left)
    loss_mask = torch.randint(0, 2, (4, 11), generator=torch.Generator().manual_seed(1))
    outputs = {"aux": capture.aux, "last_hidden": capture.last_hidden_prenorm}
    shifted = shift_left_with_zero(loss_mask)
    return replace(capture, outputs=outputs, loss_mask=shifted), loss_mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("bias", [None, torch.ones(VOCAB_SIZE)], ids=["plain", "bias"])
def test_specforge_batches_by_definition(left: bool, bias: Tensor | None) -> None:
    capture, loss_mask = padded(left)
    head = make_head(bias=bias, transform=LogitsTransform(softcap=2.0))
    inputs = specforge_inputs(capture, head, loss_mask)
    assert inputs["hidden_states"] is capture.aux
    assert inputs["input_ids"] is capture.input_ids
    assert torch.equal(inputs["attention_mask"], capture.attention_mask)
    assert inputs["target"].shape == (4, 11, VOCAB_SIZE)
    assert inputs["loss_mask"].shape == (4, 11, 1)
    assert inputs["loss_mask"].dtype == torch.int64
    logits = head.logits(capture.last_hidden)
    for row in range(4):
        for t in range(11):
            is_last = t == 10 or not capture.attention_mask[row, t : t + 2].all()
            supervised = int(inputs["loss_mask"][row, t])
            assert supervised == (0 if is_last else int(loss_mask[row, t]))
            if t < 10:
                torch.testing.assert_close(inputs["target"][row, t], logits[row, t + 1])
    assert inputs["loss_mask"].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_specforge_masks_of_any_dtype(dtype: torch.dtype) -> None:
    capture, loss_mask = padded()
    expected = specforge_inputs(capture, make_head(), loss_mask)
    capture = replace(capture, loss_mask=capture.loss_mask.to(dtype))
    assert_equal(specforge_inputs(capture, make_head(), loss_mask.to(dtype)), expected)


def test_the_captures_own_mask_is_refused_since_it_is_shifted() -> None:
    capture, loss_mask = padded()
    for wrong in (capture.loss_mask, loss_mask[:, :-1], loss_mask[:1], 1 - loss_mask):
        with pytest.raises(InvalidRequest, match=r"unshifted mask \[4, 11\].*got another"):
            specforge_inputs(capture, make_head(), wrong)


def test_packed_rows_are_refused_where_documents_would_mix() -> None:
    capture, loss_mask = padded()
    capture = replace(capture, seq_lens=torch.tensor([[5, 6]] * 4))
    with pytest.raises(InvalidRequest, match=r"packed rows\. Send each document"):
        specforge_inputs(capture, make_head(), loss_mask)


def test_an_output_that_was_not_captured_is_named() -> None:
    capture, loss_mask = padded()
    with pytest.raises(InvalidRequest, match=r"got \['aux', 'last_hidden'\].*last_hidden_prenorm"):
        speculators_inputs(capture)
    capture = replace(capture, outputs={"aux": capture.aux})
    with pytest.raises(InvalidRequest, match=r"outputs=\('aux', 'last_hidden'\)"):
        specforge_inputs(capture, make_head(), loss_mask)
