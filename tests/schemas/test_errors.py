"""Errors: one table read both ways, so that client and server raise the same class."""

from __future__ import annotations

import copy
import json
import pickle
import re
from http import HTTPStatus
from pathlib import Path

import pytest

from eagle3_schemas import errors
from eagle3_schemas.errors import (
    ERROR_KINDS,
    DeadlineExceeded,
    ErrorKind,
    FingerprintMismatch,
    InvalidRequest,
    LimitExceeded,
    MalformedPayload,
    NotReady,
    PackingUnsupported,
    PoisonRequest,
    ProtocolMismatch,
    QueueFull,
    RemoteEagle3Error,
    TargetFailed,
    TargetOutOfMemory,
    TransportError,
    Unauthorized,
    VocabMappingMissing,
    error_from_problem,
    kind_of,
)

# What deployed clients know; docs/protocol.md has the same table.
TABLE = [
    ("malformed_payload", MalformedPayload, 400),
    ("protocol_mismatch", ProtocolMismatch, 400),
    ("unauthorized", Unauthorized, 401),
    ("vocab_mapping_missing", VocabMappingMissing, 409),
    ("limit_exceeded", LimitExceeded, 413),
    ("packing_unsupported", PackingUnsupported, 422),
    ("invalid_request", InvalidRequest, 422),
    ("queue_full", QueueFull, 429),
    ("target_failed", TargetFailed, 500),
    ("not_ready", NotReady, 503),
    ("deadline_exceeded", DeadlineExceeded, 504),
    ("out_of_memory", TargetOutOfMemory, 503),
]
PROTOCOL_PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
RAISED_BY_THE_CLIENT_ALONE = {FingerprintMismatch, PoisonRequest, TransportError}
RETRYABLE = {QueueFull, NotReady, DeadlineExceeded, TransportError}


def every_error() -> set[type[RemoteEagle3Error]]:
    return {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, RemoteEagle3Error)
    }


LEAVES = sorted(every_error() - {RemoteEagle3Error}, key=lambda kind: kind.__name__)


def test_the_table_is_the_one_deployed_clients_know() -> None:
    assert [tuple(kind) for kind in ERROR_KINDS] == TABLE


def test_the_protocol_page_has_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \|", PROTOCOL_PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == [(code, str(status)) for code, _, status in TABLE]


def test_the_pages_document_is_one_that_the_client_reads(documented: list[str]) -> None:
    (document,) = map(json.loads, documented)
    error = error_from_problem(
        document["code"], document["status"], document["detail"], document["request_id"]
    )
    assert type(error) is VocabMappingMissing
    assert kind_of(error).status == document["status"]
    assert HTTPStatus(document["status"]).phrase == document["title"]


def test_codes_and_classes_are_one_to_one() -> None:
    assert len({kind.code for kind in ERROR_KINDS}) == len(ERROR_KINDS)
    assert len({kind.error for kind in ERROR_KINDS}) == len(ERROR_KINDS)


def test_every_class_is_in_the_table_or_known_to_be_the_clients_own() -> None:
    in_table = {kind.error for kind in ERROR_KINDS}
    assert in_table | RAISED_BY_THE_CLIENT_ALONE | {RemoteEagle3Error} == every_error()
    assert not in_table & RAISED_BY_THE_CLIENT_ALONE


def test_exactly_the_errors_that_may_pass_by_themselves_are_retryable() -> None:
    assert {kind for kind in every_error() if kind.is_retryable} == RETRYABLE


@pytest.mark.parametrize("kind", ERROR_KINDS, ids=lambda kind: kind.code)
def test_the_client_rebuilds_the_class_the_server_raised(kind: ErrorKind) -> None:
    raised = kind.error("expected 3, got 4")
    row = kind_of(raised)
    assert row == kind
    rebuilt = error_from_problem(row.code, row.status, raised.detail, "req-7")
    assert type(rebuilt) is kind.error
    assert (rebuilt.detail, rebuilt.request_id) == ("expected 3, got 4", "req-7")


def test_a_subclass_travels_as_its_nearest_listed_parent() -> None:
    class TooManyRows(LimitExceeded):
        pass

    assert kind_of(TooManyRows("x")).code == "limit_exceeded"


@pytest.mark.parametrize("kind", [*sorted(RAISED_BY_THE_CLIENT_ALONE, key=str), RemoteEagle3Error])
def test_an_unlisted_error_is_the_servers_own_failure(kind: type[RemoteEagle3Error]) -> None:
    assert kind_of(kind("x")) == ErrorKind("target_failed", TargetFailed, 500)


def test_bad_input_can_be_caught_as_value_error() -> None:
    caught_as = {kind for kind in every_error() if issubclass(kind, ValueError)}
    assert caught_as == {InvalidRequest, MalformedPayload, ProtocolMismatch, PackingUnsupported}


# --- answers that are not ours ---


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("code", [None, "a_code_of_tomorrow", ""])
def test_a_gateways_answer_is_a_retryable_transport_error(status: int, code: str | None) -> None:
    error = error_from_problem(code, status, "<html>Bad Gateway</html>", "req-1")
    assert type(error) is TransportError
    assert error.is_retryable
    assert str(status) in error.detail
    assert "<html>Bad Gateway</html>" in error.detail
    assert error.request_id == "req-1"


@pytest.mark.parametrize("status", [200, 302, 400, 404, 405, 418, 422, 500, 501])
@pytest.mark.parametrize("code", [None, "a_code_of_tomorrow"])
def test_any_other_answer_without_our_code_says_to_check_url_and_version(
    status: int, code: str | None
) -> None:
    error = error_from_problem(code, status, "Not Found")
    assert type(error) is ProtocolMismatch
    assert not error.is_retryable
    assert f"HTTP {status} without an eagle3-remote error document: Not Found" in error.detail
    assert "Check that the URL is an eagle3-remote server" in error.detail


def test_our_code_wins_over_a_status_a_proxy_changed() -> None:
    assert type(error_from_problem("limit_exceeded", 502, "too big")) is LimitExceeded


# --- what an error carries ---


def test_the_message_is_the_detail_and_then_what_is_known_of_the_request() -> None:
    error = QueueFull("16 requests wait already")
    assert str(error) == "16 requests wait already"
    error.request_id = "req-1"
    assert str(error) == "16 requests wait already (request_id=req-1)"
    error.url, error.attempts = "http://host:8001", 3
    assert str(error) == (
        "16 requests wait already (url=http://host:8001, attempts=3, request_id=req-1)"
    )


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_keeps_its_context_across_processes(kind: type[RemoteEagle3Error]) -> None:
    """A DataLoader worker's error reaches the trainer by pickle."""
    error = kind("why", request_id="req-1", url="http://a", retry_after_s=1.5)
    error.attempts = 2  # filled in after construction, as the client does
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        there = pickle.loads(pickle.dumps(error, protocol))
        assert type(there) is kind
        assert vars(there) == vars(error)
        assert str(there) == str(error)
        assert there.args == error.args
    assert vars(copy.copy(error)) == vars(error)


def test_context_is_absent_until_it_is_known() -> None:
    assert vars(NotReady("x")) == {
        "detail": "x",
        "request_id": None,
        "url": None,
        "attempts": None,
        "retry_after_s": None,
        "rank": None,
        "waited_s": None,
    }
