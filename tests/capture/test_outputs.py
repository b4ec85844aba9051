"""`capture` against the definition: each output, each kind of batch."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from tests.capture.definition import ALL, V, by_definition, check
from tests.families.packing import SAME, difference

from eagle3_client import (
    InvalidRequest,
)
from eagle3_schemas import pack_sequences, shift_left_with_zero, unpack_sequences
from eagle3_schemas.capture import DRAFT_VOCAB_OUTPUTS
from eagle3_server import TransformersTarget, packing


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_every_output_is_what_the_definition_says(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, family: str,
    left: bool,
) -> None:  # fmt: skip
    model = build_model(family)
    inputs, ids = batch_of(V[family], left=left), frequency_ordered(V[family], 53)
    depth = model.config.num_hidden_layers
    layers = (depth - 1, 0, 3, 2, 1)
    backend = connect(serve(build_model(family)), ids, exact=True)
    captured = backend.capture(*inputs, outputs=ALL, aux_layer_ids=layers)
    expected = by_definition(model, inputs, ids, layers)
    check(captured, expected, ALL)
    assert captured.aux_layer_ids == layers
    size = captured.last_hidden.shape[-1]
    for place, layer in enumerate(layers):
        part = expected["aux"][..., place * size : (place + 1) * size]
        torch.testing.assert_close(captured.aux_of(layer), part, rtol=0, atol=0)
    assert torch.equal(captured.input_ids, shift_left_with_zero(inputs.input_ids))
    assert torch.equal(captured.loss_mask, shift_left_with_zero(inputs.loss_mask))
    assert torch.equal(captured.attention_mask, inputs.attention_mask)


@pytest.mark.parametrize("name", ALL)
def test_each_output_alone(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, name: str
) -> None:
    """And what was not asked for is not there, nor on the wire."""
    model = build_model("llama")
    inputs, ids = batch_of(131), frequency_ordered(131, 53)
    backend = connect(serve(build_model("llama")), ids if name in DRAFT_VOCAB_OUTPUTS else None,
                      exact=True)  # fmt: skip
    captured = backend.capture(*inputs, outputs=[name])
    check(captured, by_definition(model, inputs, ids, (1, 2, 3)), [name])
    other = next(each for each in ALL if each != name)
    with pytest.raises(AttributeError, match=f"{other} was not captured; ask for it: outputs=.*"):
        getattr(captured, other)
    with pytest.raises(AttributeError, match="a Capture has no 'logits'"):
        captured.logits  # noqa: B018
    with pytest.raises(dataclasses.FrozenInstanceError):
        captured.outputs = {}
    with pytest.raises(TypeError):
        captured.outputs[name] = None
    assert captured == captured
    assert captured != copy.copy(captured)
    assert name in dir(captured)
    assert repr(captured).startswith(f"Capture({name} [3, 10")
    assert copy.deepcopy(captured).outputs.keys() == {name}
    assert pickle.loads(pickle.dumps(captured)).outputs.keys() == {name}
    assert not hasattr(captured, other)


def test_layers_are_those_named_or_the_backends_or_the_servers(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    bridge, inputs = serve(build_model("llama"), aux_layer_ids=(0, 3, 5)), batch_of(131)
    assert connect(bridge).capture(*inputs, outputs=["aux"]).aux_layer_ids == (0, 3, 5)
    own = connect(bridge, aux_layer_ids=(6, 2, 4))
    assert own.capture(*inputs, outputs=["aux"]).aux_layer_ids == (6, 2, 4)
    assert own.capture(*inputs, outputs=["aux"], aux_layer_ids=[1]).aux_layer_ids == (1,)
    model = build_model("llama")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    shallow = connect(serve(model))
    with pytest.raises(InvalidRequest, match=r"only 2 decoder layers, .*name aux_layer_ids"):
        shallow.capture(*inputs, outputs=["aux"])
    assert shallow.capture(*inputs, outputs=["aux"], aux_layer_ids=[1, 0]).aux.shape[-1] == 96


def test_a_batch_below_16_tokens_is_exact_too(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    """Where the head's rows alone would round differently: the model's own logits are taken."""
    inputs, ids = batch_of(131, (5,)), frequency_ordered(131, 53)
    expected = by_definition(build_model("llama"), inputs, ids, (1, 2, 3))
    backend = connect(serve(build_model("llama")), ids, exact=True)
    check(backend.capture(*inputs, outputs=ALL), expected, ALL)
    head_only = tuple(name for name in ALL if name not in ("last_hidden", "aux"))
    check(backend.capture(*inputs, outputs=head_only), expected, head_only)


def test_a_batch_without_supervision_has_states_and_zeros(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    inputs, ids = batch_of(131), frequency_ordered(131, 53)
    inputs = dataclasses.replace(inputs, loss_mask=torch.zeros_like(inputs.loss_mask))
    expected = by_definition(build_model("llama"), inputs, ids, (1, 2, 3))
    backend = connect(serve(build_model("llama")), ids, exact=True)
    check(backend.capture(*inputs, outputs=ALL), expected, ALL)


def test_packed_rows_are_captured_as_their_documents_alone(
    build_model: Any, serve: Any, connect: Any, frequency_ordered: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (7, 3, 12, 1, 5)
    documents = [torch.randint(1, 131, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.8 for n in lengths]
    backend = connect(serve(build_model("llama")), frequency_ordered(131, 53))
    got = backend.capture(**pack_sequences(documents, masks), outputs=ALL)
    start = 0
    for ids, mask in zip(documents, masks, strict=True):
        end = start + len(ids)
        alone = backend.capture(ids[None], torch.ones_like(ids)[None], mask[None], outputs=ALL)
        for name in ALL:
            here, there = getattr(got, name)[:, start:end], getattr(alone, name)
            if here.is_floating_point():
                # As docs/encodings.md states it: of the whole, since an element that cancels out
                # has another number of right digits on each kind of CPU.
                assert not there.any() or difference(here, there) <= SAME[torch.float32], name
                assert torch.equal(here != 0, there != 0), name
            else:
                assert torch.equal(here, there), name
        start = end
    packed = pack_sequences(documents, masks)
    for name in ("position_ids", "seq_lens", "doc_remaining"):
        assert torch.equal(getattr(got, name), packed[name])
    with pytest.raises(InvalidRequest, match=r"expected an Eagle3TargetBatch.*; got Capture"):
        unpack_sequences(got)
    assert got.loss_mask_probs.bool().any(-1).sum() == sum(int(mask[1:].sum()) for mask in masks)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "outputs",
    [*((name,) for name in ALL), ("last_hidden", "argmax"), ("last_hidden", "loss_mask_probs")],
    ids="+".join,
)
def test_documents_of_many_lengths_are_each_where_they_belong(
    build_model: Any, serve: Any, connect: Any, frequency_ordered: Any, exact: bool,
    outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each length is a forward of its own, whatever of it is asked for."""
    monkeypatch.setattr(packing, "_FEW_TOKENS", 0)
    lengths = (9, 2, 6, 4, 1)
    target = TransformersTarget(build_model("llama"), model_id="tiny")
    by_length = packing.Packing("documents", None, 1.0)
    target._runner = dataclasses.replace(target._runner, packing=by_length)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 131, (n,), generator=generator) for n in lengths]
    masks = [torch.ones(n) for n in lengths]
    backend = connect(serve(target), frequency_ordered(131, 53), exact=exact)
    got = backend.capture(**pack_sequences(documents, masks), outputs=outputs)
    start = 0
    for ids, mask in zip(documents, masks, strict=True):
        alone = backend.capture(ids[None], torch.ones_like(ids)[None], mask[None], outputs=outputs)
        for name in outputs:
            part = getattr(got, name)[:, start : start + len(ids)]
            torch.testing.assert_close(part, getattr(alone, name), rtol=2e-5, atol=2e-5)
        start += len(ids)


