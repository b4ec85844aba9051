"""`cache_dir` as a backend uses it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.client.cache.conftest import Counted, files

from eagle3_client import (
    ProtocolMismatch,
)
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.protocol import EMBEDDINGS_PATH


def test_a_second_backend_downloads_nothing(
    target: Counted,
    serve: Any,
    connect: Any,
    draft_ids: Any,
    inputs: Any,
    tmp_path: Path,
    same: Any,
) -> None:
    bridge = serve(target)
    weights, probs = [], []
    for _ in range(2):
        backend = connect(bridge, draft_ids, cache_dir=tmp_path / "new", encoding="hidden")
        weights.append(backend.get_input_embeddings().weight)
        probs.append(backend.generate_batch(*inputs).target_probs)
    assert (target.embeddings, target.heads) == (1, 1)
    same(weights[1], weights[0])
    same(probs[1], probs[0])


def test_without_a_cache_dir_nothing_is_kept(
    target: Counted, serve: Any, connect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    bridge = serve(target)
    for _ in range(2):
        connect(bridge).get_input_embeddings()
    assert target.embeddings == 2
    assert files(tmp_path) == []


def test_another_target_or_draft_vocab_has_another_file(
    build_model: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any, tmp_path: Path,
    mapping: Any, same: Any,
) -> None:  # fmt: skip
    for seed in (1, 2):
        model = build_model("llama", seed=seed)
        bridge = serve(model)
        backend = connect(bridge, cache_dir=tmp_path, encoding="hidden")
        plain = connect(bridge, encoding="hidden")
        same(backend.get_input_embeddings().weight, model.get_input_embeddings().weight.detach())
        for ids in (draft_ids, draft_ids.flip(0)):
            batches = []
            for each in (backend, plain):
                each.set_vocab_mapping(*mapping(ids, 131))
                batches.append(each.generate_batch(*inputs))
            same(batches[0].target_probs, batches[1].target_probs)
    assert len(files(tmp_path)) == 2 * 3


def test_a_wrong_answer_is_not_kept(
    target: Counted, serve: Any, connect: Any, draft_ids: Any, inputs: Any, tmp_path: Path
) -> None:
    bridge = serve(target)

    def change(request: httpx.Request) -> httpx.Response:
        response = bridge.handle_request(request)
        if request.url.path != EMBEDDINGS_PATH and not request.url.path.endswith("/head"):
            return response
        frame = decode(response.read())
        tensors = {"wait": frame.tensors["weight"]}
        body = encode(frame.fields, tensors).to_bytes()
        headers = {"content-length": str(len(body))}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body))

    backend = connect(httpx.MockTransport(change), draft_ids, cache_dir=tmp_path, encoding="hidden")
    with pytest.raises(ProtocolMismatch, match=r"expected input embeddings as a matrix `weight`"):
        backend.get_input_embeddings()
    with pytest.raises(ProtocolMismatch, match="the draft head is not the one asked for"):
        backend.generate_batch(*inputs)
    assert files(tmp_path) == []
    good = connect(bridge, draft_ids, cache_dir=tmp_path, encoding="hidden")
    good.get_input_embeddings()
    good.generate_batch(*inputs)


def test_a_kept_file_still_needs_the_target_that_is_served(
    build_model: Any, serve: Any, connect: Any, tmp_path: Path
) -> None:
    connect(serve(build_model("llama")), cache_dir=tmp_path).get_input_embeddings()
    other = Counted(build_model("llama", seed=9))
    connect(serve(other), cache_dir=tmp_path).get_input_embeddings()
    assert other.embeddings == 1


def test_logging_says_nothing_while_all_is_well(
    target: Counted, serve: Any, connect: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "eagle3_client")
    bridge = serve(target)
    for _ in range(2):
        connect(bridge, cache_dir=tmp_path).get_input_embeddings()
    assert not [record for record in caplog.records if record.name == "eagle3_client"]
