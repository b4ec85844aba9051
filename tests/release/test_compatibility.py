"""What CHANGELOG.md promises of the protocol: yesterday's peers and today's understand each other.

The recordings are bytes that peers of a version sent. They are read here by docs/protocol.md's own
code, so that a change of ours in both directions at once does not pass.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import torch
from tests.pages import run_by
from tests.release.exchanges import ENCODINGS, Exchange, load, server, talk

from eagle3_client import ProtocolMismatch, RemoteEagle3Backend
from eagle3_schemas import PROTOCOL_VERSION, protocol
from eagle3_schemas.messages import AuxDtype, Rows

FOLDER = Path(__file__).parent
VERSIONS = sorted(FOLDER.glob("version_*.json"))
PLAIN: dict[str, Any] = {}
for test in (
    "tests/schemas/test_frame_golden.py::test_the_protocol_pages_own_code_writes_the_golden_bytes",
    "tests/test_second_client.py::test_the_pages_reader_reads_the_golden_bytes",
    "tests/test_second_client.py::test_the_pages_client_gets_what_the_target_gives",
):
    exec("".join(run_by(test)), PLAIN)


def is_frame(kind: str) -> bool:
    return kind == PLAIN["FRAME"]


def test_every_version_so_far_has_a_recording() -> None:
    assert [path.stem for path in VERSIONS] == [
        f"version_{number}" for number in range(1, PROTOCOL_VERSION + 1)
    ]


@pytest.fixture(scope="module")
def todays() -> Iterator[Any]:
    with server() as client:
        yield client


def form(exchange: Exchange) -> Any:
    """What an answer has, without its numbers: fields, and tensors' names, dtypes and widths."""
    if not is_frame(exchange.answer_type):
        return set(json.loads(exchange.answer))
    fields, tensors = PLAIN["unframe"](exchange.answer)
    return set(fields), {
        name: (dtype, len(shape), shape[1:]) for name, (dtype, shape, _) in tensors.items()
    }


@pytest.mark.parametrize(
    ("version", "number"),
    [(path.stem, number) for path in VERSIONS for number in range(len(load(path)))],
)
def test_todays_server_answers_what_an_older_client_sends(
    todays: Any, version: str, number: int
) -> None:
    told = load(FOLDER / f"{version}.json")
    for each in told[:number]:
        if each.method == "PUT":  # what was registered before it was asked for
            todays.request("PUT", each.path, content=each.request,
                           headers={"content-type": each.request_type})  # fmt: skip
    one = told[number]
    headers = {"content-type": one.request_type} if one.request_type else {}
    answer = todays.request(one.method, one.path, content=one.request, headers=headers)
    assert answer.status_code == one.status, answer.text
    got = dataclasses.replace(
        one, answer=answer.content, answer_type=answer.headers["content-type"]
    )
    if is_frame(one.answer_type):  # numbers are computed from these: nothing more, nothing less
        assert form(got) == form(one)
    else:  # these describe, and may say more
        assert form(got) >= form(one)


class Older(httpx.BaseTransport):
    """Answers as a server of a recording did, to a request that asks for the same."""

    def __init__(self, told: list[Exchange], more: dict[str, Any]) -> None:
        self.told, self.more = told, more

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body, path = request.read(), request.url.raw_path.decode()
        wanted = self.asked(request.method, path, body)
        for each in self.told:
            if self.asked(each.method, each.path, each.request) == wanted:
                return self.answer(each, body)
        raise AssertionError(f"an older server was never asked for {wanted}")

    @staticmethod
    def asked(method: str, path: str, body: bytes) -> Any:
        """Name a request by all that it says but its id."""
        if not body:
            return method, path
        fields, tensors = PLAIN["unframe"](body)
        return method, path, {**fields, "request_id": None}, tensors

    def answer(self, told: Exchange, body: bytes) -> httpx.Response:
        content = told.answer
        if is_frame(told.answer_type) and body:
            fields, tensors = PLAIN["unframe"](content)
            if "request_id" in fields:
                fields["request_id"] = PLAIN["unframe"](body)[0]["request_id"]
            parts = [(name, *rest) for name, rest in tensors.items()]
            content = PLAIN["frame"](fields, parts)
        elif not is_frame(told.answer_type):
            content = json.dumps({**json.loads(content), **self.more}).encode()
        headers = {"content-type": told.answer_type, "content-length": str(len(content))}
        return httpx.Response(told.status, headers=headers, stream=httpx.ByteStream(content))


