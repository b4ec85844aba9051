"""The client's side of the encodings: which is chosen, and the draft head that `hidden` needs."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest
import torch

from eagle3_client import FingerprintMismatch, InvalidRequest, ProtocolMismatch, TransportError
from eagle3_client.config import ClientSettings, choose_encoding
from eagle3_schemas.frame import decode, encode
from eagle3_schemas.protocol import SUPERVISION_PATH


class Counting(httpx.BaseTransport):
    """Notes every request; may change the draft heads that come back."""

    def __init__(self, *bridges: httpx.BaseTransport) -> None:
        self.bridges = bridges
        self.seen: list[tuple[str, str]] = []
        self.change_head: Any = None
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.seen.append((request.method, request.url.path))
        bridge = self.bridges[int(request.url.host.removeprefix("target") or 0)]
        response = bridge.handle_request(request)
        if self.change_head is None or not request.url.path.endswith("/head"):
            return response
        body = self.change_head(response.read())
        headers = {"content-length": str(len(body))}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body))

    @property
    def heads(self) -> int:
        return sum(path.endswith("/head") for _, path in self.seen)

    @property
    def batches(self) -> int:
        return sum(path == SUPERVISION_PATH for _, path in self.seen)

    @property
    def mappings(self) -> int:
        return sum(method == "PUT" for method, _ in self.seen)


# --- which encoding ---


@pytest.mark.parametrize(
    ("device", "dtype", "exact", "offered", "chosen"),
    [
        ("cpu", "float32", False, "all", "probs"),
        ("cpu", "float32", True, "all", "probs"),
        ("cpu", "bfloat16", False, "all", "logits"),
        ("cpu", "float16", True, "all", "logits"),
        ("cuda", "bfloat16", False, "all", "hidden"),
        ("cuda:1", "float32", False, "all", "hidden"),
        ("cuda", "bfloat16", True, "all", "logits"),
        ("cuda", "float32", True, "all", "probs"),
        ("cuda", "bfloat16", False, "no-hidden", "logits"),
        ("cuda", "float32", False, "no-hidden", "probs"),
        ("cpu", "bfloat16", False, "no-hidden", "logits"),
    ],
)
def test_auto_chooses_by_the_trainers_device(
    bridge: Any, connect: Any, device: str, dtype: str, exact: bool, offered: str, chosen: str
) -> None:
    encodings = ("probs", "logits", "hidden") if offered == "all" else ("probs", "logits")
    info = connect(bridge).model_info().model_copy(update={"dtype": dtype, "encodings": encodings})
    settings = ClientSettings(("http://a",), torch.device(device), exact=exact)
    assert choose_encoding(settings, info) == chosen


@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_an_encoding_that_was_named_is_used_whatever_auto_would_choose(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any, encoding: str
) -> None:
    asked: list[Any] = []

    def note(request: httpx.Request) -> httpx.Response:
        if request.url.path == SUPERVISION_PATH:
            asked.append(decode(bytearray(request.read())).fields.get("encoding", "probs"))
        return bridge.handle_request(request)

    transport = httpx.MockTransport(note)
    connect(transport, draft_ids, encoding=encoding).generate_batch(*inputs)
    assert asked == [encoding]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"encoding": "topk"}, r"'auto' or one of \['probs', 'logits', 'hidden'\]; got 'topk'"),
        ({"aux_dtype": "fp8"}, "'model' or 'float8_e4m3'; got 'fp8'"),
    ],
)
def test_a_form_nobody_offers_is_refused_with_those_there_are(
    connect: Any, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        connect(**arguments)


def test_model_info_says_how_the_head_runs_and_what_is_offered(bridge: Any, connect: Any) -> None:
    info = connect(bridge).model_info()
    assert (info.head, info.head_reason) == ("rows", None)
    assert info.encodings == ("probs", "logits", "hidden")


# --- the draft head ---


def test_a_draft_head_is_downloaded_once_a_mapping(
    model: Any, bridge: Any, connect: Any, batch_of: Any, frequency_ordered: Any, mapping: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    transport = Counting(bridge)
    first, second, third = (frequency_ordered(131, size, size) for size in (53, 31, 9))
    batches = [batch_of(131, seed=seed) for seed in range(3)]
    expected = {
        len(ids): [expect(model, inputs, ids) for inputs in batches]
        for ids in (first, second, third)
    }
    backend = connect(transport, encoding="hidden", exact=True)
    heads = []
    for ids in (first, second, first, third, second):
        backend.set_vocab_mapping(*mapping(ids, 131))
        handles = [backend.generate_batch_async(*inputs) for inputs in batches]
        for handle, right in zip(handles, expected[len(ids)], strict=True):
            matches(handle.result(60), right)
        heads.append(transport.heads)
    assert heads == [1, 2, 2, 3, 4], "the last two are kept, and no more"
    assert transport.batches == 15


@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_other_encodings_download_no_head(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any, encoding: str
) -> None:
    transport = Counting(bridge)
    connect(transport, draft_ids, encoding=encoding).generate_batch(*inputs)
    assert (transport.batches, transport.heads) == (1, 0)


def test_a_fleet_downloads_it_from_one_of_its_servers(
    build_model: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any, model: Any,
    expect: Any, matches: Any,
) -> None:  # fmt: skip
    transport = Counting(serve(build_model("llama")), serve(build_model("llama")))
    backend = connect(
        transport, draft_ids, urls="http://target0,http://target1", encoding="hidden", exact=True
    )
    for handle in [backend.generate_batch_async(*inputs) for _ in range(6)]:
        matches(handle.result(60), expect(model, inputs, draft_ids))
    # Of these, a batch and a mapping a server compare their numbers.
    assert (transport.batches, transport.heads, transport.mappings) == (2 + 6, 1, 2 + 2)


def test_requests_in_flight_keep_the_head_of_their_mapping(
    model: Any, gated: Any, serve: Any, connect: Any, inputs: Any, mapping: Any,
    frequency_ordered: Any, expect: Any, matches: Any,
) -> None:  # fmt: skip
    target, old, new = gated(model), frequency_ordered(131, 53), frequency_ordered(131, 31)
    expected_old, expected_new = (expect(model, inputs, ids) for ids in (old, new))
    backend = connect(serve(target), old, encoding="hidden", exact=True, max_in_flight=1)
    before = [backend.generate_batch_async(*inputs) for _ in range(2)]
    target.wait_until_entered()
    backend.set_vocab_mapping(*mapping(new, 131))
    after = backend.generate_batch_async(*inputs)
    target.gate.set()
    for handle in before:
        matches(handle.result(60), expected_old)
    matches(after.result(60), expected_new)


@pytest.mark.parametrize("downloaded", [False, True], ids=["before", "after"])
def test_a_server_that_forgot_the_mapping_before_or_after_the_head_was_asked_for(
    model: Any, bridge: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any, expect: Any,
    matches: Any, downloaded: bool,
) -> None:  # fmt: skip
    transport = Counting(bridge)
    backend = connect(transport, draft_ids, encoding="hidden", exact=True)
    if downloaded:
        backend.generate_batch(*inputs)
    bridge.app_client = serve(model).app_client
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))
    assert transport.mappings == 2
    assert transport.heads == (1 if downloaded else 2)  # the first of two was refused


def test_a_head_of_another_model_is_refused(
    bridge: Any, build_model: Any, serve: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    """One that knows the mapping: only its fingerprint tells."""
    other = serve(build_model("llama", seed=1))
    connect(other, draft_ids)
    transport = Counting(bridge)
    backend = connect(transport, draft_ids, encoding="hidden", retry_for_s=1)
    bridge.app_client = other.app_client
    with pytest.raises(FingerprintMismatch, match="another model"):
        backend.generate_batch(*inputs)
    assert (transport.heads, transport.batches) == (1, 0)


def rebuilt(**changes: Any) -> Any:
    def change(body: bytes) -> bytes:
        frame = decode(bytearray(body))
        fields = {name: changes.get(name, value) for name, value in frame.fields.items()}
        tensors = {name: changes.get(name, tensor) for name, tensor in frame.tensors.items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return bytes(encode(fields, kept).to_bytes())

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rebuilt(weight=torch.zeros(7, 48)), r"expected weight \[8, H\].*\[7, 48\]"),
        (rebuilt(weight=None), r"expected weight \[8, H\].*None"),
        (rebuilt(draft_vocab_digest="ab" * 32), "got that of abab"),
        (rebuilt(upcast=1), "upcast"),
    ],
    ids=["fewer-rows", "no-weight", "other-mapping", "other-type"],
)
def test_a_head_of_the_wrong_form_is_not_asked_for_again(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any, change: Any, words: str
) -> None:
    transport = Counting(bridge)
    transport.change_head = change
    backend = connect(transport, draft_ids, encoding="hidden", retry_for_s=5)
    with pytest.raises(ProtocolMismatch, match=f"draft head is not the one.*{words}") as caught:
        backend.generate_batch(*inputs)
    assert caught.value.url == "http://target"
    assert (transport.heads, transport.batches) == (1, 0)


def test_a_head_of_another_width_is_seen_when_rows_come(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any
) -> None:
    transport = Counting(bridge)
    transport.change_head = rebuilt(weight=torch.zeros(8, 40))
    backend = connect(transport, draft_ids, encoding="hidden", retry_for_s=5)
    with pytest.raises(ProtocolMismatch, match=r"head_input \[\d+, 40\].*got \[\d+, 48\]"):
        backend.generate_batch(*inputs)
    assert transport.batches == 1


def test_a_corrupted_head_is_asked_for_again(
    bridge: Any, connect: Any, inputs: Any, draft_ids: Any, model: Any, expect: Any, matches: Any
) -> None:
    transport = Counting(bridge)

    def corrupt_once(body: bytes) -> bytes:
        transport.change_head = None
        return body[:-1] + bytes([body[-1] ^ 1])

    transport.change_head = corrupt_once
    backend = connect(transport, draft_ids, encoding="hidden", exact=True)
    matches(backend.generate_batch(*inputs), expect(model, inputs, draft_ids))
    assert transport.heads == 2
    transport.change_head = corrupt_once
    backend = connect(transport, draft_ids, encoding="hidden", max_retries=0)
    with pytest.raises(TransportError, match="checksum"):
        backend.generate_batch(*inputs)
