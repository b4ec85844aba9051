"""What no client of ours sends: frames and HTTP made by hand."""

from __future__ import annotations

import gzip
from typing import Any

import httpx
import pytest
import torch
from tests.server.bad_requests.frames import COUNT, DIGEST, DRAFT_IDS, SHAPE, VOCAB_SIZE, frame_of
from torch import Tensor

from eagle3_client import (
    InvalidRequest,
    VocabMappingMissing,
)
from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.frame import EncodedFrame, encode
from eagle3_schemas.protocol import FRAME_MEDIA_TYPE, PROBLEM_MEDIA_TYPE, SUPERVISION_PATH
from eagle3_schemas.supervision import pack_bits


def bits(count: int) -> Tensor:
    return torch.zeros(-(-count // 8), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (frame_of({"loss_mask": None}), "expected tensors"),
        (frame_of({"extra": bits(COUNT)}), "expected tensors"),
        (frame_of({"loss_mask": bits(COUNT + 8)}), r"loss_mask.*\[3\] bytes"),
        (frame_of({"attention_mask": torch.ones(COUNT, dtype=torch.bool)}), "expected tensors"),
        (frame_of({"input_ids": torch.arange(COUNT)}), "input_ids int32"),
        (frame_of({"input_ids": torch.arange(COUNT - 1).int()}), r"input_ids must be \[18\]"),
        (frame_of({"input_ids": torch.arange(COUNT - 1).int()}, pad_token_id=3), r"\[18\]"),
        (frame_of({"input_ids": torch.arange(COUNT).int().view(SHAPE)}), r"\[18\]"),
        (frame_of(batch_size=0), "batch_size"),
        (frame_of(batch_size=None), "batch_size"),
        (frame_of(sequence_length="9"), "sequence_length"),
        (frame_of(draft_vocab_digest="short"), "draft_vocab_digest"),
        (frame_of(request_id="no spaces"), "request_id"),
        (frame_of(encoding="topk"), "encoding: .*'probs', 'logits' or 'hidden'"),
        (frame_of(aux_dtype="float8"), "aux_dtype: .*'model' or 'float8_e4m3'"),
        (frame_of(aux_dtype="float8_e4m3", exact=True), "exact=True forbids aux_dtype 'float8"),
        (frame_of(rows="some"), "rows"),
        (frame_of(aux_layer_ids=[0, 1, True]), "aux_layer_ids"),
        (frame_of(surprise=1), "surprise"),
    ],
)
def test_a_request_that_is_no_such_message_is_refused(
    connection: Connection, serves_on: Any, frame: EncodedFrame, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        connection.supervise(frame, "request-7")
    assert caught.value.request_id == "request-7"
    serves_on()


def test_an_unknown_digest_is_refused(connection: Connection, serves_on: Any) -> None:
    with pytest.raises(VocabMappingMissing, match="abababababab"):
        connection.supervise(frame_of(draft_vocab_digest="ab" * 32), "request-7")
    serves_on()


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([5, 7, 5], {5, 7}, "5 appears twice"),
        ([5, 131], {5}, "got 131"),
        ([5, -1], {5}, "got -1"),
        ([5, 7], {5, 8}, "another set"),
        ([5, 7], {5, 7, 8}, "another set"),
        ([], set(), "D >= 1"),
    ],
    ids=["repeated", "out-of-range", "negative", "another-set", "larger-set", "empty"],
)
def test_the_server_refuses_a_mapping_that_fits_not(
    bridge: Any, serves_on: Any, ids: list[int], mask: set[int], words: str
) -> None:
    marked = torch.tensor([i in mask for i in range(VOCAB_SIZE)])
    tensors = {
        "selected_token_ids": torch.tensor(ids).int(),
        "selected_token_mask": pack_bits(marked),
    }
    answer = put_mapping(bridge, tensors, "ab" * 32)
    assert_problem(answer, 422, "invalid_request", words)
    serves_on()


def test_the_server_refuses_a_mapping_under_a_digest_that_is_not_its_own(
    bridge: Any, connection: Connection
) -> None:
    mask = pack_bits(DraftVocab.from_ids(DRAFT_IDS).mask(VOCAB_SIZE))
    tensors = {"selected_token_ids": DRAFT_IDS.int(), "selected_token_mask": mask}
    assert_problem(put_mapping(bridge, tensors, "ab" * 32), 422, "invalid_request", "digest")
    assert put_mapping(bridge, tensors, DIGEST).json()["draft_vocab_size"] == len(DRAFT_IDS)