def test_a_padded_batch_is_trimmed_unless_exact(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    model, ids = build_model("llama"), frequency_ordered(131, 53)
    inputs = batch_of(131, (6, 4, 2))
    wide = [torch.nn.functional.pad(each, (0, 14)) for each in inputs]
    columns: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, a: columns.append(a[0].shape[1]))
    bridge = serve(model)
    loose = connect(bridge, ids).capture(*wide, outputs=ALL)
    exact = connect(bridge, ids, exact=True).capture(*wide, outputs=ALL)
    assert columns[-2:] == [6, 20]
    for name in ALL:
        a, b = getattr(loose, name), getattr(exact, name)
        assert a.shape[1] == 20
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_the_draft_vocabs_share_of_the_probability(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    """What a loss over the full vocab needs: p over V of the draft's ids."""
    model, inputs, ids = build_model("llama"), batch_of(131), frequency_ordered(131, 53)
    got = connect(serve(build_model("llama")), ids).capture(
        *inputs, outputs=("loss_mask_probs", "logsumexp", "draft_logsumexp")
    )
    with torch.no_grad():
        logits = model(inputs.input_ids, attention_mask=inputs.attention_mask).logits
    expected = shift_left_with_zero(logits).softmax(-1)[..., ids]
    share = (got.draft_logsumexp - got.logsumexp).exp()
    mask = got.loss_mask.bool()
    full = got.loss_mask_probs * share[..., None]
    torch.testing.assert_close(full[mask], expected[mask], rtol=1e-5, atol=1e-7)


def test_states_are_cast_and_the_rest_is_not(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    bridge = serve(build_model("llama", torch.bfloat16))
    backend = connect(bridge, frequency_ordered(131, 53), output_dtype=torch.float32)
    got = backend.capture(*batch_of(131), outputs=ALL)
    dtypes = {name: tensor.dtype for name, tensor in got.outputs.items()}
    assert dtypes == {
        "aux": torch.float32, "last_hidden_prenorm": torch.float32, "last_hidden": torch.float32,
        "argmax": torch.int64, "logsumexp": torch.float32, "position_mask": torch.bool,
        "loss_mask_probs": torch.float32, "loss_mask_logits": torch.bfloat16,
        "draft_logsumexp": torch.float32,
    }  # fmt: skip
    narrow = connect(bridge, exact=True, output_dtype=torch.float16)
    with pytest.raises(InvalidRequest, match=r"exact=True forbids output_dtype torch\.float16"):
        narrow.capture(*batch_of(131), outputs=["last_hidden"])
