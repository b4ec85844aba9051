"""A second client, written from docs/protocol.md: its code as printed, and its words for the rest.

No module of ours, no torch and no httpx in the client; only the oracle is torch.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from tests.pages import DOCS, run_by
from tests.schemas.frame_oracle import raw
from tests.schemas.test_frame_golden import GOLDEN_FIELDS, GOLDEN_PARTS, golden
from tests.seeded_target import SeededTarget

from eagle3_server import create_app

WRITER = (
    "tests/schemas/test_frame_golden.py::test_the_protocol_pages_own_code_writes_the_golden_bytes"
)
PAGE = (DOCS / "protocol.md").read_text(encoding="utf-8")
IDS = [
    [5, 17, 3, 99, 42, 7, 88, 120, 64, 31, 2],
    [9, 4, 77, 130, 55, 21, 13, 8, 0, 0, 0],
]
ATTENTION_MASK = [[1] * 11, [1] * 8 + [0] * 3]
LOSS_MASK = [[0, 0] + [1] * 9, [0] + [1] * 7 + [0] * 3]
DRAFT_IDS = [90, 3, 130, 42, 7, 61, 12, 88, 5, 101, 23, 77, 64, 31, 118, 1, 50, 2]
V = 131


def code_of(*blocks: list[str]) -> dict[str, Any]:
    """Run the page's blocks one after another, as a reader would paste them."""
    names: dict[str, Any] = {}
    for block in (run_by(WRITER), *blocks):
        exec("".join(block), names)
    return names


def reader() -> list[str]:
    return run_by("tests/test_second_client.py::test_the_pages_reader_reads_the_golden_bytes")


def plain_client() -> list[str]:
    return run_by("tests/test_second_client.py::test_the_pages_client_gets_what_the_target_gives")


def test_the_pages_reader_reads_the_golden_bytes() -> None:
    names = code_of(reader())
    fields, tensors = names["unframe"](golden())
    assert fields == GOLDEN_FIELDS
    assert [(name, *rest) for name, rest in tensors.items()] == GOLDEN_PARTS


@pytest.mark.parametrize("position", range(0, len(golden())))
def test_the_pages_reader_notices_every_damaged_byte(position: int) -> None:
    names = code_of(reader())
    body = bytearray(golden())
    body[position] ^= 0x10
    is_padding = golden()[position] == 0 and position > 24 and not in_a_segment(position)
    if is_padding:
        assert names["unframe"](bytes(body))[0] == GOLDEN_FIELDS
    else:
        with pytest.raises(ValueError, match=r"frame|damaged|should be|behind"):
            names["unframe"](bytes(body))


