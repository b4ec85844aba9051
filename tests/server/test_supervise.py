"""Every encoding, fp8 and `exact`, through a server, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.server.padding import ENCODINGS, PADDING, ROWS, V, columns_of
from torch import Tensor, nn

from eagle3_client import InvalidRequest
from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.tokens import TokenBatch


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["llama", "gemma2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- every encoding ---


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_what_the_definition_says(
    model: Any, family: str, dtype: torch.dtype, padded: Any, draft_ids: Tensor, serve: Any,
    connect: Any, expect: Any, matches: Any, encoding: str, rows: str, exact: bool,
) -> None:  # fmt: skip
    """Without `exact` too there is no tolerance: it is the definition of the trimmed batch."""
    backend = connect(serve(model), draft_ids, encoding=encoding, rows=rows, exact=exact)
    info = backend.model_info()
    assert (info.head, info.encodings) == ("rows", tuple(ENCODINGS))
    is_trimmed = not exact and rows != "all"
    used = padded.input_ids.shape[1] - (PADDING if is_trimmed else 0)
    assert columns_of(model, backend, padded) == used
    trimmed = replace(padded, **{name: t[:, :used] for name, t in vars(padded).items()})
    expected = expect(model, trimmed, draft_ids, rows=rows)
    if is_trimmed:
        expected = replace(
            expected,
            **{n: nn.functional.pad(t, (0, 0, 0, PADDING)) for n, t in vars(expected).items()},
        )
    batch = backend.generate_batch(*padded)
    matches(batch, expected)
    assert 0 < int(batch.position_mask.sum()) < int((padded.loss_mask[:, 1:] != 0).sum())


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [1, 2, 7, 16, V])
def test_a_draft_vocab_of_any_size_is_exact(
    model: Any, family: str, dtype: torch.dtype, padded: Any, frequency_ordered: Any, serve: Any,
    connect: Any, expect: Any, matches: Any, encoding: str, size: int,
) -> None:  # fmt: skip
    """Of few ids, another kernel would round the trainer's own matmul differently."""
    ids = frequency_ordered(V, size)
    backend = connect(serve(model), ids, encoding=encoding, exact=True, rows="loss_mask")
    matches(backend.generate_batch(*padded), expect(model, padded, ids, rows="loss_mask"))


