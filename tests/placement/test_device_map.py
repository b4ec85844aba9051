"""`--device-map`: what is taken, what is refused, and weights that stay on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.families.full_path import make_job
from tests.servers import save_tiny_llama
from torch import nn

from eagle3_schemas.errors import InvalidRequest
from eagle3_schemas.self_check import SELF_CHECKS
from eagle3_server import HFEagle3TargetModel, ServerSettings, TransformersTarget
from eagle3_server.loading import load_target
from eagle3_server.placement import device_of, parse_device_map

V, L = 131, 7
ON_DISK = {
    "model.embed_tokens": "disk",
    "model.rotary_emb": "cpu",
    "model.norm": "disk",
    "lm_head": "disk",
    **{f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(L)},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    return save_tiny_llama(path, tie_word_embeddings=request.param)


def load(path: Path, **settings: Any) -> TransformersTarget:
    return load_target(ServerSettings(model=str(path), **settings))


@pytest.fixture(scope="module")
def on_disk(saved: Path) -> TransformersTarget:
    return load(saved, device_map=json.dumps(ON_DISK))


@pytest.fixture(scope="module")
def whole(saved: Path) -> TransformersTarget:
    return load(saved, device="cpu")


def test_weights_on_the_disk_are_the_same_target(on_disk: Any, whole: Any) -> None:
    weights = [p.device.type for p in on_disk._model.parameters()]
    assert weights.count("meta") > 20, "nothing is on the disk"
    assert on_disk.describe() == whole.describe()


def test_weights_on_the_disk_pass_the_checks_of_load_again(on_disk: Any) -> None:
    assert {on_disk.self_check(name).status for name in SELF_CHECKS} == {"passed"}


@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_weights_on_the_disk_supervise_bit_equal(
    on_disk: Any, whole: Any, encoding: str, frequency_ordered: Any
) -> None:
    from dataclasses import replace

    from eagle3_schemas import DraftVocab

    job = make_job(encoding=encoding, aux_layer_ids=(6, 1, 2))
    vocab = DraftVocab.from_ids(frequency_ordered(V, 53))
    job = replace(job, input_ids=job.input_ids % V, draft_vocab=vocab)
    for compute in (
        lambda target: target.supervise(job),
        lambda target: target.draft_head(vocab),
        lambda target: target.target_head(),
        lambda target: target.input_embeddings(),
    ):
        got, expected = (compute(target).tensors for target in (on_disk, whole))
        assert list(got) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
    assert next(on_disk._model.parameters()).device.type == "meta", "sent away again"


def test_served_from_the_disk_is_the_co_located_target(
    saved: Path, on_disk: Any, serve: Any, connect: Any, batch_of: Any, frequency_ordered: Any
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, device_map=ON_DISK)
    inputs, ids = batch_of(V, (12, 9, 4)), frequency_ordered(V, 53)
    batch = connect(serve(on_disk), ids, exact=True).generate_batch(*inputs)
    expected = HFEagle3TargetModel(model).generate_batch(*inputs)
    attended = inputs.attention_mask.bool()
    assert torch.equal(batch.aux_hidden_states[attended], expected.aux_hidden_states[attended])
    rows = batch.position_mask.squeeze(-1)
    assert rows.any()
    assert torch.equal(batch.target_probs[rows], expected.logits[rows][:, ids].softmax(-1))


def test_a_map_may_be_a_file_and_auto_needs_no_gpu(saved: Path, whole: Any, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text('{"": "cpu"}')
    for device_map in (str(file), "auto", "sequential"):
        target = load(saved, device_map=device_map, dtype="float32")
        assert target.describe().weights_digest == whole.describe().weights_digest
        assert target.describe().device == ("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("auot", "'auot' is none of auto, balanced, balanced_low_0, sequential, no JSON object"),
        ("{not json", "not JSON"),
        ("{}", "an object of module names and devices"),
        ('{"": "meta"}', "puts '' on meta, where weights have no values"),
        ('{"lm_head": "cuda:97"}', r"puts 'lm_head' on 'cuda:97', and this host has \d+ GPUs"),
        ('{"lm_head": 97}', r"puts 'lm_head' on 97, and this host has \d+ GPUs"),
        ('{"lm_head": "gpu"}', "puts 'lm_head' on 'gpu', which is no device"),
        ('{"lm_head": true}', "puts 'lm_head' on True, which is no device"),
        ('{"lm_head": -1}', "puts 'lm_head' on -1, which is no device"),
    ],
)
def test_what_is_no_map_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_device_map(text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cpu"}, "--device cpu is for a target on one device; drop it"),
        ({"tp": 2}, "--tp 2 runs a target in several processes.*give one of them"),
    ],
)
def test_what_cannot_go_with_a_map_is_refused(
    saved: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        load(saved, device_map="auto", **settings)


def test_a_map_that_leaves_parts_out_is_refused(saved: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot load"):
        load(saved, device_map='{"model.embed_tokens": "cpu", "model.norm": "disk"}')


def test_a_model_without_weights_is_refused(build_model: Any) -> None:
    model = build_model("llama").to("meta")
    with pytest.raises(InvalidRequest, match="are on meta, without values"):
        TransformersTarget(model, model_id="tiny")
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