@pytest.mark.parametrize("count", [VOCAB_SIZE - 8, VOCAB_SIZE + 8])
def test_the_server_refuses_a_mask_of_the_wrong_length(bridge: Any, count: int) -> None:
    tensors = {"selected_token_ids": DRAFT_IDS.int(), "selected_token_mask": bits(count)}
    assert_problem(put_mapping(bridge, tensors, DIGEST), 422, "invalid_request", "vocab of 131")


# --- HTTP ---


def http(bridge: Any) -> httpx.Client:
    return httpx.Client(transport=bridge, base_url="http://target")


def put_mapping(bridge: Any, tensors: dict[str, Tensor], digest: str) -> httpx.Response:
    return http(bridge).put(
        f"/v1/draft-vocabs/{digest}",
        content=encode({}, tensors).to_bytes(),
        headers={"content-type": FRAME_MEDIA_TYPE},
    )


def assert_problem(answer: Any, status: int, code: str, words: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
    problem = answer.json()
    assert problem["code"] == code
    assert problem["status"] == status
    assert words in problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"] != ""


def post(bridge: Any, body: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": FRAME_MEDIA_TYPE} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return http(bridge).post(SUPERVISION_PATH, content=body, headers=headers)


def test_another_media_type_is_refused(bridge: Any, connection: Connection) -> None:
    answer = post(bridge, frame_of().to_bytes(), content_type="application/octet-stream")
    assert_problem(answer, 400, "malformed_payload", FRAME_MEDIA_TYPE)


def test_a_compressed_body_is_refused(bridge: Any, connection: Connection) -> None:
    answer = post(bridge, gzip.compress(frame_of().to_bytes()), content_encoding="gzip")
    assert_problem(answer, 400, "malformed_payload", "'gzip'")


def test_a_body_without_a_length_is_refused(bridge: Any) -> None:
    body = (part for part in [frame_of().to_bytes()])
    headers = {"content-type": FRAME_MEDIA_TYPE}
    answer = bridge.app_client.post(SUPERVISION_PATH, content=body, headers=headers)
    assert_problem(answer, 400, "malformed_payload", "content-length")


@pytest.mark.parametrize("delta", [1, -1], ids=["ends-early", "goes-on"])
def test_a_body_of_another_length_than_announced_is_refused(bridge: Any, delta: int) -> None:
    body = frame_of().to_bytes()
    answer = post(bridge, body, content_length=str(len(body) + delta))
    assert_problem(answer, 400, "malformed_payload", "content-length" if delta < 0 else "ended")


def test_a_frame_of_another_protocol_version_is_refused(bridge: Any) -> None:
    body = bytearray(frame_of().to_bytes())
    body[4] += 1
    assert_problem(post(bridge, bytes(body)), 400, "protocol_mismatch", "Upgrade the older side")


def test_bytes_that_are_no_frame_are_refused(bridge: Any) -> None:
    assert_problem(post(bridge, b"GET / HTTP/1.1" * 9), 400, "malformed_payload", "E3RF")


def test_a_byte_flipped_on_the_way_up_is_refused(bridge: Any, connection: Connection) -> None:
    body = bytearray(frame_of().to_bytes())
    body[-1] ^= 1
    assert_problem(post(bridge, bytes(body)), 400, "malformed_payload", "checksum mismatch")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2/supervision", 404), ("POST", "/", 405), ("GET", SUPERVISION_PATH, 405)],
)
def test_an_unknown_path_or_method_is_a_problem_document(
    bridge: Any, method: str, path: str, status: int
) -> None:
    answer = http(bridge).request(method, path)
    assert_problem(answer, status, "protocol_mismatch", f"{method} {path} is not a path")


def test_a_wrong_token_is_a_problem_document(build_model: Any, serve: Any) -> None:
    bridge = serve(build_model("llama"), token="right")
    answer = http(bridge).get("/v1/model", headers={"authorization": "Basic right"})
    assert_problem(answer, 401, "unauthorized", "bearer token")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_callers_request_id_comes_back(bridge: Any) -> None:
    answer = http(bridge).get("/nowhere", headers={"x-request-id": "mine-1"})
    assert answer.json()["request_id"] == "mine-1"


def test_a_request_id_that_could_forge_a_log_line_is_replaced(bridge: Any) -> None:
    answer = http(bridge).get("/nowhere", headers={"x-request-id": "a b"})
    assert answer.json()["request_id"] not in ("a b", "")