def test_a_head_with_a_bias_is_exact_in_every_encoding(
    build_model: Any, padded: Any, draft_ids: Tensor, serve: Any, connect: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    model = build_model("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(V, generator=torch.Generator().manual_seed(2)))
    bridge, expected = serve(model), expect(model, padded, draft_ids)
    for encoding in ENCODINGS:
        backend = connect(bridge, draft_ids, encoding=encoding, exact=True)
        assert backend.model_info().encodings == tuple(ENCODINGS)
        matches(backend.generate_batch(*padded), expected)


def test_hidden_and_logits_are_smaller_than_probs(
    build_model: Any, batch_of: Any, frequency_ordered: Any, serve: Any, connect: Any
) -> None:
    bridge, inputs = serve(build_model("llama", torch.bfloat16)), batch_of(V)
    sent = {}
    for encoding in ENCODINGS:
        backend = connect(bridge, frequency_ordered(V, 100), encoding=encoding, rows="loss_mask")
        backend.generate_batch(*inputs)  # `hidden` downloads the draft head once
        before = backend.bytes_received
        backend.generate_batch(*inputs)
        sent[encoding] = backend.bytes_received - before
    count = int((inputs.loss_mask[:, 1:] != 0).sum())
    assert abs(sent["probs"] - sent["logits"] - count * 100 * 2) < 128
    assert abs(sent["logits"] - sent["hidden"] - count * (100 - 48) * 2) < 128


# --- exact ---


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("lengths", [(15,), (5, 5, 5), (4, 3), (2,)], ids=str)
@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_fewer_than_16_tokens_are_exact_by_the_full_path(
    model: Any, family: str, dtype: torch.dtype, batch_of: Any, draft_ids: Tensor, serve: Any,
    connect: Any, expect: Any, matches: Any, lengths: tuple[int, ...], encoding: str,
) -> None:  # fmt: skip
    """The model's own matmul is then of another kernel, which padded rows do not repeat."""
    inputs = batch_of(V, lengths)
    inputs.loss_mask[:] = inputs.attention_mask
    backend = connect(serve(model), draft_ids, encoding=encoding, exact=True, rows="loss_mask")
    expected = expect(model, inputs, draft_ids, rows="loss_mask")
    assert expected.target_probs.any()
    matches(backend.generate_batch(*inputs), expected)


def test_hidden_under_exact_needs_16_tokens_and_says_so(
    build_model: Any, batch_of: Any, draft_ids: Tensor, serve: Any, connect: Any, expect: Any,
    matches: Any,
) -> None:  # fmt: skip
    model = build_model("llama")
    bridge, small, enough = serve(model), batch_of(V, (5, 5, 5)), batch_of(V, (8, 8))
    backend = connect(bridge, draft_ids, encoding="hidden", exact=True)
    with pytest.raises(InvalidRequest, match=r"at least 16 tokens; use 'probs' or 'l") as caught:
        backend.generate_batch(*small)
    assert caught.value.attempts == 1
    matches(backend.generate_batch(*enough), expect(model, enough, draft_ids))
    close = connect(bridge, draft_ids, encoding="hidden").generate_batch(*small)
    expected = expect(model, small, draft_ids)
    assert expected.position_mask.any()
    assert torch.equal(close.position_mask, expected.position_mask)
    torch.testing.assert_close(close.target_probs, expected.target_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"aux_dtype": "float8_e4m3"}, "exact=True forbids the lossy aux_dtype 'float8_e4m3'"),
        ({"encoding": "hidden", "device": "cuda"}, "exact=True forbids encoding 'hidden' on cuda"),
    ],
)
def test_exact_forbids_what_is_not(connect: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        connect(exact=True, **arguments)


# --- fp8 aux states ---


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fp8_aux_states_are_opt_in_bounded_and_touch_nothing_else(
    model: Any, family: str, dtype: torch.dtype, padded: Any, draft_ids: Tensor, serve: Any,
    connect: Any, same: Any, encoding: str,
) -> None:  # fmt: skip
    bridge = serve(model)
    plain = connect(bridge, draft_ids, encoding=encoding)
    lossy = connect(bridge, draft_ids, encoding=encoding, aux_dtype="float8_e4m3")
    batch, expected = lossy.generate_batch(*padded), plain.generate_batch(*padded)
    same(batch.position_mask, expected.position_mask)
    same(batch.target_probs, expected.target_probs)
    got, exact = batch.aux_hidden_states, expected.aux_hidden_states
    assert got.dtype is exact.dtype is dtype
    assert not torch.equal(got, exact), "nothing was lossy"
    assert torch.equal(got.any(-1), exact.any(-1))
    groups = nn.functional.pad(exact.float(), (0, -exact.shape[-1] % 64)).unflatten(-1, (-1, 64))
    largest = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2)
    error = (got.float() - exact.float()).abs()
    rounding = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-20
    bound = exact.float().abs() * (2.0**-4 + rounding)
    assert (error <= torch.maximum(bound, largest[..., : got.shape[-1]] * 2.0**-18)).all()


def test_fp8_is_never_chosen_unasked(
    build_model: Any, padded: Any, draft_ids: Tensor, serve: Any, connect: Any, expect: Any,
    same: Any,
) -> None:  # fmt: skip
    model = build_model("llama", torch.bfloat16)
    batch = connect(serve(model), draft_ids).generate_batch(*padded)
    trimmed = replace(padded, **{n: t[:, :-PADDING] for n, t in vars(padded).items()})
    expected = expect(model, trimmed, draft_ids)
    same(batch.aux_hidden_states[:, :-PADDING], expected.aux_hidden_states)


# --- what is offered ---


def test_an_encoding_the_target_does_not_offer_is_refused_with_those_it_does(
    build_model: Any, batch_of: Any, draft_ids: Tensor, serve: Any, connect: Any, monkeypatch: Any
) -> None:
    """By the request itself and by the draft head's, whichever comes first."""
    model, inputs = build_model("llama"), batch_of(V)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    bridge = serve(model)
    backend = connect(bridge, draft_ids, encoding="hidden")
    assert backend.model_info().encodings == ("probs", "logits")
    with pytest.raises(InvalidRequest, match=r"hidden.*\['probs', 'logits'\]"):
        backend.generate_batch(*inputs)
    connection = Connection("http://target", token=None, timeout_s=9, transport=bridge)
    _, frame = pack_request(
        TokenBatch(inputs.input_ids, inputs.attention_mask.bool(), inputs.loss_mask.bool()),
        request_id="request-7",
        draft_vocab_digest=DraftVocab.from_ids(draft_ids).digest,
        encoding="hidden",
    )
    with pytest.raises(InvalidRequest, match=r"one of \['probs', 'logits'\].*got 'hidden'"):
        connection.supervise(frame, "request-7")
