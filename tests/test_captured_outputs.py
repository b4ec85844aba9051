"""`capture` against the definition: each output, each kind of batch, each refusal."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import httpx
import pytest
import torch
import transformers
from tests.servers import router
from torch import Tensor

from eagle3_client import (
    FingerprintMismatch,
    InvalidRequest,
    LimitExceeded,
    RemoteEagle3Error,
    TargetFailed,
    VocabMappingMissing,
)
from eagle3_schemas import pack_sequences, shift_left_with_zero, unpack_sequences
from eagle3_schemas.capture import DRAFT_VOCAB_OUTPUTS, OUTPUTS
from eagle3_server import TransformersTarget, packing

V = {"llama": 131, "gemma2": 131, "gpt2": 131, "qwen3": 157}
ALL = tuple(OUTPUTS)
FREE = tuple(name for name in ALL if name not in DRAFT_VOCAB_OUTPUTS)


def by_definition(model: Any, inputs: Any, draft_ids: Tensor, layers: Any) -> dict[str, Tensor]:
    """Every output, from `output_hidden_states` and loops."""
    attended = inputs.attention_mask != 0
    depth = model.config.num_hidden_layers
    before_norm: list[Tensor] = []
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    handle = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    with torch.no_grad():
        output = model(
            input_ids=inputs.input_ids, attention_mask=attended.long(),
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
    handle.remove()
    states = [*output.hidden_states[1:depth], before_norm[0]]
    batch_size, length, _ = output.logits.shape
    result = {
        "aux": torch.cat([states[i] for i in layers], -1),
        "last_hidden_prenorm": before_norm[0],
        "last_hidden": output.hidden_states[-1],
    }
    result = {
        name: torch.where(attended[..., None], state, state.new_zeros(()))
        for name, state in result.items()
    }
    result["argmax"] = torch.zeros(batch_size, length, dtype=torch.int64)
    result["logsumexp"] = torch.zeros(batch_size, length)
    result["position_mask"] = torch.zeros(batch_size, length, 1, dtype=torch.bool)
    result["loss_mask_probs"] = torch.zeros(batch_size, length, len(draft_ids))
    result["loss_mask_logits"] = output.logits.new_zeros(batch_size, length, len(draft_ids))
    result["draft_logsumexp"] = torch.zeros(batch_size, length)
    selected = set(draft_ids.tolist())
    for b in range(batch_size):
        for t in range(length - 1):
            if not inputs.loss_mask[b, t + 1]:
                continue
            z = output.logits[b, t + 1]
            values = z.tolist()
            best = values.index(max(values))
            result["argmax"][b, t] = best
            result["logsumexp"][b, t] = z.double().exp().sum().log()
            result["position_mask"][b, t, 0] = best in selected
            chosen = torch.stack([z[i] for i in draft_ids.tolist()])
            result["loss_mask_logits"][b, t] = chosen
            chosen = chosen.float()
            result["loss_mask_probs"][b, t] = torch.softmax(chosen, dim=0)
            result["draft_logsumexp"][b, t] = chosen.double().exp().sum().log()
    return result


def check(captured: Any, expected: dict[str, Tensor], names: Any) -> None:
    assert list(captured.outputs) == list(names)
    for name in names:
        got = getattr(captured, name)
        assert (got.shape, got.dtype) == (expected[name].shape, expected[name].dtype), name
        is_sum = name.endswith("logsumexp")
        tolerance = 1e-6 if is_sum else 0.0
        torch.testing.assert_close(got, expected[name], rtol=tolerance, atol=tolerance)


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
            torch.testing.assert_close(
                getattr(got, name)[:, start:end], getattr(alone, name), rtol=2e-5, atol=2e-5
            )
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


def test_in_the_background_and_ahead(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, same: Any
) -> None:
    backend = connect(serve(build_model("llama")))
    batches = [tuple(batch_of(131, seed=seed)) for seed in range(5)]
    alone = [backend.capture(*each, outputs=["last_hidden"]).last_hidden for each in batches]
    handle = backend.capture_async(*batches[2], outputs=["last_hidden"])
    same(handle.result(60).last_hidden, alone[2])
    with backend.prefetch_capture(batches, depth=3, outputs=["last_hidden"]) as prefetch:
        for (batch, captured), source, expected in zip(prefetch, batches, alone, strict=True):
            assert batch is source
            same(captured.last_hidden, expected)


def test_a_server_that_forgot_the_draft_vocab_is_told_again(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, same: Any
) -> None:
    bridge = serve(build_model("llama"))
    backend = connect(bridge, frequency_ordered(131, 53))
    first = backend.capture(*batch_of(131), outputs=["loss_mask_probs"])
    bridge.app_client = serve(build_model("llama")).app_client  # restarted, empty
    second = backend.capture(*batch_of(131), outputs=["loss_mask_probs"])
    same(second.loss_mask_probs, first.loss_mask_probs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outputs": ["logits"]}, r"distinct names out of \['aux', .*'draft_logsumexp'\]"),
        ({"outputs": []}, "distinct names out of"),
        ({"outputs": ["aux", "aux"]}, r"got \['aux', 'aux'\]"),
        ({"outputs": "aux"}, "must be a sequence of names; got 'aux'"),
        ({"outputs": [3]}, "must be a sequence of names"),
        ({"outputs": 5}, "must be a sequence of names; got 5"),
        ({"outputs": None}, "must be a sequence of names; got None"),
        ({"outputs": ["aux"], "aux_layer_ids": (7,)}, r"distinct integers in \[0, 7\).*got \[7\]"),
        ({"outputs": ["aux"], "aux_layer_ids": (1, 1)}, "distinct integers"),
        ({"outputs": ["aux"], "aux_layer_ids": ()}, r"at least one .*got \[\]"),
        ({"outputs": ["aux"], "aux_layer_ids": (True,)}, "distinct integers"),
        ({"outputs": ["aux"], "aux_layer_ids": 3}, "must be a sequence of integers; got 3"),
        ({"outputs": (name for name in ["aux", "logits"])}, r"got \['aux', 'logits'\]"),
        ({"outputs": ["argmax"], "aux_layer_ids": (1,)}, "go with the output 'aux'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_sent(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, arguments: Any, words: str
) -> None:
    bridge = serve(build_model("llama"))
    backend = connect(bridge)
    backend.model_info()
    paths: list[str] = []
    handle = bridge.handle_request

    def watch(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return handle(request)

    bridge.handle_request = watch
    with pytest.raises(InvalidRequest, match=words):
        backend.capture(*batch_of(131), **arguments)
    assert paths == []


@pytest.mark.parametrize("name", sorted(DRAFT_VOCAB_OUTPUTS))
def test_what_needs_a_draft_vocab_says_so(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, name: str
) -> None:
    backend = connect(serve(build_model("llama")))
    with pytest.raises(VocabMappingMissing, match=f"'{name}'.* need a draft vocab; call set_vocab"):
        backend.capture(*batch_of(131), outputs=["argmax", name])


def test_the_limits_hold_for_captures_too(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    small = connect(serve(build_model("llama"), max_tokens_per_request=16))
    with pytest.raises(LimitExceeded, match="may have 16 tokens"):
        small.capture(*batch_of(131), outputs=["aux"])
    bridge = serve(build_model("llama"), max_bytes_in_flight=20_000, max_body_bytes=10_000)
    backend = connect(bridge)
    backend.capture(*batch_of(131), outputs=["argmax"])
    with pytest.raises(LimitExceeded, match="max_bytes_in_flight"):
        backend.capture(*batch_of(131), outputs=["aux"], aux_layer_ids=range(7))


@pytest.mark.parametrize("name", ["aux", "last_hidden_prenorm", "last_hidden", "argmax"])
def test_what_is_not_finite_is_never_sent(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, name: str
) -> None:
    model = build_model("llama")
    bridge = serve(model)
    with torch.no_grad():
        part = {"aux": model.model.layers[1].mlp.down_proj, "argmax": model.lm_head}
        part |= {"last_hidden_prenorm": model.model.layers[-1].mlp.down_proj}
        part.get(name, model.model.norm).weight[0] = float("nan")
    with pytest.raises(TargetFailed, match=r"non-finite .* at row 0, position"):
        connect(bridge, retry_for_s=0.1).capture(*batch_of(131), outputs=[name])


def test_model_info_names_the_conventions(build_model: Any, serve: Any, connect: Any) -> None:
    info = connect(serve(build_model("llama"))).model_info()
    assert info.outputs == dict(OUTPUTS)
    assert info.outputs_reason is None
    assert "unshifted" in info.outputs["last_hidden_prenorm"]
    assert "shifted left by one" in info.outputs["loss_mask_probs"]


def test_a_target_without_a_known_last_state_offers_the_rest(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    """Something stands between the last layer and the norm, and no head takes rows."""
    model = build_model("llama")
    norm = model.model.norm
    norm.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    info = connect(serve(model)).model_info()
    assert set(ALL) - set(info.outputs) == {"last_hidden_prenorm"}
    assert "LlamaRMSNorm" in (info.outputs_reason or "")
    model = build_model("llama")
    model.get_output_embeddings = lambda: None
    backend = connect(serve(model))
    info = backend.model_info()
    assert set(ALL) - set(info.outputs) == {"last_hidden_prenorm", "last_hidden"}
    assert info.outputs_reason
    with pytest.raises(InvalidRequest, match="which this target gives; got"):
        backend.capture(*batch_of(131), outputs=["last_hidden"])
    with pytest.raises(InvalidRequest, match="needs a head that is a plain linear"):
        backend.get_target_head()


@pytest.mark.parametrize("normed_before", [True, False])
def test_a_head_of_another_width_offers_no_last_hidden(
    serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any, normed_before: bool
) -> None:
    """OPT-350m projects its states down before the head."""
    config = transformers.OPTConfig(
        hidden_size=48, num_hidden_layers=7, num_attention_heads=6, ffn_dim=80, vocab_size=131,
        word_embed_proj_dim=24, max_position_embeddings=16, do_layer_norm_before=normed_before,
    )  # fmt: skip
    torch.manual_seed(0)
    backend = connect(serve(transformers.OPTForCausalLM(config)), frequency_ordered(131, 53))
    info = backend.model_info()
    assert set(ALL) - set(info.outputs) == {"last_hidden", "last_hidden_prenorm"}
    assert info.outputs_reason == "the head is given 24 values a token, and the layers give 48"
    backend.capture(*batch_of(131), outputs=tuple(info.outputs))
    with pytest.raises(InvalidRequest, match="the whole head is of no use here: the head is given"):
        backend.get_target_head()


# --- the whole head ---


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_the_whole_head_and_norm(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, family: str, same: Any
) -> None:
    model, inputs = build_model(family), batch_of(V[family])
    backend = connect(serve(build_model(family)), exact=True)
    got = backend.capture(*inputs, outputs=("last_hidden", "last_hidden_prenorm"))
    head = backend.get_target_head()
    assert head is backend.get_target_head()
    same(head.weight, model.lm_head.weight.detach())
    assert head.norm is not None
    torch.testing.assert_close(
        head.norm(got.last_hidden_prenorm)[0], got.last_hidden[0], rtol=1e-6, atol=1e-6
    )
    with torch.no_grad():
        logits = model(inputs.input_ids, attention_mask=inputs.attention_mask).logits
    same(head.logits(got.last_hidden)[0], logits[0])  # a row without padding
    with pytest.raises(InvalidRequest, match=r"last_hidden must be \[\.\.\., "):
        head.logits(torch.zeros(2, 3))
    assert head.logits(got.last_hidden[:0]).shape == (0, 10, V[family])


def test_the_whole_head_comes_from_the_cache(
    build_model: Any, serve: Any, connect: Any, tmp_path: Any, same: Any
) -> None:
    model = build_model("llama")
    target = TransformersTarget(model, model_id="tiny")
    asked: list[int] = []
    give = target.target_head
    target.target_head = lambda: (asked.append(1), give())[1]  # type: ignore[method-assign]
    bridge = serve(target)
    first = connect(bridge, cache_dir=tmp_path).get_target_head()
    second = connect(bridge, cache_dir=tmp_path).get_target_head()
    assert asked == [1]
    same(second.weight, first.weight)
    assert first.norm is not None
    assert second.norm is not None
    assert second.norm.form == first.norm.form


def test_a_head_of_another_target_is_refused(build_model: Any, serve: Any, connect: Any) -> None:
    bridge = serve(build_model("llama"))
    backend = connect(bridge, retry_for_s=0.5)
    backend.model_info()
    bridge.app_client = serve(build_model("llama", seed=1)).app_client
    with pytest.raises(FingerprintMismatch):
        backend.get_target_head()


def test_a_closed_backend_captures_nothing(build_model: Any, serve: Any, connect: Any,
                                           batch_of: Any) -> None:  # fmt: skip
    backend = connect(serve(build_model("llama")))
    backend.close()
    for call in (lambda: backend.capture(*batch_of(131), outputs=["aux"]), backend.get_target_head):
        with pytest.raises(RemoteEagle3Error, match="was closed"):
            call()


# --- what supervision has, captures have ---


def test_an_answer_of_another_target_is_refused(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    bridge = serve(build_model("llama"))
    backend = connect(bridge, retry_for_s=0.5)
    backend.capture(*batch_of(131), outputs=["argmax"])
    bridge.app_client = serve(build_model("llama", seed=1)).app_client
    with pytest.raises(FingerprintMismatch):
        backend.capture(*batch_of(131), outputs=["argmax"])


def test_a_target_of_another_vocab_in_its_place_is_told_as_that(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    """At every call, also when the draft vocab does not even fit it."""
    bridge = serve(build_model("llama"))
    backend = connect(bridge, frequency_ordered(131, 53), retry_for_s=0.3)
    backend.capture(*batch_of(131), outputs=["position_mask"])
    bridge.app_client = serve(build_model("qwen3")).app_client
    for _ in range(3):
        with pytest.raises(FingerprintMismatch):
            backend.capture(*batch_of(131), outputs=["position_mask"])
        with pytest.raises(FingerprintMismatch):
            backend.generate_batch(*batch_of(131))


def test_two_servers_of_a_shallow_target_are_compared_on_layers_it_has(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    def shallow() -> Any:
        model = build_model("llama")
        model.model.layers = model.model.layers[:4]
        model.config.num_hidden_layers = 4
        return serve(model)

    backend = connect(router(a=shallow(), b=shallow()), urls="http://a,http://b")
    assert backend.capture(*batch_of(131), outputs=["last_hidden"]).last_hidden.any()


def test_the_server_counts_captures(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    """As requests of their path; of the draft vocab's coverage only what they tell."""
    bridge, inputs = serve(build_model("llama")), batch_of(131)
    backend = connect(bridge, frequency_ordered(131, 53))
    backend.capture(*inputs, outputs=["argmax"])
    status = bridge.app_client.get("/v1/status").json()
    assert status["draft_vocab_coverage"] is None
    assert status["padding_share"] == pytest.approx(9 / 30)
    assert status["clients"][0]["requests"] == 1
    captured = backend.capture(*inputs, outputs=["position_mask"])
    status = bridge.app_client.get("/v1/status").json()
    share = int(captured.position_mask.sum()) / int(captured.loss_mask.sum())
    assert status["draft_vocab_coverage"] == pytest.approx(share)
    assert status["clients"][0]["draft_vocab_digest"]
    metrics = bridge.app_client.get("/metrics").text
    assert 'eagle3_requests_total{code="ok",path="/v1/capture"} 2.0' in metrics
    assert 'eagle3_stage_seconds_count{stage="compute"} 2.0' in metrics


def test_tokens_guard_captures_and_the_head(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    bridge = serve(build_model("llama"), token="right")
    for path, method in (("/v1/capture", "POST"), ("/v1/head", "GET")):
        assert bridge.app_client.request(method, path).status_code == 401
    backend = connect(bridge, token="right")
    backend.capture(*batch_of(131), outputs=["argmax"])
    backend.get_target_head()
