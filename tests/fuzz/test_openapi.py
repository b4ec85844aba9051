"""The OpenAPI document against the server: schemathesis finds where they differ."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    negative_data_rejection,
    positive_data_acceptance,
)
from tests.fuzz.mutations import how_many, nearly_right, seed_of
from tests.server.bad_requests.frames import DIGEST, DRAFT_IDS
from tests.tiny_tokenizer import VOCAB_SIZE, save_with_tokenizer

from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab
from eagle3_schemas.errors import ERROR_KINDS
from eagle3_schemas.protocol import FRAME_MEDIA_TYPE, OPEN_PATHS
from eagle3_server import ServerSettings
from eagle3_server.loading import load_target

pytestmark = pytest.mark.slow

EXAMPLES = how_many(150, "EAGLE3TEST_OPENAPI_EXAMPLES")
SEED = seed_of("EAGLE3TEST_SEED")
CODES = {kind.code for kind in ERROR_KINDS}
# The document cannot say which bytes are a valid frame; and `ignored_auth` takes the right token,
# which all requests carry here, for one that it made up (test_tokens.py has its subject).
EXCLUDED = [positive_data_acceptance, negative_data_rejection, ignored_auth]
FRAMES = st.integers(0, 2**32).map(lambda number: nearly_right(random.Random(number)))


@pytest.mark.parametrize("token", [None, "right", "wrong"])
def test_every_route_answers_as_the_document_says(
    live_server: Any, tmp_path: Path, token: str | None
) -> None:
    tokens = None if token is None else "right"
    path = save_with_tokenizer(tmp_path)
    target = load_target(ServerSettings(model=str(path), device="cpu"))
    url = live_server(target, token=tokens, model=str(path))
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    if token != "wrong":
        connection = Connection(url, token=token, timeout_s=60)
        connection.ensure_registered(DraftVocab.from_ids(DRAFT_IDS), VOCAB_SIZE)
        connection.close()
    schemathesis.openapi.media_type(FRAME_MEDIA_TYPE, FRAMES)
    document = httpx.get(f"{url}/openapi.json", headers={"authorization": "Bearer right"}).json()
    outcomes: dict[str, int] = {}
    served: set[str] = set()
    operations = [
        each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations()
    ]
    assert {"/v1/supervision", "/v1/status", "/metrics"} <= {each.path for each in operations}

    for operation in operations:

        @seed(SEED)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(), is_registered=st.booleans())
        def answers(case: Any, is_registered: bool) -> None:
            if "digest" in case.path_parameters and is_registered:
                case.path_parameters["digest"] = DIGEST
            response = case.call_and_validate(
                base_url=url, headers=headers, timeout=60, excluded_checks=EXCLUDED
            )
            code = "ok" if response.status_code == 200 else response.json()["code"]
            assert code == "ok" or (code in CODES and response.status_code < 500)
            is_open = case.path in OPEN_PATHS
            assert (code == "unauthorized") == (token == "wrong" and not is_open)
            outcomes[code] = outcomes.get(code, 0) + 1
            if code == "ok":
                served.add(case.path)

        answers()

    print(f"{sum(outcomes.values())} requests, seed {SEED}: {outcomes}")
    assert sum(outcomes.values()) > EXAMPLES
    paths = {operation.path for operation in operations}
    # Random frames never hold the very ids of the digest in their path.
    unreachable = {"/v1/draft-vocabs/{digest}"}
    assert served == (set(OPEN_PATHS) & paths if token == "wrong" else paths - unreachable)
