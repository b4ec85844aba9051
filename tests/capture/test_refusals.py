"""What `capture` refuses, and what a target does not offer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch
import transformers
from tests.capture.definition import ALL

from eagle3_client import (
    InvalidRequest,
    LimitExceeded,
    TargetFailed,
    VocabMappingMissing,
)
from eagle3_schemas.capture import DRAFT_VOCAB_OUTPUTS, OUTPUTS


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
