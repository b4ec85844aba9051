"""A server, a connection without the client's own checks, and proof that the server serves on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.server.bad_requests.frames import DIGEST, DRAFT_IDS, VOCAB_SIZE, frame_of

from eagle3_client.connection import Connection
from eagle3_schemas import DraftVocab


@pytest.fixture
def bridge(build_model: Any, serve: Any) -> Any:
    return serve(build_model("llama"))


@pytest.fixture
def connection(bridge: Any) -> Connection:
    """A registered draft vocab, and no client-side checks in front of the server's."""
    connection = Connection("http://target", token=None, timeout_s=9, transport=bridge)
    connection.ensure_registered(DraftVocab.from_ids(DRAFT_IDS), VOCAB_SIZE)
    return connection


@pytest.fixture
def serves_on(connection: Connection) -> Callable[[], None]:
    def check() -> None:
        frame = connection.supervise(frame_of(), "request-8")
        assert frame.fields["draft_vocab_digest"] == DIGEST

    return check
