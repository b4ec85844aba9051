"""Hostile input by the thousand: typed errors, no growth, and right answers afterwards."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.fuzz.mutations import how_many, nearly_right, seed_of
from tests.server.bad_requests.frames import DIGEST, DRAFT_IDS, VOCAB_SIZE, frame_of

from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import ERROR_KINDS, RemoteEagle3Error
from eagle3_schemas.frame import decode
from eagle3_schemas.messages import SupervisionRequest, parse
from eagle3_schemas.protocol import CAPTURE_PATH, FRAME_MEDIA_TYPE, SUPERVISION_PATH

pytestmark = pytest.mark.slow

DECODER_INPUTS = how_many(40_000, "EAGLE3TEST_DECODER_INPUTS")
HTTP_INPUTS = how_many(3_000, "EAGLE3TEST_HTTP_INPUTS")
SEED = seed_of("EAGLE3TEST_SEED")
GROWTH_MIB = 32
CODES = {kind.code for kind in ERROR_KINDS}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def test_the_decoder_takes_or_refuses_whatever_it_is_fed() -> None:
    generator = random.Random(SEED)
    taken, before = 0, 0.0
    for number in range(DECODER_INPUTS):
        body = nearly_right(generator)
        try:
            parse(SupervisionRequest, decode(bytearray(body)).fields)
            taken += 1
        except RemoteEagle3Error:
            pass
        if number == DECODER_INPUTS // 10:
            before = resident_mib()
    assert 0 < taken < DECODER_INPUTS // 2  # some of the wrong content is not wrong at all
    assert resident_mib() - before < GROWTH_MIB
    print(f"{DECODER_INPUTS} inputs, {taken} of them valid, seed {SEED}")


@pytest.fixture
def _no_log_is_kept() -> Iterator[None]:
    """pytest keeps a test's log records until it ends: 1.5 KB a refused request, here measured."""

    def write(record: logging.LogRecord) -> bool:
        record.getMessage()  # as a handler would
        return False

    logger = logging.getLogger("eagle3_server.requests")
    logger.addFilter(write)
    yield
    logger.removeFilter(write)


@pytest.mark.usefixtures("_no_log_is_kept")
def test_the_server_answers_whatever_it_is_sent_and_then_the_same_as_before(
    build_model: Any, live_server: Any
) -> None:
    url = live_server(build_model("llama"))
    connection = Connection(url, token=None, timeout_s=60)
    connection.ensure_registered(DraftVocab.from_ids(DRAFT_IDS), VOCAB_SIZE)
    good = connection.supervise(frame_of(), "good").tensors
    assert sum(tensor.numel() for tensor in good.values()) > 0
    generator = random.Random(SEED)
    outcomes: dict[str, int] = {}
    before = 0.0
    paths = [*[SUPERVISION_PATH] * 6, *[CAPTURE_PATH] * 3, f"/v1/draft-vocabs/{DIGEST}"]
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(HTTP_INPUTS):
            path = generator.choice(paths)
            method = "POST" if path in (SUPERVISION_PATH, CAPTURE_PATH) else "PUT"
            content, kind = nearly_right(generator), {"content-type": FRAME_MEDIA_TYPE}
            answer = client.request(method, path, content=content, headers=kind)
            code = "ok" if answer.status_code == 200 else answer.json()["code"]
            assert code == "ok" or (code in CODES and answer.status_code < 500), (
                number,
                content,
                answer.text,
            )
            outcomes[code] = outcomes.get(code, 0) + 1
            if number == HTTP_INPUTS // 10:
                before = resident_mib()
        assert client.get("/v1/status").json()["bytes_in_flight"] == 0
    again = connection.supervise(frame_of(), "good").tensors
    connection.close()
    assert all(torch.equal(again[name], good[name]) for name in good)
    assert outcomes["ok"] > 0
    assert outcomes["malformed_payload"] > 0
    assert outcomes["invalid_request"] > 0
    assert resident_mib() - before < GROWTH_MIB
    print(f"{HTTP_INPUTS} requests, seed {SEED}: {outcomes}")