def in_a_segment(position: int) -> bool:
    """Whether a byte of the golden frame is the header's or a tensor's."""
    header = struct.unpack_from("<4sHHI", golden())[3]
    payload = -(-(24 + header) // 64) * 64
    ends, at = [], 0
    for _, _, _, data in GOLDEN_PARTS:
        at += -at % 64
        ends.append((payload + at, payload + at + len(data)))
        at += len(data)
    return position < 24 + header or any(start <= position < end for start, end in ends)


@pytest.fixture(scope="module")
def model(build_model: Any) -> Any:
    return build_model("llama")


@pytest.fixture
def client(live_server: Any, model: Any) -> Iterator[Any]:
    url = urlsplit(live_server(model))
    made = code_of(reader(), plain_client())["Client"](url.hostname, url.port)
    yield made
    made.http.close()


def oracle(model: Any, layers: list[int]) -> tuple[list[float], list[int], torch.Tensor]:
    """Aux rows, position mask and target_probs by the definition, a position at a time."""
    with torch.no_grad():
        done = model(
            input_ids=torch.tensor(IDS), attention_mask=torch.tensor(ATTENTION_MASK),
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
    states = [done.hidden_states[layer + 1] for layer in layers]
    aux, mask, probs = [], [], []
    for row in range(2):
        for t in range(11):
            if ATTENTION_MASK[row][t]:
                for state in states:
                    aux += state[row, t].tolist()
            supervised = t + 1 < 11 and LOSS_MASK[row][t + 1]
            logits = done.logits[row, t + 1] if t + 1 < 11 else torch.zeros(V)
            is_drafted = supervised and int(logits.argmax()) in DRAFT_IDS
            mask.append(int(bool(is_drafted)))
            if is_drafted:
                probs.append(logits[DRAFT_IDS].softmax(0))
    return aux, mask, torch.stack(probs)


def test_the_pages_client_gets_what_the_target_gives(client: Any, model: Any) -> None:
    """Aux states and probs bit for bit, and the page's words about the other two encodings."""
    names = code_of(reader(), plain_client())
    info = client.ask("GET", "/v1/model")
    layers = info["aux_layer_ids"]
    aux, mask, probs = oracle(model, layers)
    assert sum(mask) > 2
    digest = client.register(DRAFT_IDS, info["vocab_size"])
    for encoding in ("probs", "logits", "hidden"):
        answer, tensors = client.supervise(
            digest, IDS, ATTENTION_MASK, LOSS_MASK, encoding, exact=encoding != "hidden"
        )
        assert answer["fingerprint"] == info["fingerprint"]
        dtype, shape, data = tensors["aux_hidden_states"]
        assert shape == [19, 3 * info["hidden_size"]]
        got = names["floats"](dtype, data)
        assert max(abs(a - b) for a, b in zip(got, aux, strict=True)) < 1e-4
        if encoding != "hidden":  # which `exact` forbids for so few tokens
            assert got == aux
        assert names["unbits"](tensors["position_mask"][2], 22) == mask
        rows = decoded(client, digest, encoding, tensors, names)
        flat = [value for row in rows for value in row]
        if encoding == "probs":
            assert struct.pack(f"<{probs.numel()}f", *flat) == raw(probs)
        expected = [value for row in probs.tolist() for value in row]
        # Python sums in float64, torch in float32.
        assert max(abs(a - b) for a, b in zip(flat, expected, strict=True)) < 1e-5


def decoded(
    client: Any, digest: str, encoding: str, tensors: Any, names: dict[str, Any]
) -> list[list[float]]:
    """Rows of target_probs, as the page's table of encodings says."""
    if encoding == "probs":
        dtype, shape, data = tensors["target_probs"]
        return rows_of(names["floats"](dtype, data), shape)
    if encoding == "logits":
        dtype, shape, data = tensors["draft_logits"]
        return [softmax(row) for row in rows_of(names["floats"](dtype, data), shape)]
    fields, head = client.ask("GET", f"/v1/draft-vocabs/{digest}/head")
    weight = rows_of(names["floats"](head["weight"][0], head["weight"][2]), head["weight"][1])
    bias = names["floats"](*head["bias"][::2]) if "bias" in head else [0.0] * len(weight)
    dtype, shape, data = tensors["head_input"]
    found = []
    for state in rows_of(names["floats"](dtype, data), shape):
        logits = [
            sum(w * x for w, x in zip(row, state, strict=True)) + term
            for row, term in zip(weight, bias, strict=True)
        ]
        for step in ("multiply", "divide", "softcap"):
            if (by := fields[step]) is not None:
                logits = [
                    each * by if step == "multiply" else each / by if step == "divide"
                    else math.tanh(each / by) * by for each in logits
                ]  # fmt: skip
        found.append(softmax(logits))
    return found


def rows_of(values: list[float], shape: list[int]) -> list[list[float]]:
    return [values[i * shape[1] : (i + 1) * shape[1]] for i in range(shape[0])]


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(each - max(row)) for each in row]
    return [each / math.fsum(exponentials) for each in exponentials]


def test_the_pages_client_is_told_what_is_wrong(client: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^vocab_mapping_missing: .*register"):
        client.supervise("0" * 64, IDS, ATTENTION_MASK, LOSS_MASK)


def test_the_pages_table_lists_the_servers_paths_and_no_other() -> None:
    listed = re.findall(r"^\| `(GET|PUT|POST) (\S+)` \|", PAGE, re.MULTILINE)
    app = create_app(SeededTarget())
    served = [
        (method, route.path)
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD"
    ]
    assert sorted(listed) == sorted(served)
