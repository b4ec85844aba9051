"""Captures that no client of ours sends."""

from __future__ import annotations

import pytest
import torch
from tests.server.bad_requests.frames import DIGEST, frame_of

from eagle3_client import InvalidRequest, VocabMappingMissing
from eagle3_client.connection import Connection
from eagle3_schemas.frame import EncodedFrame, decode
from eagle3_schemas.protocol import CAPTURE_PATH


def capture_of(**fields: object) -> EncodedFrame:
    """A valid capture request, with what the test wants otherwise."""
    return frame_of(**{"draft_vocab_digest": None, "outputs": ["argmax"], **fields})


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (capture_of(outputs=None), "outputs: Field required"),
        (capture_of(outputs=[]), "outputs"),
        (capture_of(outputs="argmax"), "outputs"),
        (capture_of(outputs=["argmax"] * 65), "outputs"),
        (capture_of(outputs=["argmax", "argmax"]), "distinct names"),
        (capture_of(outputs=["logits"]), r"distinct names out of \['aux'"),
        (capture_of(outputs=["aux"]), r"distinct integers in \[0, 7\), at least one"),
        (capture_of(outputs=["aux"], aux_layer_ids=[6, 7]), r"got \[6, 7\]"),
        (capture_of(outputs=["aux"], aux_layer_ids=[2, 2]), "distinct integers"),
        (capture_of(outputs=["aux"], aux_layer_ids=[1, True]), "aux_layer_ids"),
        (capture_of(aux_layer_ids=[1]), "go with the output 'aux'"),
        (capture_of(outputs=["loss_mask_probs"]), "draft_vocab_digest goes with outputs"),
        (capture_of(draft_vocab_digest=DIGEST), "and only with them"),
        (capture_of(encoding="probs"), "encoding"),
        (capture_of(batch_size=0), "batch_size"),
        (capture_of(sequence_length=8), r"\[16\]|\[2\] bytes"),
        (frame_of({"loss_mask": None}, draft_vocab_digest=None, outputs=["argmax"]), "tensors"),
        (
            frame_of(
                {"input_ids": torch.full((18,), 131, dtype=torch.int32)},
                draft_vocab_digest=None,
                outputs=["argmax"],
            ),
            r"must be in \[0, 131\)",
        ),
    ],
)
def test_a_capture_that_cannot_be_is_refused(
    connection: Connection, serves_on: object, frame: EncodedFrame, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        connection.supervise(frame, "request-7", path=CAPTURE_PATH)
    assert caught.value.request_id == "request-7"
    serves_on()  # type: ignore[operator]


def test_an_unknown_draft_vocab_is_refused(connection: Connection) -> None:
    frame = capture_of(outputs=["loss_mask_probs"], draft_vocab_digest="ab" * 32)
    with pytest.raises(VocabMappingMissing, match="abababababab"):
        connection.supervise(frame, "request-7", path=CAPTURE_PATH)


def test_the_largest_that_can_be_is_served(connection: Connection) -> None:
    frame = capture_of(outputs=["aux", "argmax"], aux_layer_ids=list(range(7)))
    answer = connection.supervise(frame, "request-7", path=CAPTURE_PATH)
    assert answer.fields["aux_layer_ids"] == list(range(7))
    assert {name: list(t.shape) for name, t in answer.tensors.items()} == {
        "aux": [18, 7 * 48],
        "argmax": [16],
    }


def test_the_answer_says_what_it_answers(connection: Connection) -> None:
    answer = connection.supervise(capture_of(), "request-7", path=CAPTURE_PATH)
    assert answer.fields["request_id"] == "request-7"
    assert answer.fields["outputs"] == ["argmax"]
    assert answer.fields["draft_vocab_digest"] is None
    asked = decode(capture_of().to_bytes())
    assert asked.fields["outputs"] == ["argmax"]


def test_more_documents_than_tokens_are_refused_before_they_cost_time(
    connection: Connection,
) -> None:
    lens = torch.zeros(2, 10, dtype=torch.int32)
    lens[:, 0] = 9
    frame = frame_of({"seq_lens": lens}, draft_vocab_digest=None, outputs=["argmax"])
    with pytest.raises(InvalidRequest, match=r"of 9 tokens .*got shape \[2, 10\].*all 0"):
        connection.supervise(frame, "request-7", path=CAPTURE_PATH)
