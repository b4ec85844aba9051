"""What travels with a draft's checkpoint, and the embeddings it starts from."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import pytest
import torch

from eagle3_client import FingerprintMismatch, InvalidRequest, ProtocolMismatch, VocabMappingMissing
from eagle3_client.draft_config import draft_config
from eagle3_schemas import DraftVocab


def test_it_names_all_that_serving_needs(bridge: Any, connect: Any, draft_ids: Any) -> None:
    backend = connect(bridge, draft_ids)
    config = backend.draft_config()
    ids = draft_ids.tolist()
    digest = hashlib.sha256(b"eagle3-draft-vocab-v1\0" + struct.pack(f"<{len(ids)}q", *ids))
    assert config == {
        # 7 layers: the default is [1, 2, 3] as outputs, which the next layers read.
        "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
        "draft_vocab_size": 8,
        "draft_vocab_digest": digest.hexdigest(),
        "target_hidden_size": 48,
        "target_model_id": "tiny",
        "target_revision": None,
        "target_fingerprint": backend.fingerprint,
    }
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(("ours", "theirs"), [((0, 3, 6), [1, 4, 7]), ((6, 0, 2), [7, 1, 3])])
def test_the_backends_own_layers_come_first(
    bridge: Any, connect: Any, draft_ids: Any, ours: Any, theirs: Any
) -> None:
    config = connect(bridge, draft_ids, aux_layer_ids=ours).draft_config()
    assert config["eagle_aux_hidden_state_layer_ids"] == theirs


def test_the_servers_default_is_taken_as_it_says(
    model: Any, serve: Any, connect: Any, draft_ids: Any
) -> None:
    backend = connect(serve(model, aux_layer_ids=(6, 1, 4)), draft_ids)
    assert backend.draft_config()["eagle_aux_hidden_state_layer_ids"] == [7, 2, 5]


def test_the_draft_vocabs_order_is_part_of_it(
    bridge: Any, connect: Any, draft_ids: Any, mapping: Any
) -> None:
    backend = connect(bridge, draft_ids)
    first = backend.draft_config()
    backend.set_vocab_mapping(*mapping(draft_ids.flip(0), 131))
    second = backend.draft_config()
    assert first.pop("draft_vocab_digest") != second.pop("draft_vocab_digest")
    assert first == second


def test_without_a_draft_vocab_there_is_none(connect: Any) -> None:
    """Nothing is asked of a server: there is none."""
    with pytest.raises(VocabMappingMissing, match="call set_vocab_mapping first"):
        connect(urls="http://127.0.0.1:9").draft_config()


def test_layers_the_target_has_not_are_refused(bridge: Any, connect: Any, draft_ids: Any) -> None:
    backend = connect(bridge, draft_ids, aux_layer_ids=(1, 2, 7))
    with pytest.raises(InvalidRequest, match=r"\[0, 7\)"):
        backend.draft_config()


def test_a_target_too_shallow_for_the_default_asks_for_layers(
    bridge: Any, connect: Any, draft_ids: Any
) -> None:
    info = connect(bridge).model_info().model_copy(update={"aux_layer_ids": None})
    vocab = DraftVocab.from_ids(draft_ids)
    with pytest.raises(InvalidRequest, match="pass aux_layer_ids to the backend"):
        draft_config(info, None, vocab)
    config = draft_config(info, (0, 1, 2), vocab)
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]


def test_a_server_of_another_convention_is_refused(
    bridge: Any, connect: Any, draft_ids: Any
) -> None:
    info = connect(bridge).model_info()
    info = info.model_copy(update={"aux_layer_convention": "layer_input"})
    with pytest.raises(ProtocolMismatch, match=r"layer_output.*layer_input"):
        draft_config(info, None, DraftVocab.from_ids(draft_ids))


# --- what a draft expects that is trained on ---


def test_a_draft_that_is_trained_on_gets_its_layers_whatever_the_server_does_by_default(
    model: Any, serve: Any, connect: Any, draft_ids: Any
) -> None:
    saved = json.loads(json.dumps(connect(serve(model), draft_ids).draft_config()))
    backend = connect(serve(model, aux_layer_ids=(6, 1, 4)), draft_ids, expect_draft_config=saved)
    assert backend.draft_config() == saved


def test_what_says_the_same_besides_is_no_contradiction(
    bridge: Any, connect: Any, draft_ids: Any
) -> None:
    saved = connect(bridge, draft_ids).draft_config()
    besides = {"expect_fingerprint": saved["target_fingerprint"], "aux_layer_ids": [1, 2, 3]}
    assert connect(bridge, draft_ids, expect_draft_config=saved, **besides).draft_config() == saved


def test_a_draft_of_another_target_is_refused(
    build_model: Any, serve: Any, bridge: Any, connect: Any, draft_ids: Any
) -> None:
    saved = connect(bridge, draft_ids).draft_config()
    other = serve(build_model("llama", seed=1))
    with pytest.raises(FingerprintMismatch, match=r"checkpoint directory's, unless --model-name"):
        connect(other, expect_draft_config=saved).model_info()


def test_another_draft_vocab_than_the_drafts_is_refused(
    bridge: Any, connect: Any, draft_ids: Any, mapping: Any
) -> None:
    saved = connect(bridge, draft_ids).draft_config()
    backend = connect(bridge, expect_draft_config=saved)
    saved["draft_vocab_digest"] = "changed by the caller since"
    with pytest.raises(InvalidRequest, match=r"rows would mean other tokens\. Save selected_token"):
        backend.set_vocab_mapping(*mapping(draft_ids.flip(0), 131))
    backend.set_vocab_mapping(*mapping(draft_ids, 131))


SAVED = {
    "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
    "draft_vocab_digest": "d" * 64,
    "target_fingerprint": "a" * 32,
}


@pytest.mark.parametrize(
    ("besides", "words"),
    [
        ({"aux_layer_ids": (4, 5, 6)}, r"aux_layer_ids is \[4, 5, 6\], and .* with \[1, 2, 3\]"),
        ({"expect_fingerprint": "b" * 32}, "expect_fingerprint is b{32}, and .* with a{32}"),
    ],
)
def test_what_says_otherwise_besides_is_refused(connect: Any, besides: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        connect(urls="http://127.0.0.1:9", expect_draft_config=SAVED, **besides)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_fingerprint": None}, "no usable target_fingerprint;"),
        ({"target_fingerprint": "short"}, "32 hex digits"),
        ({"draft_vocab_digest": 5}, "no usable draft_vocab_digest;"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, "no usable eagle_aux_hidden_state_lay"),
        ({"eagle_aux_hidden_state_layer_ids": []}, "no usable eagle_aux_hidden_state_lay"),
        ({"eagle_aux_hidden_state_layer_ids": "234"}, "no usable eagle_aux_hidden_state_lay"),
    ],
)
def test_a_config_that_lacks_a_field_is_refused(connect: Any, changes: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        connect(urls="http://127.0.0.1:9", expect_draft_config=SAVED | changes)
    with pytest.raises(InvalidRequest, match=r"what draft_config\(\) returned; got str"):
        connect(urls="http://127.0.0.1:9", expect_draft_config=json.dumps(SAVED))


# --- the embeddings as a module ---


def test_a_frozen_module_shares_the_weights(model: Any, bridge: Any, connect: Any) -> None:
    embeddings = connect(bridge).get_input_embeddings()
    module = embeddings.as_module()
    assert isinstance(module, torch.nn.Embedding)
    assert module.weight.data_ptr() == embeddings.weight.data_ptr()
    assert not module.weight.requires_grad
    ids = torch.tensor([[3, 130, 0]])
    assert torch.equal(module(ids), model.get_input_embeddings()(ids))
    assert (module.num_embeddings, module.embedding_dim) == (131, 48)


def test_a_module_that_trains_has_its_own(model: Any, bridge: Any, connect: Any) -> None:
    embeddings = connect(bridge).get_input_embeddings()
    before = embeddings.weight.clone()
    module = embeddings.as_module(padding_idx=5, freeze=False)
    assert module.weight.requires_grad
    assert torch.equal(module.weight[5], before[5]), "the target's row, not zeros"
    module(torch.tensor([3, 5, 7])).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum(1).nonzero().squeeze(1).tolist() == [3, 7]
    torch.optim.SGD(module.parameters(), 1.0).step()
    assert not torch.equal(module.weight, before)
    assert torch.equal(embeddings.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_module_keeps_the_models_dtype(
    build_model: Any, serve: Any, connect: Any, dtype: torch.dtype
) -> None:
    embeddings = connect(serve(build_model("llama", dtype))).get_input_embeddings()
    for freeze in (True, False):
        assert embeddings.as_module(freeze=freeze).weight.dtype is dtype


@pytest.mark.parametrize("padding_idx", [131, -1])
def test_a_padding_idx_out_of_range_is_refused(bridge: Any, connect: Any, padding_idx: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"\[0, 131\).*got {padding_idx}"):
        connect(bridge).get_input_embeddings().as_module(padding_idx=padding_idx)
