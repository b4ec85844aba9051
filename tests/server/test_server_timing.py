"""`server-timing`: what the server spent on an answer, in the answer itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.exchange import pack_request
from eagle3_schemas.protocol import MODEL_PATH, SERVER_TIMING_HEADER, SUPERVISION_PATH
from eagle3_schemas.tokens import TokenBatch


@pytest.fixture
def bridge(build_model: Any, serve: Any) -> Any:
    return serve(build_model("llama"))


def test_an_answer_with_supervision_says_what_each_stage_took(bridge: Any) -> None:
    connection = Connection("http://target", token=None, timeout_s=60, transport=bridge)
    vocab, ones = DraftVocab.from_ids(torch.arange(50)), torch.ones(2, 9, dtype=torch.bool)
    request, frame = pack_request(
        TokenBatch(torch.ones(2, 9, dtype=torch.long), ones, ones),
        request_id="timed",
        draft_vocab_digest=vocab.digest,
    )
    connection.ensure_registered(vocab, 131)
    answer = connection.supervise_timed(frame, request.request_id)
    connection.close()
    stages = dict(re.findall(r"(\w+);dur=([0-9.]+)(?:, |$)", answer.server_timing))
    assert list(stages) == ["queue", "compute", "head", "copy", "total"]
    spent = {name: float(value) for name, value in stages.items()}
    assert spent["compute"] > 0
    total = spent.pop("total")
    assert sum(spent.values()) <= total + 0.01  # each is rounded to 1 us
    assert total <= 1000 * answer.elapsed_s
    assert answer.body_bytes > answer.frame.tensors["aux_hidden_states"].numel() * 4


def test_other_answers_and_errors_do_not_have_it(bridge: Any) -> None:
    assert SERVER_TIMING_HEADER not in bridge.app_client.get(MODEL_PATH).headers
    refused = bridge.app_client.post(SUPERVISION_PATH, content=b"x")
    assert refused.status_code == 400
    assert SERVER_TIMING_HEADER not in refused.headers
