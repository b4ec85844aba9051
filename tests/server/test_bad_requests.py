"""What is wrong with a request is said by type and in words, and the server serves on."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from eagle3_client import (
    InvalidRequest,
    LimitExceeded,
    MalformedPayload,
    PackingUnsupported,
    ProtocolMismatch,
    RemoteEagle3Error,
    TargetFailed,
    Unauthorized,
    VocabMappingMissing,
)
from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.frame import EncodedFrame, encode
from eagle3_schemas.protocol import FRAME_MEDIA_TYPE, PROBLEM_MEDIA_TYPE, SUPERVISION_PATH
from eagle3_schemas.supervision import pack_bits

VOCAB_SIZE = 131
DRAFT_IDS = torch.tensor([90, 5, 130, 0, 17])
DIGEST = DraftVocab.from_ids(DRAFT_IDS).digest
SHAPE = (2, 9)
COUNT = 18


def frame_of(tensors: dict[str, Tensor | None] | None = None, **fields: Any) -> EncodedFrame:
    """A valid supervision request, with what the test wants otherwise; None leaves a thing out."""
    ones = pack_bits(torch.ones(SHAPE, dtype=torch.bool))
    ids = torch.arange(COUNT, dtype=torch.int32)
    all_tensors = {"input_ids": ids, "attention_mask": ones, "loss_mask": ones, **(tensors or {})}
    all_fields = {
        "request_id": "request-7",
        "batch_size": SHAPE[0],
        "sequence_length": SHAPE[1],
        "draft_vocab_digest": DIGEST,
        **fields,
    }
    return encode(
        {name: value for name, value in all_fields.items() if value is not None},
        {name: tensor for name, tensor in all_tensors.items() if tensor is not None},
    )


@pytest.fixture
def bridge(build_model: Any, serve: Any) -> Any:
    return serve(build_model("llama"))


@pytest.fixture
def connection(bridge: Any) -> Connection:
    """A registered draft vocab, and no client-side checks in front of the server's."""
    connection = Connection(
        "http://target", token=None, timeout_s=9, max_connections=1, transport=bridge
    )
    connection.ensure_registered(DraftVocab.from_ids(DRAFT_IDS), VOCAB_SIZE)
    return connection


@pytest.fixture
def serves_on(connection: Connection) -> Callable[[], None]:
    def check() -> None:
        frame = connection.supervise(frame_of(), "request-8")
        assert frame.fields["draft_vocab_digest"] == DIGEST

    return check


# --- what the client refuses before it sends anything ---


@pytest.mark.parametrize(
    ("break_it", "error", "words"),
    [
        (lambda x: replace(x, loss_mask=x.loss_mask[:, 1:]), InvalidRequest, "loss_mask"),
        (lambda x: replace(x, attention_mask=x.attention_mask[1:]), InvalidRequest, "attention_ma"),
        (lambda x: replace(x, input_ids=x.input_ids[0]), InvalidRequest, r"\[B, T\]"),
        (lambda x: replace(x, input_ids=x.input_ids.float()), InvalidRequest, "integers"),
        (lambda x: replace(x, input_ids=x.input_ids + (1 << 40)), InvalidRequest, "int32"),
        (lambda x: replace(x, input_ids=x.input_ids[:0]), InvalidRequest, ">= 1"),
    ],
    ids=["short-loss-mask", "fewer-rows", "one-dimension", "float-ids", "huge-ids", "empty"],
)
def test_shapes_and_dtypes_are_refused_where_they_are_passed(
    bridge: Any, connect: Any, batch_of: Any, serves_on: Any, break_it: Any, error: Any, words: str
) -> None:
    backend = connect(bridge, DRAFT_IDS)
    inputs = break_it(batch_of(VOCAB_SIZE))
    for call in (backend.generate_batch, backend.generate_batch_async):
        with pytest.raises(error, match=words):
            call(*inputs)
    serves_on()


@pytest.mark.parametrize("name", ["position_ids", "seq_lens", "doc_remaining"])
def test_packed_inputs_are_refused(bridge: Any, connect: Any, batch_of: Any, name: str) -> None:
    inputs = batch_of(VOCAB_SIZE)
    with pytest.raises(PackingUnsupported, match="one document per row"):
        connect(bridge, DRAFT_IDS).generate_batch(*inputs, **{name: inputs.input_ids})


def test_a_batch_before_any_mapping_is_refused(bridge: Any, connect: Any, batch_of: Any) -> None:
    backend = connect(bridge)
    for call in (backend.generate_batch, backend.generate_batch_async):
        with pytest.raises(VocabMappingMissing, match="call set_vocab_mapping first"):
            call(*batch_of(VOCAB_SIZE))


# --- what only the server can know, seen through the client ---