@pytest.mark.parametrize("more", [{}, {"a_field_of_tomorrow": [1]}], ids=["older", "newer"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", [path.stem for path in VERSIONS])
def test_todays_client_understands_another_server(
    version: str, encoding: str, more: dict[str, Any]
) -> None:
    """An older one says no more than it did; a newer one says more of itself."""
    told = load(FOLDER / f"{version}.json")
    transport = Older(told, more)
    with RemoteEagle3Backend("http://server", encoding=encoding, transport=transport) as backend:
        found = talk(backend)
    answers = [
        PLAIN["unframe"](each.answer)
        for each in told
        if each.path == "/v1/supervision"
        and PLAIN["unframe"](each.answer)[0]["encoding"] == encoding
    ]
    for name, (_, tensors) in zip(("padded", "packed"), answers, strict=True):
        batch = found[name]
        attended = batch.attention_mask.bool()
        assert bytes_of(batch.aux_hidden_states[attended]) == tensors["aux_hidden_states"][2]
        mask = batch.position_mask.flatten().tolist()
        assert mask == PLAIN["unbits"](tensors["position_mask"][2], len(mask))
        rows = batch.target_probs[batch.position_mask[..., 0]]
        if encoding == "probs":
            assert bytes_of(rows) == tensors["target_probs"][2]
        torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows)))
    assert found["capture"].aux.shape == (2, 9, 2 * 16)
    assert found["head"].weight.shape == found["embeddings"].weight.shape == (61, 16)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist())


def test_other_versions_refuse_each_other_and_say_both_numbers(todays: Any) -> None:
    (path, *_) = VERSIONS
    told = next(each for each in load(path) if each.path == "/v1/supervision")
    later = bytearray(told.request)
    struct.pack_into("<H", later, 4, PROTOCOL_VERSION + 1)
    answer = todays.post(
        told.path, content=bytes(later), headers={"content-type": told.request_type}
    )
    assert answer.json()["code"] == "protocol_mismatch"
    for number in (PROTOCOL_VERSION, PROTOCOL_VERSION + 1):
        assert str(number) in answer.json()["detail"]
    transport = Older(load(path), {"protocol_version": PROTOCOL_VERSION + 1})
    with (
        RemoteEagle3Backend("http://server", transport=transport) as backend,
        pytest.raises(ProtocolMismatch, match=rf"{PROTOCOL_VERSION + 1}.*{PROTOCOL_VERSION}"),
    ):
        backend.model_info()


def test_names_on_the_wire_are_those_that_peers_of_version_1_know() -> None:
    """Of what the recording does not hold: headers, paths without a body, values not asked for."""
    assert (protocol.INSTANCE_HEADER, protocol.DEADLINE_HEADER) == (
        "x-eagle3-instance",
        "x-eagle3-deadline-ms",
    )
    assert (protocol.REQUEST_ID_HEADER, protocol.CLIENT_ID_HEADER) == (
        "x-request-id",
        "x-eagle3-client",
    )
    assert (protocol.HEALTH_PATH, protocol.READY_PATH) == ("/healthz", "/readyz")
    assert (protocol.SELF_CHECK_PATH, protocol.STATUS_PATH, protocol.INSPECT_PATH) == (
        "/v1/self-check",
        "/v1/status",
        "/v1/inspect",
    )
    assert get_args(AuxDtype) == ("model", "float8_e4m3")
    assert get_args(Rows) == ("position_mask", "loss_mask", "all")