@pytest.mark.parametrize("bad_id", [-1, VOCAB_SIZE, 2_000_000_000])
@pytest.mark.parametrize("where", ["token", "padding"])
def test_token_ids_out_of_range_are_refused(
    bridge: Any, connect: Any, batch_of: Any, serves_on: Any, bad_id: int, where: str
) -> None:
    inputs = batch_of(VOCAB_SIZE)
    inputs.input_ids[inputs.attention_mask == (where == "token")] = bad_id
    with pytest.raises(InvalidRequest, match=rf"\[0, {VOCAB_SIZE}\).*{bad_id}"):
        connect(bridge, DRAFT_IDS).generate_batch(*inputs)
    serves_on()


@pytest.mark.parametrize(
    "bad", [(0, 1), (0, 1, 1), (0, 1, 7), (-1, 0, 1), (0, 1, 2, 3), ()], ids=str
)
def test_bad_aux_layer_ids_are_refused(
    bridge: Any, connect: Any, batch_of: Any, serves_on: Any, bad: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidRequest, match=r"3 distinct ids in \[0, 7\)"):
        connect(bridge, DRAFT_IDS, aux_layer_ids=bad).generate_batch(*batch_of(VOCAB_SIZE))
    serves_on()


def test_a_batch_over_the_token_limit_is_refused(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    backend = connect(serve(build_model("llama"), max_tokens_per_request=29), DRAFT_IDS)
    with pytest.raises(LimitExceeded, match=r"29 tokens.*3 x 10 = 30") as caught:
        backend.generate_batch(*batch_of(VOCAB_SIZE))
    assert caught.value.attempts == 1
    backend.generate_batch(*batch_of(VOCAB_SIZE, (9, 4)))


def test_a_body_over_the_byte_limit_is_refused(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    backend = connect(serve(build_model("llama"), max_body_bytes=1024), DRAFT_IDS)
    with pytest.raises(LimitExceeded, match=r"1024 bytes \(max_body_bytes\)"):
        backend.generate_batch(*batch_of(VOCAB_SIZE, (300,)))
    backend.generate_batch(*batch_of(VOCAB_SIZE))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_sequence_longer_than_the_learned_positions_is_refused(
    family: str, build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    backend = connect(serve(build_model(family)), DRAFT_IDS)
    assert backend.model_info().limits.max_sequence_length == 16
    with pytest.raises(LimitExceeded, match="16 learned positions; got sequences of 17"):
        backend.generate_batch(*batch_of(VOCAB_SIZE, (17, 3)))
    backend.generate_batch(*batch_of(VOCAB_SIZE, (16, 3)))


def test_rotary_models_have_no_such_limit(bridge: Any, connect: Any) -> None:
    assert connect(bridge).model_info().limits.max_sequence_length is None


def test_a_shallow_target_needs_its_layers_named(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    model = build_model("llama")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    bridge = serve(model)
    with pytest.raises(InvalidRequest, match=r"only 4 decoder layers.*name three aux_layer_ids"):
        connect(bridge, DRAFT_IDS).generate_batch(*batch_of(VOCAB_SIZE))
    named = connect(bridge, DRAFT_IDS, aux_layer_ids=(0, 3, 1))
    assert named.generate_batch(*batch_of(VOCAB_SIZE)).aux_hidden_states.shape == (3, 10, 144)


@pytest.mark.parametrize("token", [None, "wrong", ""], ids=["none", "wrong", "empty"])
def test_a_wrong_token_is_refused(
    build_model: Any, serve: Any, connect: Any, token: str | None
) -> None:
    bridge = serve(build_model("llama"), token="right, also-right")
    with pytest.raises(Unauthorized, match="EAGLE3_TOKEN"):
        connect(bridge, token=token).model_info()
    for good in ("right", "also-right"):
        connect(bridge, token=good).model_info()
    connect(bridge, token=token).wait_until_ready(0)  # health and readiness need none


def test_a_path_the_server_does_not_have_is_another_protocol(bridge: Any, connect: Any) -> None:
    with pytest.raises(ProtocolMismatch, match="/elsewhere/v1/model is not a path"):
        connect(bridge, urls="http://target/elsewhere").model_info()


# --- what no client of ours sends ---


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
    [("GET", "/v2/supervision", 404), ("GET", "/", 404), ("GET", SUPERVISION_PATH, 405)],
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


# --- a target that fails ---


class FailingTarget:
    """A real target whose next `supervise` raises."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.error: BaseException | None = None

    def describe(self) -> Any:
        return self.inner.describe()

    def supervise(self, job: Any) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.inner.supervise(job)


def test_a_forward_that_raises_is_target_failed_and_says_where_to_look(
    build_model: Any, gated: Any, serve: Any, connect: Any, batch_of: Any, caplog: Any
) -> None:
    """The traceback stays in the server's log, under the id that the client is told."""
    target = FailingTarget(gated(build_model("llama")).inner)
    backend = connect(serve(target), DRAFT_IDS)
    target.error = RuntimeError("secret: /home/me/weights.bin")
    with caplog.at_level(logging.ERROR), pytest.raises(TargetFailed) as caught:
        backend.generate_batch(*batch_of(VOCAB_SIZE))
    error = caught.value
    assert error.attempts == 1
    assert error.request_id is not None
    assert f"request id {error.request_id}" in error.detail
    assert "RuntimeError" in error.detail
    for leak in ("secret", "/home/me", "Traceback", ".py", 'File "'):
        assert leak not in str(error)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert error.request_id in record.getMessage()
    assert "secret" in str(record.exc_info[1])
    backend.generate_batch(*batch_of(VOCAB_SIZE))


def poison(row: int, position: int, value: float) -> Callable[[Any, Any, Tensor], Tensor]:
    """A forward hook that puts a value into one position of whatever is long enough."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if output.shape[0] > row and output.shape[1] > position:
            output = output.clone()
            output[row, position, 0] = value
        return output

    return hook


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_aux_states_name_their_layer_and_row(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, value: float
) -> None:
    model = build_model("llama")
    backend = connect(serve(model), DRAFT_IDS)
    model.model.layers[2].register_forward_hook(poison(1, 4, value))
    with pytest.raises(TargetFailed, match=r"layer 2 gave non-finite.*row 1, position 4"):
        backend.generate_batch(*batch_of(VOCAB_SIZE))
    backend.generate_batch(*batch_of(VOCAB_SIZE, (4, 4)))


def test_non_finite_states_of_padding_are_nobodys_business(
    build_model: Any, serve: Any, connect: Any, batch_of: Any
) -> None:
    model = build_model("llama")
    backend = connect(serve(model), DRAFT_IDS, aux_layer_ids=(1, 2, 6))
    model.model.layers[6].register_forward_hook(poison(1, 9, float("nan")))
    batch = backend.generate_batch(*batch_of(VOCAB_SIZE, (10, 7)))
    assert batch.aux_hidden_states.isfinite().all()
    assert batch.target_probs.isfinite().all()


def spoil(model: Any, token_id: int, value: float) -> None:
    """Make the model give `value` as the logit of one id wherever `mark` is called for.

    There, and only there, products overflow: to inf, -inf, or inf - inf.
    """
    with torch.no_grad():
        model.lm_head.weight[token_id, :2] = torch.tensor(
            {"inf": [1e30, 0.0], "-inf": [-1e30, 0.0], "nan": [1e30, -1e30]}[str(value)]
        )


def mark(row: int, position: int) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook on the final norm; only once the target is loaded, which refuses such a probe."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[row, position, :2] = 1e30
        return output

    return hook


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token_id", [0, 90, 128], ids=["outside", "in-the-draft-vocab", "high"])
def test_non_finite_supervision_names_its_row(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, token_id: int, value: float,
    encoding: str, exact: bool,
) -> None:  # fmt: skip
    """Also when the bad logit is not of the draft vocab: the row must not look unsupervised.

    The position named is that of input_ids, as for aux states: one after the one it supervises.
    """
    model, draft_ids = build_model("llama"), torch.tensor([90, 5])
    spoil(model, token_id, value)
    bridge = serve(model)
    model.model.norm.register_forward_hook(mark(1, 4))
    backend = connect(bridge, draft_ids, encoding=encoding, exact=exact)
    assert backend.model_info().head == "rows"
    inputs = batch_of(VOCAB_SIZE)
    inputs.loss_mask[:] = inputs.attention_mask
    with pytest.raises(TargetFailed, match=r"non-finite.*row 1, position 4 of input_ids"):
        backend.generate_batch(*inputs)
    inputs.loss_mask[1, 4] = 0
    assert backend.generate_batch(*inputs).target_probs.isfinite().all()


@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_non_finite_draft_logits_are_found_below_a_finite_top_logit(
    build_model: Any, serve: Any, connect: Any, batch_of: Any, encoding: str
) -> None:
    model, inputs = build_model("llama"), batch_of(VOCAB_SIZE)
    spoil(model, 5, -float("inf"))
    bridge = serve(model)
    model.model.norm.register_forward_hook(mark(0, 3))
    backend = connect(bridge, DRAFT_IDS, rows="loss_mask", encoding=encoding)
    assert backend.model_info().head == "rows"
    inputs.loss_mask[:] = inputs.attention_mask
    with pytest.raises(TargetFailed, match="non-finite logits at row 0, position 3 of input_ids"):
        backend.generate_batch(*inputs)


def test_every_error_of_the_client_has_one_root() -> None:
    for kind in (InvalidRequest, MalformedPayload, TargetFailed, Unauthorized, LimitExceeded):
        assert issubclass(kind, RemoteEagle3Error)
